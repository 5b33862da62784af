"""Stored latents in the project's own format: memory-mapped shards of VAE moments, integer labels and a manifest.

    DIR/manifest.json         written last: without it the set is not complete
    DIR/moments-00000.npy     (n, 2C, H, W) float16 or float32, mean then log-variance, of the first shard
    DIR/mirrored-00000.npy    the same of the mirrored images, in sets that have them
    DIR/labels-00000.npy      (n,) int64 class indices
    DIR/.partial/             plan and records of finished shards; gone once the set is complete

`python3 -m dataset.store DIR` says what a set holds and checks its checksums.
"""

import argparse
import hashlib
import io
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from dataset.base import LatentSet, check_not_cut, per_channel, reading
from utils.cli import UserError, run
from utils.files import make_folder, told, write_whole

FORMAT, VERSION = "maskdit-latents", 1
MANIFEST, PARTIAL, PLAN = "manifest.json", ".partial", "plan.json"
DTYPES = ("float16", "float32")
SHARD_SIZE = 4096  # samples: 64 MiB of float16 moments at 256 px, and the most that an interruption costs
NPY_HEADER = 4096  # bytes; no .npy file here has a longer one


@dataclass(frozen=True)
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
    class_names: tuple
    scale: float | list
    shift: float | list
    vae: str
    shard_size: int = SHARD_SIZE
    made_by: dict = field(default_factory=dict)
    vae_digest: str = ""

    def __post_init__(self):
        def check(fits, key, wanted):
            if not fits:
                raise UserError(f"{key}={_short(getattr(self, key))}, wanted {wanted}")

        object.__setattr__(self, "sample_shape", tuple(self.sample_shape))  # a list in JSON
        for key, least in (("num_images", 1), ("shard_size", 1), ("num_classes", 0)):
            check(type(getattr(self, key)) is int and getattr(self, key) >= least, key, f"a whole number from {least}")
        shape = self.sample_shape
        check(len(shape) == 3 and all(type(n) is int and n > 0 for n in shape) and shape[0] % 2 == 0, "sample_shape", "[2C, H, W]")
        check(self.dtype in DTYPES, "dtype", " or ".join(DTYPES))
        check(type(self.mirrored) is bool, "mirrored", "true or false")
        check(len(self.class_names) in (0, self.num_classes), "class_names", f"{self.num_classes} names or none")
        for key in ("scale", "shift"):
            per_channel(key, getattr(self, key), shape[0] // 2)

    @property
    def num_shards(self):
        return -(-self.num_images // self.shard_size)

    def shard_range(self, shard):
        """Image indices of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def arrays(self, count):
        """{kind: (shape, dtype)} of the arrays of a shard with `count` samples."""
        moments = ((count, *self.sample_shape), np.dtype(self.dtype))
        return {"moments": moments, **({"mirrored": moments} if self.mirrored else {}), "labels": ((count,), np.dtype(np.int64))}

    def settings(self):
        """All values by name, those of made_by among them, as JSON gives them back."""
        values = json.loads(json.dumps(asdict(self)))
        made_by = values.pop("made_by")
        return values | made_by


class LatentWriter:
    """Writes a set shard by shard, in any order and from several processes; a killed writer goes on with the next shard.

    With several processes, one constructs its writer before the others do, and one calls `finish` when all are done.
    Raises UserError if `path` cannot be written, or holds anything but a set, finished or not, with the same plan.
    """

    def __init__(self, path, plan):
        self.path, self.plan = Path(path), plan
        self.partial = self.path / PARTIAL
        with told(self.path):
            self.complete = (self.path / MANIFEST).is_file()
            if self.complete:
                manifest, found = read_manifest(self.path)
                self._compare(replace(found, num_images=found.num_images + len(manifest["skipped"])))
            elif any(self.partial.glob("shard-*.json")):
                self._compare(Plan(**json.loads((self.partial / PLAN).read_text())))
            else:
                found = sorted(os.listdir(self.path)) if self.path.is_dir() else []
                if found and PARTIAL not in found:
                    raise UserError(f"{self.path} is not empty ({found[0]}) and no set of latents; choose another folder")
                make_folder(self.path, "the destination")
                self.partial.mkdir(exist_ok=True)
                _write_json(self.partial / PLAN, asdict(plan))

    def _compare(self, found):
        """Raise UserError unless the plan of what is there is the writer's."""
        found, wanted = found.settings(), self.plan.settings()
        for key in (*wanted, *found):
            if found.get(key) != wanted.get(key):
                raise UserError(f"{self.path} was made with {key}={_short(found.get(key))}, now {key}={_short(wanted.get(key))}; "
                                f"use the same settings, or choose another folder")

    def pending(self):
        """Shards not yet written, in order."""
        if self.complete:
            return []
        return [shard for shard in range(self.plan.num_shards) if not self._record_file(shard).is_file()]

    def write(self, shard, moments, labels, mirrored=None, skipped=()):
        """Store a shard: moments (n, 2C, H, W), labels (n,), mirrored as moments or None; skipped: names of images left out.

        Raises UserError for values that are not finite in the stored type, ValueError for what does not fit the plan.
        """
        wanted = self.plan.arrays(len(self.plan.shard_range(shard)) - len(skipped))
        given = {"moments": moments, "mirrored": mirrored, "labels": labels}
        shapes = {kind: np.shape(array) for kind, array in given.items() if array is not None}
        if shapes != {kind: shape for kind, (shape, _) in wanted.items()}:
            raise ValueError(f"shard {shard} of shapes {shapes} and {len(skipped)} skipped, wanted {wanted}")
        if len(labels) and not 0 <= np.min(labels) <= np.max(labels) <= max(self.plan.num_classes - 1, 0):
            raise ValueError(f"shard {shard}: labels {np.min(labels)}..{np.max(labels)} for {self.plan.num_classes} classes")
        record = {"count": len(labels), "files": {}, "skipped": list(skipped)}
        with np.errstate(over="ignore"):
            arrays = {kind: np.ascontiguousarray(given[kind], dtype) for kind, (_, dtype) in wanted.items()}
        for kind, array in arrays.items():
            if not np.isfinite(array).all():
                raise UserError(f"shard {shard}: {kind} not finite as {array.dtype}; is the VAE the right one? "
                                f"float32 storage takes larger values")
        for kind, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            data, name = buffer.getbuffer(), _file_name(kind, shard)
            _write_file(self.path / name, data)
            record["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _write_json(self._record_file(shard), record)

    def finish(self):
        """Write the manifest, which makes the set complete. Returns it. Raises UserError if shards are missing."""
        if self.complete:
            shutil.rmtree(self.partial, ignore_errors=True)  # a kill between manifest and tidying leaves it
            return read_manifest(self.path)[0]
        if self.pending():
            raise UserError(f"{self.path} still lacks shards {self.pending()[:8]} of {self.plan.num_shards}; run the same command again")
        records = [json.loads(self._record_file(shard).read_text()) for shard in range(self.plan.num_shards)]
        manifest = {"format": FORMAT, "version": VERSION, **asdict(self.plan)}
        manifest["num_images"] = sum(record["count"] for record in records)
        manifest["skipped"] = [name for record in records for name in record.pop("skipped")]
        manifest["shards"] = records
        if not manifest["num_images"]:
            raise UserError(f"{self.path}: every image was skipped, nothing to store")
        for left_over in self.path.glob("*.tmp"):  # by a writer that was killed
            left_over.unlink()
        _write_json(self.path / MANIFEST, manifest)
        self.complete = True
        shutil.rmtree(self.partial)
        return manifest

    def _record_file(self, shard):
        return self.partial / f"shard-{shard:05d}.json"


class StoredLatents(LatentSet):
    """Reads a complete set. Opening checks the manifest, and that every file is there with its size; `verify` checks the content.

    Raises UserError naming the file, what was found and what the manifest wants.
    """

    says_scale = True

    def __init__(self, path):
        self.path, self.name = Path(path), str(path)
        self.manifest, self.plan = read_manifest(path)
        for key in ("num_images", "sample_shape", "num_classes", "scale", "shift", "vae", "vae_digest"):
            setattr(self, key, getattr(self.plan, key))
        self.dtype, self.class_names, self.holds_mirrored = np.dtype(self.plan.dtype), list(self.plan.class_names), self.plan.mirrored
        self._counts = [shard["count"] for shard in self.manifest["shards"]]
        self._ends = np.cumsum(self._counts)
        self._starts = self._ends - self._counts
        for name, entry in self._files().items():
            check_not_cut(self.path / name, entry["bytes"])
        self._maps = {}
        self.labels = np.concatenate([self._map("labels", shard) for shard in range(len(self._counts))])

    def __getstate__(self):
        return {**self.__dict__, "_maps": {}}  # a memory map would be pickled as all of its data

    def verify(self):
        """Compare every file's SHA-256 with the manifest. Raises UserError that names the first to differ."""
        for name, entry in self._files().items():
            with open(self.path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry["sha256"]:
                raise UserError(f"{self.path / name}: sha256 {found}, the manifest wants {entry['sha256']}; "
                                f"restore the file or make the set again")

    def _files(self):
        return {name: entry for shard in self.manifest["shards"] for name, entry in shard["files"].items()}

    def _read_samples(self, indices, out):
        images = indices % self.num_images
        shards = np.searchsorted(self._ends, images, side="right")
        places = (images - self._starts[shards]).tolist()
        files = (shards + indices // self.num_images * len(self._ends)).tolist()  # the mirrored shards count after the others
        maps = {}
        for file in set(files):
            mirrored, shard = divmod(file, len(self._ends))
            maps[file] = self._map("mirrored" if mirrored else "moments", shard)
        for row, file, place in zip(out, files, places):
            row[:] = maps[file][place]

    def _map(self, kind, shard):
        """An array of a shard, memory-mapped. Raises UserError if the file is cut or its header is not as the manifest says."""
        name = _file_name(kind, shard)
        check_not_cut(f"{self.path}/{name}", self.manifest["shards"][shard]["files"][name]["bytes"])
        if name not in self._maps:
            with reading(self.path / name):
                array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
            wanted = self.plan.arrays(self._counts[shard])[kind]
            if (array.shape, array.dtype) != wanted:
                raise UserError(f"{self.path / name}: {array.dtype} of shape {array.shape}, the manifest wants {wanted}")
            self._maps[name] = np.asarray(array)  # still the mapped memory; plain arrays are faster to index than np.memmap
        return self._maps[name]


def read_manifest(path):
    """The manifest of the set in the folder `path`, a dict, and its `Plan`. Raises UserError if it is missing or impossible."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        reason = "its writer was interrupted: run the same command again" if (Path(path) / PARTIAL).is_dir() else "not a set"
        raise UserError(f"{file} is missing ({reason})")
    try:
        manifest = json.loads(file.read_text())
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise UserError(f"its format and version are not {FORMAT} {VERSION}")
        plan = Plan(**{key.name: manifest[key.name] for key in fields(Plan) if key.name in manifest})
        _check_shards(plan, manifest["shards"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a key is missing, or a list where a number is due
        reason = error if isinstance(error, UserError) else repr(error)
        raise UserError(f"{file} is damaged: {reason}; restore the file or make the set again") from error
    return manifest, plan


def _check_shards(plan, shards):
    """Raise UserError, or what a wrong structure leads to, unless the shards add up to the plan and their files to the shards.

    The files' sizes are checked too, so no number in a manifest makes a reader ask for more memory than there is data.
    """
    for number, shard in enumerate(shards):
        found = {name: entry["bytes"] for name, entry in shard["files"].items()}
        least = {_file_name(kind, number): math.prod(shape) * dtype.itemsize
                 for kind, (shape, dtype) in plan.arrays(shard["count"]).items()}
        if found.keys() != least.keys() or not all(0 < found[name] - least[name] <= NPY_HEADER for name in least):
            raise UserError(f"shard {number} counts {_short(shard['count'])} samples, which its files {_short(found)} do not fit")
    if plan.num_images != sum(shard["count"] for shard in shards):
        raise UserError(f"num_images={plan.num_images}, wanted the sum of the shards' counts")


def _file_name(kind, shard):
    return f"{kind}-{shard:05d}.npy"


def _short(value):
    text = json.dumps(value)
    return text if len(text) < 100 else text[:100] + "..."


def _write_json(file, value):
    _write_file(file, (json.dumps(value, indent=1) + "\n").encode())


def _write_file(file, data):
    with told(file), write_whole(file) as temporary:
        temporary.write_bytes(data)


def main():
    parser = argparse.ArgumentParser(description="Say what a set of stored latents holds, and compare every file with its checksum.")
    parser.add_argument("path", help="folder of the set")
    latents = StoredLatents(parser.parse_args().path)
    print(f"{latents.name}: {latents.plan}, {len(latents.manifest['skipped'])} images skipped")
    latents.verify()
    print(f"{len(latents.manifest['shards'])} shards: every checksum is right")


if __name__ == "__main__":
    run(main)
