"""Checkpoints: written whole or not at all, found again, deleted when newer ones are there. sampling/load.py reads them.

A checkpoint is NNNNNNN.pt and its manifest NNNNNNN.json (size and sha256), which is written last. The .pt is a dict with `model`,
`ema` and `opt` as in the published files, and what an exact resume needs besides.
"""

import errno
import hashlib
import json
import shutil
import threading
import time
from pathlib import Path

import torch

from sampling.load import damage, first_line, load_checkpoint, manifest_path
from utils.cli import UserError
from utils.files import file_sha256, make_folder, write_whole
from utils.logging import say


def find_latest(folder):
    """Path of the newest checkpoint of a folder that is whole, or None if it has no checkpoints; damaged ones are named.

    Raises UserError if all are damaged: weeks of work are not silently begun anew.
    """
    damaged = []
    for path in reversed(_steps_in(folder)):
        problem = damage(path) if manifest_path(path).is_file() else _adopt(path)
        if problem is None:
            return path
        say(f"checkpoint {path} is passed over: {problem}")
        damaged.append(path.name)
    if damaged:
        raise UserError(f"all checkpoints in {folder} are damaged ({', '.join(damaged)}); restore one with its .json, "
                        f"or move the folder away to begin at the first step")
    return None


def _adopt(path):
    """Write the manifest of a checkpoint that was copied without, or whose writer was killed; returns what is wrong, or None."""
    try:
        content = load_checkpoint(path)  # reads all of it and checks the CRC of every record
    except UserError as error:
        return f"it has no manifest ({manifest_path(path).name}), and {error}"
    if "stepper" not in content or content.get("step") != int(path.stem):
        return f"it has no manifest ({manifest_path(path).name}) and is none that a run could go on from; see --ckpt_path"
    say(f"checkpoint {path} has no manifest; it was read completely, is whole, and gets one")
    _write_manifest(path, file_sha256(path), content["step"])
    return None


def _steps_in(folder):
    """Checkpoint files in order of their steps."""
    return sorted((path for path in Path(folder).glob("*.pt") if path.stem.isdigit()), key=lambda path: int(path.stem))


class CheckpointWriter:
    """Writes a run's checkpoints in the background, on rank 0.

    keep_last: newest checkpoints kept (0: all). keep_every: those at multiples of this step are kept for ever (0: none).
    """

    def __init__(self, folder, keep_last=3, keep_every=0):
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self.thread, self.failed = None, False
        self.host_copies = {}

    def prepare(self, step, num_bytes, num_coming):
        """Make and tidy the folder of a run at `step`. Raises UserError if it cannot hold num_coming more checkpoints of num_bytes."""
        make_folder(self.folder, "log.results_dir: checkpoint folder")
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        self._delete_old(step)  # the last run may have been killed before it came to that
        if self.keep_last:  # an old one goes when a new one is complete
            there = len([path for path in _steps_in(self.folder) if manifest_path(path).is_file()])
            num_coming = min(num_coming, max(1, self.keep_last + 1 - there))
        free = shutil.disk_usage(self.folder).free
        if free < num_coming * num_bytes:
            raise UserError(f"checkpoint folder {self.folder} has {free / 1e9:.2f} GB free, but {num_coming} more checkpoint(s) of "
                            f"{num_bytes / 1e9:.2f} GB are to come; free some space, keep fewer with log.keep_last, or choose another "
                            f"place with log.results_dir")

    def save(self, step, state):
        """Copy `state` to host memory and write it as checkpoint `step` in the background; waits for the previous one first."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(step, self._copy_to_host(state)), name=f"checkpoint-{step}")
        self.thread.start()

    def wait(self):
        """Wait until the last `save` is on disk. True if it is (or there was none), False if it failed, which was said."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        return not self.failed

    def newest(self):
        """Path of the newest finished checkpoint, or None."""
        self.wait()
        return next((path for path in reversed(_steps_in(self.folder)) if manifest_path(path).is_file()), None)

    def _copy_to_host(self, state):
        """The same containers with every tensor copied into a host buffer that is reused by the next save."""
        copy = self._copy_tree(state, ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copy

    def _copy_tree(self, value, place):
        if isinstance(value, dict):
            return {key: self._copy_tree(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy_tree(item, (*place, i)) for i, item in enumerate(value))
        if not isinstance(value, torch.Tensor):
            return value
        buffer = self.host_copies.get(place)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = self.host_copies[place] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return buffer.copy_(value.detach(), non_blocking=True)

    def _write(self, step, state):
        path = self.folder / f"{step:07d}.pt"
        self.failed = True
        try:
            write_checkpoint(path, state)
            self.failed = False
            self._delete_old(step)
        except Exception as error:  # nobody above a thread would say it
            reason = "the disk is full" if getattr(error, "errno", None) == errno.ENOSPC else first_line(error)
            what = f"{path} was not written" if self.failed else f"checkpoints older than {path} were not deleted"
            say(f"WARNING: {what}: {reason}; the earlier checkpoints in {self.folder} are whole")

    def _delete_old(self, step):
        """Delete what is not to be kept. Later steps (damaged) do not count; files without a manifest may be of the published code."""
        if not self.keep_last:
            return
        written = sorted(int(manifest.stem) for manifest in self.folder.glob("*.json") if manifest.stem.isdigit())
        paths = [self.folder / f"{number:07d}.pt" for number in written if number <= step]
        whole = [path for path in paths if path.is_file()]
        kept = whole[-self.keep_last:] + [path for path in whole if self.keep_every and int(path.stem) % self.keep_every == 0]
        for path in paths:
            if path not in kept:
                path.unlink(missing_ok=True)  # the .pt first; after a crash the manifest still marks it
                manifest_path(path).unlink()


def write_checkpoint(path, state):
    """Write a .pt and then its manifest."""
    path = Path(path)
    with write_whole(path) as temporary:
        with open(temporary, "wb") as stream:
            hashing = _HashingStream(stream)
            try:
                torch.save(state, hashing)
            except RuntimeError as error:  # PyTorch's writer buries the disk's error under one of its own
                raise hashing.error or error
        manifest_path(path).unlink(missing_ok=True)  # rewriting a step: the old manifest must not vouch for the new file
    _write_manifest(path, hashing.digest.hexdigest(), state.get("step"))


def _write_manifest(path, sha256, step):
    written = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    manifest = {"file": path.name, "size": path.stat().st_size, "sha256": sha256, "step": step, "written": written}
    with write_whole(manifest_path(path)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))


class _HashingStream:
    """A write-only stream that hashes what passes through it and remembers what went wrong."""

    def __init__(self, stream):
        self.stream, self.digest, self.error = stream, hashlib.sha256(), None

    def write(self, data):
        self.digest.update(data)
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.stream.flush()
