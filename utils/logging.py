"""What a run says: console, log.txt, metrics.jsonl, TensorBoard, Weights & Biases. Only rank 0 speaks."""

import datetime
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from utils import distributed
from utils.cli import UserError


def say(text=""):
    """Print on rank 0, above the progress bar if one is shown."""
    if not distributed.is_main():
        return
    if Progress.shown is not None:
        Progress.shown.write(text)
    else:
        print(text, flush=True)


def format_seconds(seconds):
    """93784 -> '1 day, 2:03:04'."""
    return str(datetime.timedelta(seconds=round(seconds)))


def format_bytes(count):
    """1536 -> '1.5 KiB'."""
    exponent = min(max(int(count).bit_length() - 1, 0) // 10, 4)
    return f"{count / 1024 ** exponent:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"


class Progress:
    """A bar on a terminal; elsewhere a plain line every `every_s` seconds (None: no lines) with rate and time left."""

    shown = None  # the bar now on the terminal

    def __init__(self, total, desc, unit="it", initial=0, every_s=15.0):
        self.total, self.done, self.every_s = total, initial, every_s
        self.started = self.last_line = time.monotonic()
        self.style = {"unit": "B", "unit_scale": True, "unit_divisor": 1024} if unit == "B" else {"unit": f" {unit}"}
        self.style |= {"total": total, "initial": initial}
        self.desc, self.bar = desc, None
        if distributed.is_main() and sys.stderr.isatty():
            self.bar = Progress.shown = tqdm(desc=desc, dynamic_ncols=True, **self.style)

    def update(self, count=1, note=""):
        """Report `count` more units done (parts of a unit add up); `note` is shown beside the numbers."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(self._whole - self.bar.n)
        elif self.every_s is not None and time.monotonic() - self.last_line >= self.every_s:
            self._line(note)

    @property
    def _whole(self):
        return int(self.done + 1e-6)  # sums of parts end a rounding error below

    def _line(self, note=""):
        self.last_line = time.monotonic()
        layout = "{desc}: {n_fmt}/{total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}"
        say(tqdm.format_meter(self._whole, elapsed=self.last_line - self.started, prefix=self.desc, postfix=note, bar_format=layout,
                              **self.style))

    def close(self):
        if self.bar is not None:
            self.bar.close()
            Progress.shown = None
        elif self.every_s is not None:
            self._line()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


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
        folder = Path(folder)
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
        lines = self.metrics_file.read(position).splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        whole = sum(map(len, lines))
        if whole < position:
            self.say(f"WARNING: {self.metrics_file.name} had {position} bytes at the checkpoint, but only {whole} are left; "
                     f"the lines between are lost")
        self.metrics_file.truncate(whole)
        self.metrics_file.seek(0, os.SEEK_END)
        return json.loads(lines[-1])["step"] if lines else 0

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
        """One line of metrics.jsonl (`step` first), and the same numbers to TensorBoard and wandb. NaN and Inf are null: JSON has neither."""
        if self.metrics_file is None:
            return
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        self.metrics_file.write((json.dumps({"step": step, **finite}, allow_nan=False) + "\n").encode())
        numbers = {key: value for key, value in finite.items() if isinstance(value, (int, float))}
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
