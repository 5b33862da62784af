"""What a run says: console, log.txt, metrics.jsonl, TensorBoard, Weights & Biases. Only rank 0 speaks."""

import importlib.util
import io
import json
import math
import os
import sys
import threading
import time

from tqdm import tqdm

from utils import distributed
from utils.cli import UserError

PLAIN = "{desc}: {n_fmt}/{total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}"
tqdm.set_lock(threading.RLock())  # its own one is for several processes, and leaves a semaphore behind


def say(text=""):
    """Print on rank 0, above the progress bar if one is shown."""
    if distributed.is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Progress(tqdm):
    """A bar on a terminal; elsewhere a plain line every `every_s` seconds (None: no lines) with rate and time left."""

    monitor_interval = 0  # no thread of tqdm's

    def __init__(self, total, desc, unit="it", initial=0, every_s=15.0):
        self.plain = not sys.stderr.isatty()
        style = {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if unit == "B" else {"unit": f" {unit}"}
        if self.plain:  # a delay, however short, leaves out the line at the start; the line break at the end goes nowhere
            style |= {"mininterval": every_s, "delay": 1e-9, "file": io.StringIO(), "bar_format": PLAIN}
        super().__init__(desc=desc, total=total, initial=initial, miniters=0, smoothing=0, dynamic_ncols=not self.plain,
                         disable=not distributed.is_main() or (self.plain and every_s is None), **style)

    def update(self, count=1, note=""):
        """Report `count` more units done; `note` is shown beside the numbers."""
        self.set_postfix_str(note, refresh=False)
        super().update(count)

    def display(self, msg=None, pos=None):
        if self.plain:
            say(str(self))
        else:
            super().display(msg, pos)


def check_sinks(log_config):
    """Raise UserError, before any work, if a package is missing that the log section of a config asks for."""
    for name in ("tensorboard", "wandb"):
        if getattr(log_config, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"log.{name}=true needs the package {name}: pip install {name}, or set log.{name}=false")


class RunLog:
    """The logs in a run's folder. metrics.jsonl holds each logged step once, also after a resume.

    tensorboard, wandb: log there too; see `check_sinks`. config: a dict, for Weights & Biases.
    position: `position` of the state that the run resumes from (None: a new run). What was logged after it is cut off.
    """

    def __init__(self, folder, position=None, tensorboard=False, wandb=False, config=None):
        self.metrics_file = self.text_file = self.board = self.wandb = None
        if not distributed.is_main():
            return
        self.text_file = open(folder / "log.txt", "a", buffering=1)
        self.metrics_file = open(folder / "metrics.jsonl", "a+b", buffering=0)
        last_step = self._cut(position or 0)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)
        if wandb:
            import wandb
            self.wandb = wandb.init(dir=str(folder), name=folder.name, id=folder.name, resume="allow", config=config)

    def _cut(self, position):
        """Cut metrics.jsonl to `position` bytes and whole lines; returns the last step in it (0: none)."""
        self.metrics_file.seek(0)
        whole, newline, _ = self.metrics_file.read(position).rpartition(b"\n")
        whole += newline
        if len(whole) < position:
            self.say(f"WARNING: {self.metrics_file.name} had {position} bytes at the checkpoint, but only {len(whole)} are left; "
                     f"the lines between are lost")
        self.metrics_file.truncate(len(whole))
        self.metrics_file.seek(0, os.SEEK_END)
        return json.loads(whole.splitlines()[-1])["step"] if whole else 0

    @property
    def position(self):
        """Bytes of metrics.jsonl that are safely on disk (0 on ranks that do not write)."""
        if self.metrics_file is None:
            return 0
        os.fsync(self.metrics_file.fileno())
        return self.metrics_file.tell()

    def say(self, text):
        """Console and log.txt."""
        say(text)
        if self.text_file is not None:
            self.text_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, step, values):
        """One line of metrics.jsonl (`step` first), and the same numbers to TensorBoard and wandb. NaN and Inf become null."""
        if self.metrics_file is None:
            return
        numbers = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        self.metrics_file.write((json.dumps({"step": step} | dict.fromkeys(values) | numbers) + "\n").encode())
        if self.board is not None:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def picture(self, step, name, images):
        """Show a grid (H, W, 3) uint8 in TensorBoard."""
        if self.board is not None:
            self.board.add_image(name, images, step, dataformats="HWC")

    def close(self):
        for sink in (self.text_file, self.metrics_file, self.board):
            if sink is not None:
                sink.close()
        if self.wandb is not None:
            self.wandb.finish()
