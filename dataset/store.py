"""Stored latents in the project's own format: memory-mapped shards of VAE moments, integer labels and a manifest.

    DIR/manifest.json         written last: without it the set is not complete
    DIR/moments-00000.npy     (n, 2C, H, W) float16 or float32, mean then log-variance, of the first shard
    DIR/mirrored-00000.npy    the same of the mirrored images, in sets that have them
    DIR/labels-00000.npy      (n,) int64 class indices
    DIR/.partial/             plan and records of finished shards; gone once the set is complete

`python3 -m dataset.store DIR` says what a set holds and checks its checksums.
"""

import argparse
import functools
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from reprlib import repr as short

import numpy as np

from dataset.base import LatentSet, PerProcess, check_not_cut, locate, per_channel
from utils.cli import UserError, run
from utils.files import file_sha256, make_folder, told, write_whole

FORMAT, VERSION = "maskdit-latents", 1
MANIFEST, PARTIAL, PLAN = "manifest.json", ".partial", "plan.json"


@dataclass
class Plan:
    """Everything that decides the content of a set: two writers with equal plans write equal bytes.

    num_images: without mirrored copies, and counting bad ones. made_by: the writer's own settings, JSON values by name.
    The other fields are those of `LatentSet`.
    """

    num_images: int
    sample_shape: tuple
    dtype: str
    mirrored: bool
    num_classes: int
    class_names: list
    scale: float | list
    shift: float | list
    vae: str
    shard_size: int = 4096  # 64 MiB of float16 moments at 256 px, and the most that an interruption costs
    made_by: dict = field(default_factory=dict)
    vae_digest: str = ""

    def __post_init__(self):
        def check(key, fits, wanted):
            if not fits:
                raise UserError(f"{key}={short(getattr(self, key))}, wanted {wanted}")

        self.sample_shape, self.class_names = tuple(self.sample_shape), list(self.class_names)  # JSON has no tuples
        for key, least in (("num_images", 1), ("shard_size", 1), ("num_classes", 0)):
            check(key, type(getattr(self, key)) is int and getattr(self, key) >= least, f"a whole number from {least}")
        shape = self.sample_shape
        check("sample_shape", len(shape) == 3 and all(type(n) is int and n > 0 for n in shape) and shape[0] % 2 == 0, "[2C, H, W]")
        check("dtype", self.dtype in ("float16", "float32"), "float16 or float32")
        check("mirrored", type(self.mirrored) is bool, "true or false")
        check("class_names", len(self.class_names) in (0, self.num_classes), f"{self.num_classes} names or none")
        self.scale, self.shift = (per_channel(key, getattr(self, key), shape[0] // 2) for key in ("scale", "shift"))

    @property
    def shards(self):
        """The image numbers of each shard, ranges."""
        images = range(self.num_images)
        return [images[begin:begin + self.shard_size] for begin in images[::self.shard_size]]

    def arrays(self, shard, count):
        """{kind: (file name, shape, dtype)} of the arrays of a shard with `count` samples."""
        moments = (count, *self.sample_shape), np.dtype(self.dtype)
        arrays = {"moments": moments, **({"mirrored": moments} if self.mirrored else {}), "labels": ((count,), np.dtype(np.int64))}
        return {kind: (f"{kind}-{shard:05d}.npy", *array) for kind, array in arrays.items()}


class LatentWriter:
    """Writes a set shard by shard, in any order and from several processes; a killed writer goes on with the next shard.

    With several processes, one constructs its writer before the others do, and one calls `finish` when all are done.
    Raises UserError if `path` cannot be written, or holds anything but a set, finished or not, with the same plan.
    """

    def __init__(self, path, plan):
        self.path, self.plan, self.partial = Path(path), plan, Path(path) / PARTIAL
        with told(self.path):
            if self.complete:
                there = StoredLatents(self.path)
                self._compare(replace(there.plan, num_images=there.num_images + len(there.manifest["skipped"])))
            elif any(self.partial.glob("shard-*.json")):
                self._compare(Plan(**json.loads((self.partial / PLAN).read_text())))
            else:
                found = sorted(os.listdir(self.path)) if self.path.is_dir() else []
                if found and PARTIAL not in found:
                    raise UserError(f"{self.path} is not empty ({found[0]}) and no set of latents; choose another folder")
                make_folder(self.path, "the destination")
                self.partial.mkdir(exist_ok=True)
                _write_json(self.partial / PLAN, asdict(plan))

    @property
    def complete(self):
        return (self.path / MANIFEST).is_file()

    def _compare(self, plan):
        """Raise UserError unless the plan of what is there is the writer's."""
        found, wanted = ({**vars(each), **each.made_by, "made_by": None} for each in (plan, self.plan))
        for key in (*wanted, *found):
            if found.get(key) != wanted.get(key):
                raise UserError(f"{self.path} was made with {key}={short(found.get(key))}, now {key}={short(wanted.get(key))}; "
                                f"use the same settings, or choose another folder")

    def pending(self):
        """Shards not yet written, in order."""
        return [] if self.complete else [shard for shard in range(len(self.plan.shards)) if not self._record(shard).is_file()]

    def write(self, shard, moments, labels, mirrored=None, skipped=()):
        """Store a shard: moments (n, 2C, H, W), labels (n,), mirrored as moments or None; skipped: names of images left out.

        Raises UserError for values that are not finite in the stored type, ValueError for what does not fit the plan.
        """
        wanted = self.plan.arrays(shard, len(self.plan.shards[shard]) - len(skipped))
        given = {"moments": moments, "mirrored": mirrored, "labels": labels}
        shapes = {kind: np.shape(array) for kind, array in given.items() if array is not None}
        if shapes != {kind: shape for kind, (_, shape, _) in wanted.items()}:
            raise ValueError(f"shard {shard} of shapes {shapes} and {len(skipped)} skipped, wanted {wanted}")
        with np.errstate(over="ignore"):
            arrays = {name: np.ascontiguousarray(given[kind], dtype) for kind, (name, _, dtype) in wanted.items()}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise UserError(f"{name} would not be finite as {array.dtype}; is the VAE the right one? "
                                f"float32 storage takes larger values")
        record = {"count": len(labels), "files": {}, "skipped": list(skipped)}
        for name, array in arrays.items():
            with told(self.path / name), write_whole(self.path / name) as temporary:
                with open(temporary, "wb") as stream:  # np.save adds .npy to a name
                    np.save(stream, array, allow_pickle=False)
                record["files"][name] = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
        _write_json(self._record(shard), record)

    def finish(self):
        """Write the manifest, which makes the set complete. Returns it. Raises UserError if shards are missing."""
        num_shards, pending = len(self.plan.shards), self.pending()
        if pending:
            raise UserError(f"{self.path} still lacks shards {pending[:8]} of {num_shards}; run the same command again")
        if not self.complete:
            records = [json.loads(self._record(shard).read_text()) for shard in range(num_shards)]
            manifest = {"format": FORMAT, "version": VERSION, **asdict(self.plan)}
            manifest["num_images"] = sum(record["count"] for record in records)
            manifest["skipped"] = [name for record in records for name in record.pop("skipped")]
            manifest["shards"] = records
            if not manifest["num_images"]:
                raise UserError(f"{self.path}: every image was skipped, nothing to store")
            for left_over in self.path.glob("*.tmp"):  # by a writer that was killed
                left_over.unlink()
            _write_json(self.path / MANIFEST, manifest)
        shutil.rmtree(self.partial, ignore_errors=True)  # a kill just before it leaves a complete set
        return StoredLatents(self.path).manifest

    def _record(self, shard):
        return self.partial / f"shard-{shard:05d}.json"


class StoredLatents(LatentSet):
    """A complete set. Opening checks the manifest, and that every file is there with its size and type."""

    says_scale = True

    def __init__(self, path):
        self.path, self.name = Path(path), str(path)
        self.manifest, self.plan, self.files = _read_manifest(self.path / MANIFEST)
        for key in ("num_images", "sample_shape", "num_classes", "class_names", "scale", "shift", "vae", "vae_digest"):
            setattr(self, key, getattr(self.plan, key))
        self.dtype, self.holds_mirrored = np.dtype(self.plan.dtype), self.plan.mirrored
        for name, size, *_ in self.files.values():
            check_not_cut(self.path / name, size)
        self._ends = list(accumulate(shard["count"] for shard in self.manifest["shards"]))
        self._mapped = PerProcess(functools.partial(np.load, mmap_mode="r"))
        self.labels = np.concatenate([self._map("labels", shard) for shard in range(len(self._ends))])
        self._mapped.handles.clear()  # of the labels: a process may open no more than some 1,000 files
        self._map("moments", 0)  # a wrong sample_shape would make `read` ask for memory first

    def _samples(self, numbers):
        arrays = {}  # each checked once a batch
        for image, mirrored in numbers:
            shard, row = locate(self._ends, image)
            key = "mirrored" if mirrored else "moments", shard
            if key not in arrays:
                arrays[key] = self._map(*key)
            yield arrays[key][row]

    def _map(self, kind, shard):
        """An array of a shard, memory-mapped. Raises UserError if its file is cut or its header not as the manifest says."""
        name, size, _, shape, dtype = self.files[kind, shard]
        file = f"{self.path}/{name}"
        check_not_cut(file, size)
        array = np.asarray(self._mapped(file))  # still the mapped memory; plain arrays are faster to index than np.memmap
        if array.shape != shape or array.dtype != dtype:
            raise UserError(f"{file}: {array.dtype} of shape {array.shape}, the manifest wants {dtype} of shape {shape}")
        return array


def _read_manifest(file):
    """(manifest, its `Plan`, {(kind, shard): (file name, bytes, sha256, shape, dtype)})."""
    if not file.is_file():
        reason = "its writer was interrupted: run the same command again" if (file.parent / PARTIAL).is_dir() else "not a set"
        raise UserError(f"{file} is missing ({reason})")
    try:
        manifest, files = json.loads(file.read_text()), {}
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise UserError(f"its format and version are not {FORMAT} {VERSION}")
        plan = Plan(**{key.name: manifest[key.name] for key in fields(Plan) if key.name in manifest})
        for number, shard in enumerate(manifest["shards"]):
            for kind, (name, *array) in plan.arrays(number, shard["count"]).items():
                files[kind, number] = (name, int(shard["files"][name]["bytes"]), shard["files"][name]["sha256"], *array)
        if plan.num_images != sum(shard["count"] for shard in manifest["shards"]):
            raise UserError(f"num_images={plan.num_images}, wanted the sum of the shards' counts")
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a key is missing, or a list where a number is due
        reason = error if isinstance(error, UserError) else repr(error)
        raise UserError(f"{file} is damaged: {reason}; restore the file or make the set again") from error
    return manifest, plan, files


def _write_json(file, value):
    with told(file), write_whole(file) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Say what a set of stored latents holds, and compare every file with its checksum.")
    parser.add_argument("path", help="folder of the set")
    latents = StoredLatents(parser.parse_args().path)
    print(f"{latents.name}: {latents.plan}, {len(latents.manifest['skipped'])} images skipped")
    for name, _, wanted, *_ in latents.files.values():
        found = file_sha256(latents.path / name)
        if found != wanted:
            raise UserError(f"{latents.path / name}: sha256 {found}, the manifest wants {wanted}; restore it or make the set again")
    print(f"{len(latents.manifest['shards'])} shards: every checksum is right")


if __name__ == "__main__":
    run(main)
