"""Checkpoints: written whole or not at all, found again, deleted when newer ones are there. sampling/load.py reads them.

A checkpoint is NNNNNNN.pt and its manifest NNNNNNN.json (size and sha256), which is there before the .pt takes its name. The .pt is a
dict with `model`, `ema` and `opt` as in the published files, and what an exact resume needs besides.
"""

import errno
import hashlib
import itertools
import json
import shutil
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils import _pytree as pytree

from sampling.load import damage, first_line, manifest_path, read_checkpoint
from utils.cli import UserError
from utils.files import file_sha256, make_folder, write_whole
from utils.logging import say

ALIGNMENT = 64  # bytes, as torch aligns its own memory


def find_latest(folder):
    """Path of the newest checkpoint of a folder that is whole, or None if it has no checkpoints; damaged ones are named.

    Raises UserError if all are damaged: weeks of work are not silently begun anew.
    """
    damaged = []
    for path in reversed(_steps_in(folder)):
        problem = damage(path) or (None if manifest_path(path).is_file() else _adopt(path))
        if problem is None:
            return path
        say(f"checkpoint {path} is passed over: {problem}")
        damaged.append(path.name)
    if damaged:
        raise UserError(f"all checkpoints in {folder} are damaged ({', '.join(damaged)}); restore one with its .json, or move the folder "
                        f"away to begin at the first step, or at one of them by --ckpt_path")
    return None


def _adopt(path):
    """Write the manifest of a checkpoint that was copied without it; returns what is wrong with the file, or None."""
    try:
        content = read_checkpoint(path)
    except UserError as error:
        return f"it has no manifest ({manifest_path(path).name}), and {error}"
    step = content.get("step")
    if step != int(path.stem) or "stepper" not in content:
        return f"it has no manifest ({manifest_path(path).name}) and is none that a run could go on from; see --ckpt_path"
    say(f"checkpoint {path} has no manifest; it was read completely, is whole, and gets one")
    _write_manifest(path, path.stat().st_size, file_sha256(path), step)
    return None


def _steps_in(folder):
    """Checkpoint files in order of their steps."""
    return sorted((path for path in Path(folder).glob("*.pt") if path.stem.isdigit()), key=lambda path: int(path.stem))


class CheckpointWriter:
    """Writes a run's checkpoints in the background. Only rank 0 gives it some.

    keep_last: newest checkpoints kept (0: all). keep_every: those at multiples of this step are kept for ever (0: none).
    """

    def __init__(self, folder, keep_last=3, keep_every=0):
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self.pool, self.written = ThreadPoolExecutor(1, "checkpoint"), None
        self.block, self.release = np.empty(0, np.uint8), lambda: None

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
        self.written = self.pool.submit(self._write, step, self._copy_to_host(state))

    def wait(self):
        """Wait until the last `save` is on disk. True if it is (or there was none), False if it failed, which was said."""
        return self.written is None or self.written.result()

    def _copy_to_host(self, state):
        """The same containers with every tensor copied into one block of host memory, which the next save uses again."""
        tensors = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]
        ends = list(itertools.accumulate((tensor.nbytes // ALIGNMENT + 1) * ALIGNMENT for tensor in tensors))
        if ends and len(self.block) < ends[-1]:
            self._grow_block(ends[-1], tensors[0].is_cuda)
        starts = iter([0, *ends])

        def copy(tensor):
            start = next(starts)
            if not tensor.nbytes:
                return tensor.cpu()  # an empty slice begins where the block begins
            place = torch.from_numpy(self.block[start:start + tensor.nbytes])  # a storage of its own: torch.save writes whole storages
            return place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

        copies = pytree.tree_map_only(torch.Tensor, copy, state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _grow_block(self, num_bytes, pinned):
        """Make another block. torch's pinned memory would round it up to a power of two, so CUDA is told of memory of ours."""
        self.release()
        self.block = torch.empty(num_bytes, dtype=torch.uint8).numpy()
        if pinned:
            cuda, address = torch.cuda.cudart(), self.block.ctypes.data
            torch.cuda.check_error(cuda.cudaHostRegister(address, num_bytes, 0))
            self.release = weakref.finalize(self, cuda.cudaHostUnregister, address)

    def _write(self, step, state):
        path, written = self.folder / f"{step:07d}.pt", False
        try:
            write_checkpoint(path, state)
            written = True
            self._delete_old(step)
        except Exception as error:  # nobody above a thread would say it
            reason = "the disk is full" if getattr(error, "errno", None) == errno.ENOSPC else first_line(error)
            what = f"checkpoints older than {path} were not deleted" if written else f"{path} was not written"
            say(f"WARNING: {what}: {reason}; the earlier checkpoints in {self.folder} are whole")
        return written

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
    """Write a .pt and its manifest."""
    with write_whole(path) as temporary:
        with open(temporary, "wb") as stream:
            hashing = _HashingStream(stream)
            try:
                torch.save(state, hashing)
            except RuntimeError as error:  # PyTorch's writer raises one of its own above the disk's
                raise error.__context__ or error
        _write_manifest(path, temporary.stat().st_size, hashing.digest.hexdigest(), state.get("step"))


def _write_manifest(path, size, sha256, step):
    manifest = {"file": path.name, "size": size, "sha256": sha256, "step": step, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with write_whole(manifest_path(path)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))


class _HashingStream:
    """A write-only stream that hashes what passes through it."""

    def __init__(self, stream):
        self.stream, self.flush, self.digest = stream, stream.flush, hashlib.sha256()

    def write(self, data):
        self.digest.update(data)
        return self.stream.write(data)
