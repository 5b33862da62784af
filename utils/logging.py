"""What a run says: the console, log.txt, metrics.jsonl, TensorBoard and Weights & Biases. Only rank 0 speaks."""

import json
import os
import sys
import time
from pathlib import Path

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
    """93784 -> '1d 2h 3m', 75 -> '1m 15s'."""
    seconds = int(round(seconds))
    units = [(seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "m"), (seconds % 60, "s")]
    first = next((i for i, (count, _) in enumerate(units) if count), 3)
    return " ".join(f"{count}{name}" for count, name in units[first:first + 3] if count or name == "s" or first < 3)


def format_bytes(count):
    """1536 -> '1.5 KiB'."""
    exponent = min(max(int(count).bit_length() - 1, 0) // 10, 4)
    return f"{count / 1024 ** exponent:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line every `every_s` seconds (None: no lines) with rate and time left."""

    shown = None  # the bar now on the terminal

    def __init__(self, total, desc, unit="it", initial=0, every_s=15.0):
        self.total, self.desc, self.unit = total, desc, unit
        self.initial = self.done = initial
        self.started = self.last_line = time.monotonic()
        self.every_s = every_s
        self.bar = None
        if distributed.is_main() and sys.stderr.isatty():
            from tqdm import tqdm
            self.bar = Progress.shown = tqdm(total=total, desc=desc, unit=unit, initial=initial, dynamic_ncols=True,
                                             unit_scale=unit == "B", unit_divisor=1024 if unit == "B" else 1000)

    def update(self, count=1, note=""):
        """Report `count` more units done (parts of a unit add up); `note` is shown beside the numbers."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(self._whole - self.bar.n)
        elif self.every_s is not None and time.monotonic() - self.last_line >= self.every_s:
            self._line(note)

    def _line(self, note=""):
        self.last_line = time.monotonic()
        elapsed = self.last_line - self.started
        rate = (self.done - self.initial) / elapsed if elapsed > 0 else 0.0
        total = f"/{self._amount(self.total)}" if self.total else ""
        left = f", {format_seconds((self.total - self.done) / rate)} left" if self.total and rate > 0 else ""
        speed = f"{format_bytes(rate)}/s" if self.unit == "B" else f"{self.unit}, {rate:.3g} {self.unit}/s"
        comma = ", " if self.unit == "B" else " "
        say(f"{self.desc}: {self._amount(self._whole)}{total}{comma}{speed}{left}" + (f", {note}" if note else ""))

    @property
    def _whole(self):
        return int(self.done + 1e-6)  # sums of parts end a rounding error below

    def _amount(self, count):
        return format_bytes(count) if self.unit == "B" else str(count)

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


class RunLog:
    """The files of one run's folder. metrics.jsonl holds each logged step once, also after a resume.

    folder: the experiment folder; `tensorboard` and `wandb` switch those sinks on.
    position: `position` of the state that the run resumes from (None: a new run); what was logged after it is cut off.
    """

    def __init__(self, folder, position=None, tensorboard=False, wandb=False, config=None):
        self.metrics_file = self.text_file = self.board = self.wandb = None
        if not distributed.is_main():
            return
        folder = Path(folder)
        self.text_file = open(folder / "log.txt", "a", buffering=1)
        self.metrics_file = open(folder / "metrics.jsonl", "a+b")
        last_step = self._cut(position or 0)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)
        if wandb:
            self.wandb = _start_wandb(folder, config)

    def _cut(self, position):
        """Cut metrics.jsonl to `position` bytes and whole lines; returns the last step in it (0: none)."""
        self.metrics_file.seek(0)
        lines = self.metrics_file.read(position).splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        whole = sum(map(len, lines))
        if whole < position:
            self.say(f"WARNING: {self.metrics_file.name} had {position} bytes at the checkpoint, {whole} are left; "
                     f"what is missing stays missing")
        self.metrics_file.truncate(whole)
        self.metrics_file.seek(0, os.SEEK_END)
        return json.loads(lines[-1])["step"] if lines else 0

    @property
    def position(self):
        """Bytes of metrics.jsonl that are safely on disk (0 on ranks that do not write)."""
        if self.metrics_file is None:
            return 0
        self.metrics_file.flush()
        os.fsync(self.metrics_file.fileno())
        return self.metrics_file.tell()

    def say(self, text):
        """Console and log.txt."""
        say(text)
        if self.text_file is not None:
            self.text_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, step, values):
        """One line of metrics.jsonl (`step` first), and the same numbers to TensorBoard and wandb."""
        if self.metrics_file is None:
            return
        self.metrics_file.write((json.dumps({"step": step, **values}) + "\n").encode())
        self.metrics_file.flush()
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
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


def _start_wandb(folder, config):
    try:
        import wandb
    except ImportError as error:
        raise UserError("log.wandb=true needs the package wandb: pip install wandb, or log.wandb=false") from error
    return wandb.init(dir=str(folder), name=folder.name, id=folder.name, resume="allow", config=config)
