"""Readers of stored latents in every known format, picked by looking at the path.

| found at the path | format |
|---|---|
| manifest.json | own (dataset/store.py) |
| data.mdb, train/data.mdb, or the .mdb file itself | LMDB of MaskDiT |
| *.tar, or one .tar file | WebDataset shards of MaskDiT and others (dataset/webdataset.py) |
| *.safetensors, or one such file | shards of LightningDiT |
| two folders *_features and *_labels | one .npy per image, as fast-DiT writes them |
| class folders with .npz files | one .npz per image, as MAR writes them |

All hand out VAE moments (2C, H, W). A format that holds latents instead (C, H, W: a sample or the mean) is read as moments
whose log-variance is -30, the lowest that is used: drawing from them gives the stored latent back (standard deviation 3e-7).
Where a format does not say which of the two it holds, 8 channels are moments of a 4-channel VAE and any other number is latents.
"""

import math
import os
from pathlib import Path

import numpy as np

from dataset.base import (MOMENTS_CHANNELS, LatentSet, PerProcess, check_not_cut, open_npz, per_channel, read_label, read_npy, read_npz,
                          reading)
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
    for file in [path] if path.suffix == ".mdb" else [path / "data.mdb", path / "train" / "data.mdb"]:
        if file.is_file():
            return LMDBLatents(file.resolve())  # one name per file: LMDB lets a process open it only once
    for suffix, reader in ((".tar", WebDatasetLatents), (".safetensors", SafetensorsLatents)):
        files = [path] if path.suffix == suffix and path.is_file() else _sorted_files(path, suffix)
        if files:
            return reader(files)
    for features in sorted(path.glob("*_features")):
        labels = features.with_name(features.name.removesuffix("_features") + "_labels")
        if labels.is_dir():
            return FeatureFolderLatents(features, labels)
    folders = [folder for folder in _sorted_files(path) if folder.is_dir()]
    if any(_sorted_files(folder, ".npz") for folder in folders):
        return ClassFolderLatents(path, folders)
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) if path.is_dir() else "a file of another kind"
    raise UserError(f"{path}: no stored latents found in it ({inside or 'empty'}); wanted {MANIFEST}, data.mdb, *.tar, "
                    f"*.safetensors, *_features with *_labels, or class folders of .npz; extract_latent.py makes them of images")


def _open_lmdb(file):
    import lmdb
    with reading(file):
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
        check_not_cut(file, self.num_bytes)
        with environment.begin(buffers=True) as transaction:
            self.num_images = read_label(self._value(transaction, "length"), f"{file}: length")
            if self.num_images < 1:
                raise UserError(f"{file}: length says {self.num_images} images")
            size = math.isqrt(len(self._value(transaction, "z-0")) // (4 * MOMENTS_CHANNELS))
            self.sample_shape = (MOMENTS_CHANNELS, size, size)
            self._value(transaction, f"z-{self.num_images - 1}")
            self.holds_mirrored = transaction.get(f"z-{self.num_images}".encode()) is not None

    def _value(self, transaction, key):
        value = transaction.get(key.encode())
        if value is None:
            raise UserError(f"{self.file}: no key {key}; is this a set of latents, and complete?")
        return value

    def _read_samples(self, indices, out):
        wanted = 4 * math.prod(self.sample_shape)
        check_not_cut(self.file, self.num_bytes)
        with _environment(self.file).begin(buffers=True) as transaction:
            for row, index in zip(out.reshape(len(out), -1), indices.tolist()):
                value = self._value(transaction, f"z-{index}")
                if len(value) != wanted:
                    raise UserError(f"{self.file}: z-{index} has {len(value)} bytes, wanted {wanted} (float32 {self.sample_shape})")
                row[:] = np.frombuffer(value, np.float32)

    def _read_labels(self, images):
        with _environment(self.file).begin(buffers=True) as transaction:
            return np.array([read_label(self._value(transaction, f"y-{image}"), f"{self.file}: y-{image}")
                             for image in images.tolist()], np.int64)


def _open_safetensors(file):
    from safetensors import safe_open
    with reading(file):
        return safe_open(file, framework="pt")


class SafetensorsLatents(LatentSet):
    """LightningDiT's shards: tensors `latents` (n, C, H, W), `latents_flip` the same, `labels` (n,), in each file.

    float32, float16 and bfloat16 (read as float32) are understood. LightningDiT stores latents before any scaling, and their
    mean and standard deviation per channel in latents_stats.pt beside the shards. Where that file is there, latents are
    normalised to a standard deviation of 0.5, as EDM's sigma_data = 0.5 supposes (LightningDiT itself: 1, as its flow matching
    supposes). Else the scale is 0.18215 unless the user gives another.
    """

    def __init__(self, files):
        self.files, self.name = files, str(files[0].parent if len(files) > 1 else files[0])
        self._handle, self._sizes = PerProcess(_open_safetensors), [file.stat().st_size for file in files]
        labels = [self._labels_of(file) for file in files]
        self._ends = np.cumsum([len(part) for part in labels])
        self._starts = self._ends - [len(part) for part in labels]
        self.labels = np.concatenate(labels).astype(np.int64)
        self.num_images = len(self.labels)
        self.holds_mirrored = all("latents_flip" in self._handle(file).keys() for file in files)
        self._look_at_first()
        self._read_statistics(files[0].with_name("latents_stats.pt"))

    def _labels_of(self, file):
        """The labels of a shard. Raises UserError if its tensors do not fit one another."""
        handle = self._handle(file)
        shapes = {key: handle.get_slice(key).get_shape() for key in handle.keys()}
        for key in ("latents", "labels"):
            if key not in shapes:
                raise UserError(f"{file}: no tensor {key}; found {', '.join(sorted(shapes)) or 'none'}")
        for key in shapes.keys() & {"latents", "latents_flip"}:
            if shapes[key][:1] != shapes["labels"]:
                raise UserError(f"{file}: {key} of shape {shapes[key]} for labels of shape {shapes['labels']}")
        labels = handle.get_tensor("labels")
        if labels.is_floating_point():
            raise UserError(f"{file}: labels are {labels.dtype}, wanted whole numbers")
        return labels.numpy()

    def _read_statistics(self, file):
        if not file.is_file():
            return
        import torch
        with reading(file):
            found = torch.load(file, map_location="cpu", weights_only=True)
            mean, std = (found[key].double().flatten().tolist() for key in ("mean", "std"))
        if min(std, default=0) > 0:
            std = [LATENT_STD / value for value in std]
        self.says_scale = True
        self.scale, self.shift = (per_channel(f"{file}: {name}", value, self.sample_shape[0] // 2)
                                  for name, value in (("scale", std), ("shift", mean)))

    def _array(self, image, mirrored):
        import torch
        shard = int(np.searchsorted(self._ends, image, side="right"))
        key, file = "latents_flip" if mirrored else "latents", self.files[shard]
        check_not_cut(file, self._sizes[shard])
        tensor = self._handle(file).get_slice(key)[image - int(self._starts[shard])]
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), f"{file}: {key}"


class FeatureFolderLatents(LatentSet):
    """fast-DiT's folders: `*_features/NAME.npy` (1, 4, H, W) and `*_labels/NAME.npy` (1,), by the numbers in the names.

    Its latents are already multiplied by 0.18215, so scale is 1 here.
    """

    def __init__(self, features, labels):
        self.name, self.files, self.label_files = str(features), _sorted_files(features, ".npy"), _sorted_files(labels, ".npy")
        self.num_images = len(self.files)
        alone = {file.name for file in self.files} ^ {file.name for file in self.label_files}
        if alone or not self.files:
            raise UserError(f"{features} and {labels} hold {len(self.files)} and {len(self.label_files)} .npy files, {len(alone)} of them "
                            f"in only one folder, first {min(alone, default='none')}; wanted the same names in both")
        self._look_at_first()
        if self.holds_latents:
            self.scale = 1.0

    def _array(self, image, mirrored):
        array = read_npy(self.files[image].read_bytes(), self.files[image])
        return array[0] if array.ndim == 4 and array.shape[0] == 1 else array, self.files[image]

    def _read_labels(self, images):
        files = [self.label_files[image] for image in images.tolist()]
        return np.array([read_label(file.read_bytes(), file) for file in files], np.int64)


class ClassFolderLatents(LatentSet):
    """MAR's folders: CLASS/NAME.npz with `moments` and `moments_flip` (2C, H, W), whatever C; classes are the sorted folders.

    The scale is Stable Diffusion's 0.18215 for a 4-channel VAE and 0.2325, MAR's own, for any other.
    """

    always_moments = True

    def __init__(self, path, folders):
        self.name, self.class_names, self.num_classes = str(path), [folder.name for folder in folders], len(folders)
        files_of = [_sorted_files(folder, ".npz") for folder in folders]
        self.files = [file for files in files_of for file in files]
        self.labels = np.repeat(np.arange(len(folders)), [len(files) for files in files_of])
        self.num_images = len(self.files)
        with open_npz(self.files[0]) as members:
            self.holds_mirrored = "moments_flip" in members
        self._look_at_first()
        if self.sample_shape[0] != MOMENTS_CHANNELS:
            self.scale = 0.2325

    def _array(self, image, mirrored):
        file, key = self.files[image], "moments_flip" if mirrored else "moments"
        with open_npz(file) as members:
            return read_npz(file, members, key), f"{file}: {key}"


def _sorted_files(folder, suffix=""):
    """What in the folder has this suffix, by name; names that are numbers by their value. Nothing if it is no folder."""
    def order(name):
        stem = name.removesuffix(suffix)
        return (0, int(stem), name) if suffix and stem.isdecimal() else (1, 0, name)
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(names, key=order) if name.endswith(suffix) and not name.startswith(".")]
