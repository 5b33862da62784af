"""Stored latents in the project's own format: memory-mapped shards of VAE moments, integer labels and a manifest.

    DIR/manifest.json         written last: without it the set is not complete
    DIR/moments-00000.npy     (n, 2C, H, W) float16 or float32, mean then log-variance, of the first shard
    DIR/mirrored-00000.npy    the same of the mirrored images, in sets that have them
    DIR/labels-00000.npy      (n,) int64 class indices
    DIR/.partial/             plan and records of finished shards; gone once the set is complete

`python3 -m dataset.store DIR [--verify]` says what a set holds and checks its checksums.
"""

import argparse
import hashlib
import io
import json
import math
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from dataset.base import LatentSet, check_not_cut, per_channel
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
                manifest = read_manifest(self.path)
                manifest["num_images"] += len(manifest["skipped"])
                _compare_plans(self.path, manifest, plan)
            elif any(self.partial.glob("shard-*.json")):
                _compare_plans(self.path, json.loads((self.partial / PLAN).read_text()), plan)
            else:
                self._begin()

    def _begin(self):
        others = sorted(entry.name for entry in self.path.iterdir() if entry.name != PARTIAL) if self.path.is_dir() else []
        foreign = [name for name in others if ".npy" not in name or not name.startswith(("moments-", "mirrored-", "labels-"))]
        if foreign or (others and not self.partial.is_dir()):
            raise UserError(f"{self.path} is not empty ({(foreign or others)[0]}) and no set of latents; choose another folder")
        make_folder(self.path, "the destination")
        self.partial.mkdir(exist_ok=True)
        _write_file(self.partial / PLAN, _json_bytes(asdict(self.plan)))

    def pending(self):
        """Shards not yet written, in order."""
        if self.complete:
            return []
        return [shard for shard in range(self.plan.num_shards) if not self._record_file(shard).is_file()]

    def write(self, shard, moments, labels, mirrored=None, skipped=()):
        """Store a shard: moments (n, 2C, H, W), labels (n,), mirrored as moments or None; skipped: names of images left out.

        Raises UserError for values that are not finite in the stored type, ValueError for what does not fit the plan.
        """
        if (mirrored is not None) != self.plan.mirrored:
            raise ValueError(f"shard {shard}: mirrored copies {'given' if mirrored is not None else 'missing'}, "
                             f"the plan says mirrored={self.plan.mirrored}")
        if len(labels) + len(skipped) != len(self.plan.shard_range(shard)):
            raise ValueError(f"shard {shard}: {len(labels)} samples and {len(skipped)} skipped, "
                             f"wanted {len(self.plan.shard_range(shard))} together")
        files = {}
        for kind, array in (("moments", moments), ("mirrored", mirrored)):
            if array is not None:
                files[f"{kind}-{shard:05d}.npy"] = self._checked_moments(shard, kind, array, len(labels))
        files[f"labels-{shard:05d}.npy"] = self._checked_labels(shard, labels)
        record = {"count": len(labels), "files": {}, "skipped": list(skipped)}
        for name, array in files.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            data = buffer.getbuffer()
            _write_file(self.path / name, data)
            record["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _write_file(self._record_file(shard), _json_bytes(record))

    def finish(self):
        """Write the manifest, which makes the set complete. Returns it. Raises UserError if shards are missing."""
        if self.complete:
            shutil.rmtree(self.partial, ignore_errors=True)  # a kill between manifest and tidying leaves it
            return read_manifest(self.path)
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
        _write_file(self.path / MANIFEST, _json_bytes(manifest))
        self.complete = True
        shutil.rmtree(self.partial)
        return manifest

    def _record_file(self, shard):
        return self.partial / f"shard-{shard:05d}.json"

    def _checked_moments(self, shard, kind, array, count):
        wanted = (count, *self.plan.sample_shape)
        if array.shape != wanted:
            raise ValueError(f"shard {shard}: {kind} of shape {array.shape}, wanted {wanted}")
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
            raise ValueError(f"shard {shard}: labels {labels.min()}..{labels.max()}, wanted 0..{top}")
        return labels


class StoredLatents(LatentSet):
    """Reads a complete set. Opening checks the manifest, and that every file is there with its size; `verify` checks the content.

    Raises UserError naming the file, what was found and what the manifest wants.
    """

    says_scale = True

    def __init__(self, path):
        self.path, self.name = Path(path), str(path)
        self.manifest = read_manifest(self.path)
        for key in ("num_images", "num_classes", "scale", "shift", "vae"):
            setattr(self, key, self.manifest[key])
        self.vae_digest = self.manifest.get("vae_digest", "")  # sets of older versions do not have it
        self.sample_shape = tuple(self.manifest["sample_shape"])
        self.dtype = np.dtype(self.manifest["dtype"])
        self.class_names = list(self.manifest["class_names"])
        self.holds_mirrored = self.manifest["mirrored"]
        counts = [shard["count"] for shard in self.manifest["shards"]]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        for name, entry in self._files():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != entry["bytes"]:
                raise UserError(f"{file}: {'missing' if found is None else f'{found} bytes'}, "
                                f"the manifest wants {entry['bytes']} bytes; restore the file or make the set again")
        self._maps = {}
        self._labels = None

    def __getstate__(self):
        return {**self.__dict__, "_maps": {}}  # a memory map would be pickled as all of its data

    def verify(self):
        """Compare every file's SHA-256 with the manifest. Raises UserError that names the first to differ."""
        for name, entry in self._files():
            with open(self.path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry["sha256"]:
                raise UserError(f"{self.path / name}: sha256 {found}, the manifest wants {entry['sha256']}; "
                                f"restore the file or make the set again")

    def _files(self):
        return [item for shard in self.manifest["shards"] for item in shard["files"].items()]

    def _read_samples(self, indices, out):
        images = indices % self.num_images
        shards = np.searchsorted(self._ends, images, side="right")
        places = (images - self._starts[shards]).tolist()
        files = (shards + indices // self.num_images * len(self._ends)).tolist()  # the mirrored shards count after the others
        one_of_each = dict(zip(files, indices.tolist()))
        maps = {file: self._map(file, index) for file, index in one_of_each.items()}
        for row, file, place in zip(out, files, places):
            row[:] = maps[file][place]

    def _map(self, file, index):
        """Shard number `file` of the moments, or of the mirrored moments from num_shards on. index: a sample in it, for messages."""
        kind, shard = divmod(file, len(self._ends))
        name = f"{('moments', 'mirrored')[kind]}-{shard:05d}.npy"
        check_not_cut(f"{self.path}/{name}", self.manifest["shards"][shard]["files"][name]["bytes"])
        if name not in self._maps:
            shape = (self.manifest["shards"][shard]["count"], *self.sample_shape)
            self._maps[name] = _mapped(self.path / name, shape, self.dtype)
        return self._maps[name]

    def _read_labels(self, image_indices):
        if self._labels is None:
            shards = enumerate(self.manifest["shards"])
            self._labels = np.concatenate([_mapped(self.path / f"labels-{i:05d}.npy", (shard["count"],), np.dtype(np.int64))
                                           for i, shard in shards])
        return self._labels[image_indices]


def read_manifest(path):
    """The manifest of the set in the folder `path` as a dict. Raises UserError if it is missing, not ours or impossible."""
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
    try:
        plan = Plan(**{key.name: manifest[key.name] for key in fields(Plan) if key.name in manifest})
        _check_shards(plan, manifest["shards"])
    except UserError as error:
        raise UserError(f"{file}: {error}; restore the file or make the set again") from None
    except (KeyError, TypeError, AttributeError) as error:  # a key is missing, or a list where a number is due
        raise UserError(f"{file} is damaged ({error!r}); restore it or make the set again") from error
    return manifest


def _check_shards(plan, shards):
    """Raise UserError, or what a wrong structure leads to, unless the shards add up to the plan and their files to the shards.

    The files' sizes are checked too, so no number in a manifest makes a reader ask for more memory than there is data.
    """
    sizes = {"moments": math.prod(plan.sample_shape) * np.dtype(plan.dtype).itemsize, "labels": 8}  # bytes of one sample
    sizes |= {"mirrored": sizes["moments"]} if plan.mirrored else {}
    for number, shard in enumerate(shards):
        found = {name: entry["bytes"] for name, entry in shard["files"].items()}
        least = {f"{kind}-{number:05d}.npy": size * shard["count"] for kind, size in sizes.items()}
        if found.keys() != least.keys() or not all(0 < found[name] - least[name] <= NPY_HEADER for name in least):
            raise UserError(f"shard {number} counts {_short(shard['count'])} samples, which its files {_short(found)} do not fit")
    if plan.num_images != sum(shard["count"] for shard in shards):
        raise UserError(f"num_images={plan.num_images}, wanted the sum of the shards' counts")


def _mapped(file, shape, dtype):
    """Memory-map a .npy file. Raises UserError if its header says another shape or type."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); restore it or make the set again") from error
    if array.shape != shape or array.dtype != dtype:
        raise UserError(f"{file}: {array.dtype} of shape {array.shape}, the manifest wants {dtype} of shape {shape}")
    return np.asarray(array)  # still the mapped memory; plain arrays are faster to index than np.memmap


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


def _json_bytes(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def _write_file(file, data):
    with told(file), write_whole(file) as temporary:
        temporary.write_bytes(data)


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
