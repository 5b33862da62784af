"""Checkpoints: written whole or not at all, verified before use, never executing what a file contains.

A checkpoint is two files, NNNNNNN.pt and NNNNNNN.json (its manifest: size and sha256). The manifest is written last, so a
checkpoint without one was interrupted and is passed over. The .pt is a dict with `model`, `ema` and `opt` as in the
published files, and what an exact resume needs besides.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path

import torch

from models.layers import sincos_positions
from utils.cli import UserError
from utils.logging import say

WRAPPER_PREFIXES = ("module.", "_orig_mod.")


# ------------------------------------------------------------------------------------------------ reading

def load_checkpoint(path):
    """Read a checkpoint dict onto the CPU, ours or the published format.

    Nothing in the file is executed: only tensors, plain containers and argparse.Namespace (the published `args`) are let in.
    Raises FileNotFoundError, or ValueError saying what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    problem = damage(path)
    if problem:
        raise UserError(f"checkpoint {path} is damaged: {problem}; take another one, or download it again")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path} is refused: {_refusal(error)}") from error
    except Exception as error:  # a damaged file can fail anywhere inside the unpickler, with any class
        raise UserError(f"checkpoint {path} cannot be read ({type(error).__name__}: {_first_line(error)}); "
                        f"it is damaged or not a PyTorch file") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: wanted a dict with 'model' or 'ema', found {type(content).__name__}")
    _check_types(content, path)
    return content


def _check_types(content, path):
    wanted = {"model": dict, "ema": dict, "opt": dict, "step": int, "images_seen": int, "config": dict}
    for key, kind in wanted.items():
        if key in content and not isinstance(content[key], kind):
            raise UserError(f"checkpoint {path}: its {key!r} is a {type(content[key]).__name__}, wanted a {kind.__name__}")
    optimizer = content.get("opt", {})
    states, groups = optimizer.get("state", {}), optimizer.get("param_groups", [])
    if not (isinstance(states, dict) and all(isinstance(state, dict) for state in states.values()) and isinstance(groups, list)):
        raise UserError(f"checkpoint {path}: its 'opt' is not the state of an optimizer")


def load_weights(path, which="ema"):
    """State dict of a checkpoint under the published names (`model.x_embedder.proj.weight`, ...), wrapper prefixes removed.

    which: "ema" or "model". A file that is itself a state dict is returned as it is.
    Raises FileNotFoundError, or ValueError if the file is damaged or has no such weights.
    """
    return weights_of(load_checkpoint(path), which, path)


def weights_of(checkpoint, which, path):
    """The same for a checkpoint that is already loaded; `path` is for messages."""
    if which not in ("ema", "model"):
        raise UserError(f"which={which!r}: wanted 'ema' or 'model'")
    if any(key in checkpoint for key in ("ema", "model")):
        if which not in checkpoint:
            found = ", ".join(str(key) for key in checkpoint)
            raise UserError(f"checkpoint {path} has no {which!r} weights; it has {found}")
        checkpoint = checkpoint[which]
    tensors = {strip_prefixes(name): value for name, value in checkpoint.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors or len(tensors) != len(checkpoint):
        raise UserError(f"checkpoint {path} holds no state dict: wanted names with tensors")
    return tensors


def strip_prefixes(name):
    """'module._orig_mod.model.pos_embed' -> 'model.pos_embed': what DDP and torch.compile put before names."""
    while name.startswith(WRAPPER_PREFIXES):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return name


def steps_done(checkpoint):
    """Optimizer steps behind a checkpoint: ours say so; the published ones hold it in AdamW's state. 0 if neither does."""
    if "step" in checkpoint:
        return int(checkpoint["step"])
    states = checkpoint.get("opt", {}).get("state", {})
    return max((int(state["step"]) for state in states.values() if "step" in state), default=0)


def load_weights_into(net, weights, path, skip_mismatched=False):
    """Load a state dict into `net`. Raises ValueError listing by name what is missing, unknown or of another shape.

    skip_mismatched: say it instead, and leave those out; position tables of another grid are interpolated to this one.
    """
    own = net.state_dict()
    if skip_mismatched:
        weights = {name: _fit_positions(name, value, own, path) for name, value in weights.items()}
    fits = {name: name in own and value.shape == own[name].shape for name, value in weights.items()}
    misfits = {"missing": own.keys() - weights.keys(), "unknown": weights.keys() - own.keys(),
               "other shape": {f"{name} {tuple(weights[name].shape)}, wanted {tuple(own[name].shape)}"
                               for name in weights.keys() & own.keys() if not fits[name]}}
    problems = "; ".join(f"{kind}: {_some_of(sorted(names))}" for kind, names in misfits.items() if names)
    if problems and not skip_mismatched:
        raise UserError(f"checkpoint {path} does not fit the model; {problems}. "
                        f"Check the model section of the config, or leave these out with --skip_mismatched")
    if not any(fits.values()):
        raise UserError(f"checkpoint {path} has nothing that fits the model; {problems}")
    if problems:
        say(f"checkpoint {path}: left at fresh values or out; {problems}")
    net.load_state_dict({name: value for name, value in weights.items() if fits[name]}, strict=False)


def _fit_positions(name, value, own, path):
    """A fixed position table of another grid, made anew in units of that grid; anything else as it is."""
    if not name.endswith("pos_embed") or name not in own or value.dim() != 3 or value.shape[2] != own[name].shape[2]:
        return value
    (old, width), new = value.shape[1:], own[name].shape[1]
    old_grid, new_grid = math.isqrt(old), math.isqrt(new)
    if old == new or old_grid**2 != old or not torch.allclose(value, sincos_positions(width, old_grid), atol=1e-3):
        return value
    say(f"checkpoint {path}: {name} is interpolated from {old_grid} x {old_grid} to {new_grid} x {new_grid} patches")
    return sincos_positions(width, new_grid, unit_grid=old_grid)


def _some_of(names, count=6):
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def damage(path):
    """What is wrong with a checkpoint file, or None. With a manifest beside it the whole file is checked against it."""
    path = Path(path)
    manifest = _manifest_path(path)
    if manifest.is_file():
        try:
            wanted = json.loads(manifest.read_text())
            size, digest = int(wanted["size"]), str(wanted["sha256"])
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            return f"its manifest {manifest.name} is not readable"
        if path.stat().st_size != size:
            return f"{path.stat().st_size} bytes, its manifest says {size}"
        if file_sha256(path) != digest:
            return "its checksum differs from its manifest's"
    elif zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except Exception as error:  # zipfile raises many classes on damaged files
            return _first_line(error)
        if bad:
            return f"the record {bad} fails its CRC"
    return None


def file_sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_latest(folder):
    """Path of the newest undamaged checkpoint of a folder, or None; damaged ones are named and passed over.

    Raises ValueError if there are finished checkpoints and all are damaged: weeks of work are not silently begun anew.
    """
    damaged = []
    for path in reversed(_steps_in(folder)):
        finished = _manifest_path(path).is_file()
        problem = damage(path) if finished else "it has no manifest: its writing was interrupted"
        if problem is None:
            return path
        say(f"checkpoint {path} is passed over: {problem}")
        damaged += [path.name] if finished else []
    if damaged:
        raise UserError(f"all checkpoints in {folder} are damaged ({', '.join(damaged)}); restore one, "
                        f"or move the folder away to begin at the first step")
    return None


def _steps_in(folder):
    """Checkpoint files in order of their steps."""
    found = [path for path in Path(folder).glob("*.pt") if path.stem.isdigit()]
    return sorted(found, key=lambda path: int(path.stem))


def _manifest_path(path):
    return path.with_suffix(".json")


def _refusal(error):
    """Name the class that PyTorch's unpickler refused, from its long message."""
    named = re.search(r"(?:GLOBAL|class|global:?) ([\w]+\.[\w.]+)", str(error))
    what = f"it contains {named[1]}" if named else "its pickle is not readable"
    return f"{what}; only tensors, plain containers and argparse.Namespace are accepted, and nothing was executed"


def _first_line(error):
    return (str(error).splitlines() or ["no message"])[0]


# ------------------------------------------------------------------------------------------------ writing

class CheckpointWriter:
    """Writes one run's checkpoints in the background; only rank 0 makes one.

    folder: where the .pt and .json files go. keep_last: newest checkpoints kept (0: all). keep_every: checkpoints at
    multiples of this step are kept for ever (0: none).
    """

    def __init__(self, folder, keep_last=3, keep_every=0):
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self.thread, self.failed = None, False
        self.host_copies = {}

    def prepare(self, step, num_bytes, num_coming):
        """Make and tidy the folder of a run at `step`; raise OSError now if it cannot hold the checkpoints that are to come.

        num_coming: how many, of about num_bytes each. Old ones go as new ones come, but only when the new one is complete.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink()
            self._delete_old(step)  # the last run may have been killed before it came to that
            write_atomically(self.folder / "probe", b"0")
            (self.folder / "probe").unlink()
        except OSError as error:
            raise UserError(f"checkpoint folder {self.folder} cannot be written ({error.strerror}); "
                            f"choose another with log.results_dir") from error
        if self.keep_last:
            there = len([path for path in _steps_in(self.folder) if _manifest_path(path).is_file()])
            num_coming = min(num_coming, max(1, self.keep_last + 1 - there))
        free = shutil.disk_usage(self.folder).free
        if free < num_coming * num_bytes:
            raise UserError(f"checkpoint folder {self.folder} has {free / 1e9:.2f} GB free, but {num_coming} more checkpoint(s) of "
                            f"{num_bytes / 1e9:.2f} GB are to come; free some space, keep fewer with log.keep_last, "
                            f"or choose another place with log.results_dir")

    def save(self, step, state):
        """Copy `state` to host memory and write it as checkpoint `step` in the background; waits for the previous one first."""
        self.wait()
        snapshot = self._copy_to_host(state)
        self.thread = threading.Thread(target=self._write, args=(step, snapshot), name=f"checkpoint-{step}")
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
        return next((path for path in reversed(_steps_in(self.folder)) if _manifest_path(path).is_file()), None)

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
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self.host_copies[place] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)

    def _write(self, step, state):
        path = self.folder / f"{step:07d}.pt"
        self.failed = True
        try:
            write_checkpoint(path, state)
            self.failed = False
            self._delete_old(step)
        except Exception as error:  # nobody above a thread would say it
            reason = "the disk is full" if getattr(error, "errno", None) == errno.ENOSPC else _first_line(error)
            what = f"{path} was not written" if self.failed else f"checkpoints older than {path} were not deleted"
            say(f"WARNING: {what}: {reason}; the earlier checkpoints in {self.folder} are whole")

    def _delete_old(self, step):
        """Delete what keep_last and keep_every do not keep. Later steps than `step` (damaged, passed over) do not count.

        Files without a manifest are not touched: they may be of the published code.
        """
        if not self.keep_last:
            return
        written = sorted(int(manifest.stem) for manifest in self.folder.glob("*.json") if manifest.stem.isdigit())
        paths = [self.folder / f"{number:07d}.pt" for number in written if number <= step]
        whole = [path for path in paths if path.is_file()]
        kept = whole[-self.keep_last:] + [path for path in whole if self.keep_every and int(path.stem) % self.keep_every == 0]
        for path in paths:
            if path not in kept:
                path.unlink(missing_ok=True)  # first: without its manifest nobody would delete it any more
                _manifest_path(path).unlink()


def write_checkpoint(path, state):
    """Write a .pt and then its manifest, each to a temporary file that is flushed to disk and renamed."""
    path = Path(path)
    temporary = path.with_suffix(".pt.tmp")
    try:
        with open(temporary, "wb") as stream:
            hashing = _HashingStream(stream)
            try:
                torch.save(state, hashing)
            except RuntimeError as error:  # PyTorch's writer buries the disk's error under one of its own
                raise hashing.error or error
            _flush_to_disk(stream)
        _manifest_path(path).unlink(missing_ok=True)  # rewriting a step: the old manifest must not vouch for the new file
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    manifest = {"file": path.name, "size": path.stat().st_size, "sha256": hashing.digest.hexdigest(),
                "step": state.get("step"), "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_atomically(_manifest_path(path), json.dumps(manifest, indent=1).encode())


def write_atomically(path, content):
    """Write bytes to a temporary file beside `path`, flush them to disk, rename, and flush the folder."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        _flush_to_disk(stream)
    os.replace(temporary, path)
    _flush_folder(Path(path).parent)


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


def _flush_to_disk(stream):
    stream.flush()
    os.fsync(stream.fileno())


def _flush_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
