"""Stored latents, the project's own format: sharded, memory-mapped VAE moments, integer labels and a manifest.

    DIR/manifest.json         written last: without it the set is not complete
    DIR/moments-00000.npy     (n, 2C, H, W) float16 or float32, mean then log-variance, of the first shard
    DIR/mirrored-00000.npy    the same of the mirrored images, in sets that have them
    DIR/labels-00000.npy      (n,) int64 class indices
    DIR/.partial/             plan, records of finished shards, files being written; gone once the set is complete

`python -m dataset.store DIR [--verify]` says what a set holds and checks its checksums.
"""

import argparse
import hashlib
import io
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dataset.base import LatentSet, check_not_cut
from utils.cli import UserError, run

FORMAT, VERSION = "maskdit-latents", 1
MANIFEST, PARTIAL, PLAN = "manifest.json", ".partial", "plan.json"
DTYPES = ("float16", "float32")
SHARD_SIZE = 4096  # samples: 64 MiB of float16 moments at 256 px, and the most that an interruption costs


@dataclass(frozen=True)
class Plan:
    """Everything that decides the content of a set; two writers with equal plans write equal bytes.

    num_images: without mirrored copies and counting bad ones. made_by: the writer's own settings, JSON values by name.
    """

    num_images: int
    sample_shape: tuple
    dtype: str
    mirrored: bool
    num_classes: int
    class_names: tuple
    scale: float
    shift: float
    vae: str
    shard_size: int = SHARD_SIZE
    made_by: dict = field(default_factory=dict)

    @property
    def num_shards(self):
        return -(-self.num_images // self.shard_size)

    def shard_range(self, shard):
        """Image indices of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))


class LatentWriter:
    """Writes a set shard by shard, in any order and from several processes; a killed writer goes on with the next shard.

    With several processes, one constructs its writer before the others do, and one calls `finish` when all are done.
    Raises ValueError if `path` holds anything but a set, finished or not, with the same plan.
    """

    def __init__(self, path, plan):
        self.path, self.plan = Path(path), plan
        self.partial = self.path / PARTIAL
        _check_plan(plan)
        self.complete = (self.path / MANIFEST).is_file()
        if self.complete:
            manifest = read_manifest(self.path)
            manifest["num_images"] += len(manifest["skipped"])
            _compare_plans(self.path, manifest, plan)
        elif any(self.partial.glob("shard-*.json")):
            _compare_plans(self.path, json.loads((self.partial / PLAN).read_text()), plan)
        else:
            self._begin()

    def _begin(self):
        others = [entry.name for entry in self.path.iterdir() if entry.name != PARTIAL] if self.path.is_dir() else []
        if any(not _is_shard_file(name) for name in others) or (others and not self.partial.is_dir()):
            raise UserError(f"{self.path} is not empty ({sorted(others)[0]}) and no set of latents; choose another folder")
        self.partial.mkdir(parents=True, exist_ok=True)
        _write_file(self.partial / PLAN, self.partial, _json_bytes(asdict(self.plan)))

    def pending(self):
        """Shards not yet written, in order."""
        if self.complete:
            return []
        return [shard for shard in range(self.plan.num_shards) if not self._record_file(shard).is_file()]

    def write(self, shard, moments, labels, mirrored=None, skipped=()):
        """Store a shard: moments (n, 2C, H, W), labels (n,), mirrored as moments or None; skipped: names of images left out.

        Raises ValueError for a wrong shape, for values that are not finite in the stored type, for labels out of range.
        """
        if (mirrored is not None) != self.plan.mirrored:
            raise UserError(f"shard {shard}: mirrored copies {'given' if mirrored is not None else 'missing'}, "
                            f"the plan says mirrored={self.plan.mirrored}")
        files = {}
        for kind, array in (("moments", moments), ("mirrored", mirrored)):
            if array is not None:
                files[f"{kind}-{shard:05d}.npy"] = self._checked_moments(shard, kind, array, len(labels))
        files[f"labels-{shard:05d}.npy"] = self._checked_labels(shard, labels)
        if len(labels) + len(skipped) != len(self.plan.shard_range(shard)):
            raise UserError(f"shard {shard}: {len(labels)} samples and {len(skipped)} skipped, "
                            f"wanted {len(self.plan.shard_range(shard))} together")
        record = {"count": len(labels), "files": {}, "skipped": list(skipped)}
        for name, array in files.items():
            data = _npy_bytes(array)
            _write_file(self.path / name, self.partial, data)
            record["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _write_file(self._record_file(shard), self.partial, _json_bytes(record))

    def finish(self):
        """Write the manifest, which makes the set complete. Returns it. Raises ValueError if shards are missing."""
        if self.complete:
            shutil.rmtree(self.partial, ignore_errors=True)  # a kill between manifest and tidying leaves it
            return read_manifest(self.path)
        if self.pending():
            raise UserError(f"{self.path} still lacks shards {self.pending()[:8]} of {self.plan.num_shards}")
        records = [json.loads(self._record_file(shard).read_text()) for shard in range(self.plan.num_shards)]
        manifest = {"format": FORMAT, "version": VERSION, **asdict(self.plan)}
        manifest["num_images"] = sum(record["count"] for record in records)
        manifest["skipped"] = [name for record in records for name in record.pop("skipped")]
        manifest["shards"] = records
        if not manifest["num_images"]:
            raise UserError(f"{self.path}: every image was skipped, nothing to store")
        _write_file(self.path / MANIFEST, self.partial, _json_bytes(manifest))
        self.complete = True
        shutil.rmtree(self.partial)
        return manifest

    def _record_file(self, shard):
        return self.partial / f"shard-{shard:05d}.json"

    def _checked_moments(self, shard, kind, array, count):
        wanted = (count, *self.plan.sample_shape)
        if array.shape != wanted:
            raise UserError(f"shard {shard}: {kind} of shape {array.shape}, wanted {wanted}")
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, self.plan.dtype)
        finite = np.isfinite(array).all((1, 2, 3))
        if not finite.all():
            raise UserError(f"shard {shard}: {kind} of sample {int(np.flatnonzero(~finite)[0])} not finite as "
                            f"{self.plan.dtype}; is the VAE the right one? float32 storage takes larger values")
        return array

    def _checked_labels(self, shard, labels):
        labels = np.ascontiguousarray(labels, np.int64)
        top = max(self.plan.num_classes - 1, 0)
        if len(labels) and not 0 <= labels.min() <= labels.max() <= top:
            raise UserError(f"shard {shard}: labels {labels.min()}..{labels.max()}, wanted 0..{top}")
        return labels


class StoredLatents(LatentSet):
    """Reads a complete set. Opening checks that every file is there with its size; `verify` checks the content.

    xflip: count the mirrored copies too, where the set has them.
    Raises ValueError naming the file, what was found and what the manifest wants.
    """

    def __init__(self, path, xflip=False):
        self.path, self.name = Path(path), str(path)
        self.manifest = read_manifest(self.path)
        for key in ("num_images", "num_classes", "scale", "shift", "vae"):
            setattr(self, key, self.manifest[key])
        self.sample_shape = tuple(self.manifest["sample_shape"])
        self.dtype = np.dtype(self.manifest["dtype"])
        self.class_names = list(self.manifest["class_names"])
        self.mirrored = xflip and self.manifest["mirrored"]
        counts = [shard["count"] for shard in self.manifest["shards"]]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._check_sizes()
        self._maps = {}
        self._labels = None

    def __getstate__(self):
        return {**self.__dict__, "_maps": {}}  # a memory map would be pickled as all of its data

    def verify(self):
        """Compare every file's SHA-256 with the manifest; ValueError names the first that differs."""
        for name, entry in self._files():
            with open(self.path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry["sha256"]:
                raise UserError(f"{self.path / name}: sha256 {found}, the manifest wants {entry['sha256']}; "
                                f"restore the file or make the set again")

    def _files(self):
        return [item for shard in self.manifest["shards"] for item in shard["files"].items()]

    def _check_sizes(self):
        for name, entry in self._files():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != entry["bytes"]:
                raise UserError(f"{file}: {'missing' if found is None else f'{found} bytes'}, "
                                f"the manifest wants {entry['bytes']} bytes; restore the file or make the set again")

    def _read_samples(self, indices, out):
        images = indices % self.num_images
        shards = np.searchsorted(self._ends, images, side="right")
        places = (images - self._starts[shards]).tolist()
        files = (shards + indices // self.num_images * len(self._ends)).tolist()  # the mirrored shards count after the others
        one_of_each = dict(zip(files, indices.tolist()))
        maps = {file: self._map(file, index) for file, index in one_of_each.items()}
        rows = out.reshape(len(out), math.prod(self.sample_shape))
        for row, file, place in zip(rows, files, places):
            row[:] = maps[file][place]

    def _map(self, file, index):
        """A shard of moments (or, from number num_shards on, of mirrored moments) as rows (n, 2C*H*W) of its mapped file.

        index: a sample in it, for messages.
        """
        kind, shard = divmod(file, len(self._ends))
        name = f"{('moments', 'mirrored')[kind]}-{shard:05d}.npy"
        check_not_cut(f"{self.path}/{name}", self.manifest["shards"][shard]["files"][name]["bytes"], index)
        rows = self._maps.get(name)
        if rows is None:
            shape = (self.manifest["shards"][shard]["count"], *self.sample_shape)
            rows = np.asarray(_mapped(self.path / name, shape, self.dtype)).reshape(shape[0], math.prod(self.sample_shape))
            self._maps[name] = rows
        return rows

    def _read_labels(self, image_indices):
        if self._labels is None:
            shards = enumerate(self.manifest["shards"])
            self._labels = np.concatenate([_mapped(self.path / f"labels-{i:05d}.npy", (shard["count"],), np.dtype(np.int64))
                                           for i, shard in shards])
        return self._labels[image_indices]


def read_manifest(path):
    """The manifest of the set in the folder `path` as a dict. Raises ValueError if it is missing or not ours."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        reason = "its writer was interrupted: run the same command again" if (Path(path) / PARTIAL).is_dir() else "not a set"
        raise UserError(f"{file} is missing ({reason})")
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); restore it or make the set again") from error
    kind = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if kind != (FORMAT, VERSION):
        raise UserError(f"{file} is of format and version {kind}, wanted {(FORMAT, VERSION)}")
    return manifest


def _mapped(file, shape, dtype):
    """Memory-map a .npy file. Raises ValueError if its header says another shape or type."""
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or array.dtype != dtype:
        raise UserError(f"{file}: {array.dtype} of shape {array.shape}, the manifest wants {dtype} of shape {shape}")
    return array


def _check_plan(plan):
    if plan.dtype not in DTYPES:
        raise UserError(f"dtype={plan.dtype!r} is unknown; wanted one of {', '.join(DTYPES)}")
    if plan.num_images < 1 or plan.shard_size < 1:
        raise UserError(f"num_images={plan.num_images} and shard_size={plan.shard_size} must be at least 1")
    if plan.class_names and len(plan.class_names) != plan.num_classes:
        raise UserError(f"{len(plan.class_names)} class names for num_classes={plan.num_classes}")


def _compare_plans(path, found, plan):
    """found: dict with the keys of a plan, as read from JSON."""
    wanted = json.loads(json.dumps(asdict(plan)))  # tuples become lists, as in `found`
    for old, new in ((found, wanted), (found["made_by"], wanted["made_by"])):
        for key in new:
            if key != "made_by" and old.get(key) != new[key]:
                raise UserError(f"{path} was made with {key}={_short(old.get(key))}, now {key}={_short(new[key])}; "
                                f"use the same settings, or choose another folder")
    if found["made_by"].keys() != wanted["made_by"].keys():
        raise UserError(f"{path} was made by another program ({', '.join(found['made_by'])}); choose another folder")


def _short(value):
    text = json.dumps(value)
    return text if len(text) < 100 else text[:100] + "..."


def _is_shard_file(name):
    return name.endswith(".npy") and name.startswith(("moments-", "mirrored-", "labels-"))


def _json_bytes(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def _npy_bytes(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getbuffer()


def _write_file(file, partial, data):
    """Write `data` under a temporary name in `partial`, force it to disk, then rename: `file` is whole or absent."""
    temporary = partial / f"{file.name}.{os.getpid()}.tmp"
    with open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut before anything relies on it
    finally:
        os.close(folder)


def main():
    parser = argparse.ArgumentParser(description="Say what a set of stored latents holds; check it with --verify.")
    parser.add_argument("path", help="folder of the set")
    parser.add_argument("--verify", action="store_true", help="compare every file's checksum with the manifest")
    args = parser.parse_args()
    latents = StoredLatents(args.path)
    info = latents.manifest
    print(f"{args.path}: {info['num_images']} images{' and their mirrored copies' if info['mirrored'] else ''}, "
          f"{info['num_classes']} classes, moments {tuple(info['sample_shape'])} {info['dtype']}, "
          f"scale {info['scale']}, shift {info['shift']}, VAE {info['vae']}, {len(info['skipped'])} images skipped")
    if args.verify:
        latents.verify()
        print(f"{len(info['shards'])} shards: every checksum is right")


if __name__ == "__main__":
    run(main)
