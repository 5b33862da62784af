"""Readers of stored latents in every known format, picked by looking at the path.

| found at the path | format |
|---|---|
| manifest.json | own (dataset/store.py) |
| data.mdb, train/data.mdb, or the .mdb file itself | LMDB of MaskDiT |
| *.tar, or one .tar file | WebDataset shards of MaskDiT and others (dataset/webdataset.py) |
| *.safetensors, or one such file | shards of LightningDiT |
| two folders *_features and *_labels | one .npy per image, as fast-DiT writes them |
| class folders with .npz files | one .npz per image, as MAR writes them |

All hand out VAE moments (2C, H, W), also where latents (C, H, W) are stored: see `LatentSet`.
"""

import math
import os
from itertools import accumulate
from pathlib import Path

import numpy as np

from dataset.base import (MOMENTS_CHANNELS, LatentSet, PerProcess, check_not_cut, locate, open_npz, per_channel, read_label, read_npy,
                          read_npz, reading)
from dataset.store import MANIFEST, PARTIAL, StoredLatents
from dataset.webdataset import WebDatasetLatents
from utils.cli import UserError
from utils.logging import say

LATENT_STD = 0.5  # of latents normalised by a statistics file: what EDM's sigma_data = 0.5 supposes


def open_latents(path, xflip=False, num_classes=None, scale=None, shift=None):
    """The `LatentSet` at `path`.

    xflip: count the stored encodings of the mirrored images too. num_classes: what the model expects (None or 0: not checked).
    scale, shift: for formats that do not say theirs.
    Raises UserError if no known format is there, its files are damaged, or they do not hold or say what is asked for.
    """
    latents = find_latents(path)
    latents.use_scale(scale, shift)
    if xflip and not latents.holds_mirrored:
        raise UserError(f"data.xflip=true, but {latents.name} holds no mirrored copies; extract it again with --xflip, "
                        f"or set data.xflip=false")
    if latents.holds_mirrored and not xflip:
        say(f"{latents.name} also holds the mirrored copies of its images; data.xflip=true trains on them too")
    latents.mirrored = xflip
    return latents.expect_classes(num_classes)


def find_latents(path):
    """The reader of what is at `path`, without mirrored copies. Raises UserError as `open_latents`."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (stored latents wanted)")
    if (path / MANIFEST).is_file() or (path / PARTIAL).is_dir():
        return StoredLatents(path)
    for file in (path, path / "data.mdb", path / "train" / "data.mdb"):
        if file.suffix == ".mdb" and file.is_file():
            return LMDBLatents(file.resolve())  # one name per file: LMDB lets a process open it only once
    for suffix, reader in ((".tar", WebDatasetLatents), (".safetensors", SafetensorsLatents)):
        if files := _files(path, suffix):
            return reader(path, files)
    for features in sorted(path.glob("*_features")):
        labels = features.with_name(features.name.removesuffix("_features") + "_labels")
        if labels.is_dir():
            return FeatureFolderLatents(features, labels)
    folders = [folder for folder in _files(path) if folder.is_dir()]
    if any(_files(folder, ".npz") for folder in folders):
        return ClassFolderLatents(path, folders)
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) if path.is_dir() else "a file of another kind"
    raise UserError(f"{path}: no stored latents found in it ({inside or 'empty'}); wanted {MANIFEST}, data.mdb, *.tar, "
                    f"*.safetensors, *_features with *_labels, or class folders of .npz; extract_latent.py makes them of images")


def _files(path, suffix=""):
    """`path` itself or what is in that folder, if it has this suffix: by name, names that are numbers by their value."""
    def order(file):
        number = suffix and file.stem.isdecimal()
        return (0, int(file.stem), file.name) if number else (1, 0, file.name)
    files = [path / name for name in os.listdir(path)] if path.is_dir() else [path]
    return sorted((file for file in files if file.name.endswith(suffix) and not file.name.startswith(".")), key=order)


def _open_lmdb(file):
    import lmdb
    return lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)


_environment = PerProcess(_open_lmdb)  # for all sets: LMDB lets a process open a file only once


class LMDBLatents(LatentSet):
    """MaskDiT's LMDB: `z-{i}` float32 moments [8, H, W], `y-{i}` ascii class, `length` ascii count of images.

    Mirrored copies, told by the key `z-{length}`, follow as i + length. Memory-mapped, read-only, without lock file.
    """

    def __init__(self, file):
        self.file, self.name = file, str(file)
        environment = _environment(file)
        self.num_bytes = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        self.num_images = read_label(self._value("length"), f"{file}: length")
        self._look_at_first()
        self._value(f"z-{self.num_images - 1}")
        self.holds_mirrored = self._value(f"z-{self.num_images}", may_lack=True) is not None

    def _value(self, key, may_lack=False):
        check_not_cut(self.file, self.num_bytes)
        with _environment(self.file).begin() as transaction:
            value = transaction.get(key.encode())
        if value is None and not may_lack:
            raise UserError(f"{self.file}: no key {key}; is this a set of latents, and complete?")
        return value

    def _array(self, image, mirrored):
        key = f"z-{image + mirrored * self.num_images}"
        with reading(f"{self.file}: {key}"):
            values = np.frombuffer(self._value(key), np.float32)
            size = math.isqrt(len(values) // MOMENTS_CHANNELS)
            return values.reshape(MOMENTS_CHANNELS, size, size), f"{self.file}: {key}"

    def _labels(self, images):
        return [read_label(self._value(f"y-{image}"), f"{self.file}: y-{image}") for image in images]


def _open_safetensors(file):
    from safetensors import safe_open
    return safe_open(file, framework="pt")


class SafetensorsLatents(LatentSet):
    """LightningDiT's shards: tensors `latents` (n, C, H, W), `latents_flip` the same, `labels` (n,), in each file.

    float32, float16 and bfloat16 (read as float32) are understood. Latents are stored before any scaling. Where latents_stats.pt lies
    beside the shards (mean and standard deviation per channel), they are normalised to LATENT_STD; LightningDiT itself takes 1.
    """

    def __init__(self, path, files):
        self.name, self.files, self._sizes = str(path), files, [file.stat().st_size for file in files]
        self._opened = PerProcess(_open_safetensors)
        labels = [self._read_labels(file) for file in files]
        self.labels, self._ends = np.concatenate(labels), list(accumulate(map(len, labels)))
        self.num_images = len(self.labels)
        self.holds_mirrored = all("latents_flip" in self._opened(file).keys() for file in files)
        self._look_at_first()
        statistics = files[0].with_name("latents_stats.pt")
        if statistics.is_file():
            self._read_statistics(statistics)

    def _read_labels(self, file):
        """The labels of a shard. Raises UserError if its tensors do not fit one another."""
        handle = self._opened(file)
        with reading(file):
            labels = handle.get_tensor("labels").numpy()
        shapes = {key: handle.get_slice(key).get_shape() for key in ("latents", "latents_flip") if key in handle.keys()}
        fitting = all(shape[:1] == [*labels.shape] for shape in shapes.values())
        if "latents" not in shapes or labels.dtype.kind not in "iu" or not fitting:
            raise UserError(f"{file}: {shapes} with {labels.dtype} labels {labels.shape}, wanted latents (n, C, H, W) "
                            f"with whole numbers as labels (n,)")
        return labels

    def _read_statistics(self, file):
        import torch
        with reading(file):
            found = torch.load(file, map_location="cpu", weights_only=True)
            mean, std = (found[key].double().flatten() for key in ("mean", "std"))
        channels, self.says_scale = self.sample_shape[0] // 2, True
        self.scale = per_channel(f"{file}: scale", (LATENT_STD / std).tolist(), channels)
        self.shift = per_channel(f"{file}: shift", mean.tolist(), channels)

    def _array(self, image, mirrored):
        import torch
        shard, row = locate(self._ends, image)
        key, file = "latents_flip" if mirrored else "latents", self.files[shard]
        check_not_cut(file, self._sizes[shard])
        tensor = self._opened(file).get_slice(key)[row]
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), f"{file}: {key}"


class FeatureFolderLatents(LatentSet):
    """fast-DiT's folders: `*_features/NAME.npy` (1, 4, H, W) and `*_labels/NAME.npy` (1,), by the numbers in the names."""

    def __init__(self, features, labels):
        self.name, self.files, self.label_files = str(features), _files(features, ".npy"), _files(labels, ".npy")
        self.num_images = len(self.files)
        alone = {file.name for file in self.files} ^ {file.name for file in self.label_files}
        if alone:
            raise UserError(f"{features} and {labels} hold {len(self.files)} and {len(self.label_files)} .npy files, "
                            f"{len(alone)} of them in only one folder, first {min(alone)}; wanted the same names in both")
        self._look_at_first()
        if self.holds_latents:
            self.scale = 1.0  # they are already multiplied by 0.18215

    def _array(self, image, mirrored):
        array = read_npy(self.files[image].read_bytes(), self.files[image])
        return array[0] if array.ndim == 4 and len(array) == 1 else array, self.files[image]

    def _labels(self, images):
        return [read_label(file.read_bytes(), file) for file in map(self.label_files.__getitem__, images)]


class ClassFolderLatents(LatentSet):
    """MAR's folders: CLASS/NAME.npz with `moments` and `moments_flip` (2C, H, W), whatever C; classes are the sorted folders."""

    def __init__(self, path, folders):
        self.name, self.class_names, self.num_classes = str(path), [folder.name for folder in folders], len(folders)
        files_of = [_files(folder, ".npz") for folder in folders]
        self.files = [file for files in files_of for file in files]
        self.labels = np.repeat(np.arange(len(folders)), [len(files) for files in files_of])
        self.num_images = len(self.files)
        with open_npz(self.files[0]) as members:
            self.holds_mirrored = "moments_flip" in members
        self._look_at_first(always_moments=True)
        if self.sample_shape[0] != MOMENTS_CHANNELS:
            self.scale = 0.2325  # of MAR's own VAE

    def _array(self, image, mirrored):
        file, key = self.files[image], "moments_flip" if mirrored else "moments"
        with open_npz(file) as members:
            return read_npz(file, members, key), f"{file}: {key}"
