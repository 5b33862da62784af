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
import threading
from pathlib import Path

import numpy as np

from dataset.base import (MOMENTS_CHANNELS, FormatSet, LatentSet, check_not_cut, one_integer, open_npz, per_channel, read_npy, read_npz,
                          whole_number)
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


class LMDBLatents(LatentSet):
    """MaskDiT's LMDB: `z-{i}` float32 moments [8, H, W], `y-{i}` ascii class, `length` ascii count of images.

    Mirrored copies, told by the key `z-{length}`, follow as i + length. Memory-mapped, read-only, without lock file.
    """

    def __init__(self, file):
        self.file, self.name = file, str(file)
        environment = _environment(file)
        self.num_bytes = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        found = file.stat().st_size
        if found < self.num_bytes:  # reading past the end would kill the process (SIGBUS)
            raise UserError(f"{file} is cut short: {found} bytes, its page table wants {self.num_bytes}; fetch it again")
        with environment.begin(buffers=True) as transaction:
            self.num_images = whole_number(self._value(transaction, "length"), f"{file}: length")
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
        if len(indices):
            check_not_cut(self.file, self.num_bytes, int(indices[0]))
        with _environment(self.file).begin(buffers=True) as transaction:
            for row, index in zip(out.reshape(len(out), -1), indices.tolist()):
                value = self._value(transaction, f"z-{index}")
                if len(value) != wanted:
                    raise UserError(f"{self.file}: z-{index} has {len(value)} bytes, wanted {wanted} (float32 {self.sample_shape})")
                row[:] = np.frombuffer(value, np.float32)

    def _read_labels(self, image_indices):
        with _environment(self.file).begin(buffers=True) as transaction:
            return np.array([whole_number(self._value(transaction, f"y-{image}"), f"{self.file}: y-{image}")
                             for image in image_indices.tolist()], np.int64)


_environments = {}  # file -> (process id, open LMDB environment); LMDB lets a process open a file only once
_environments_lock = threading.Lock()


def _environment(file):
    """This process's LMDB environment of `file`, opened at the first call, and anew after a fork."""
    import lmdb
    with _environments_lock:
        process, environment = _environments.get(file, (None, None))
        if process != os.getpid():
            if environment is not None:
                environment.close()  # the parent's: unmaps only here
            try:
                environment = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise UserError(f"{file} is not a readable LMDB file ({error}); fetch it again") from error
            _environments[file] = (os.getpid(), environment)
        return environment


class SafetensorsLatents(FormatSet):
    """LightningDiT's shards: tensors `latents` (n, C, H, W), `latents_flip` the same, `labels` (n,), in each file.

    float32, float16 and bfloat16 (read as float32) are understood. LightningDiT stores latents before any scaling, and their
    mean and standard deviation per channel in latents_stats.pt beside the shards. Where that file is there, latents are
    normalised to a standard deviation of 0.5, as EDM's sigma_data = 0.5 supposes (LightningDiT itself: 1, as its flow matching
    supposes). Else the scale is 0.18215 unless the user gives another.
    """

    DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.float32}

    def __init__(self, files):
        self.files, self.name = files, str(files[0].parent if len(files) > 1 else files[0])
        self._handles, self._sizes = {}, [file.stat().st_size for file in files]
        labels_of = [self._labels_of(shard) for shard in range(len(files))]
        counts = [len(labels) for labels in labels_of]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self.labels = np.concatenate(labels_of).astype(np.int64)
        self.num_images = len(self.labels)
        first = self._slice(0, "latents")
        self._set_shape(first.get_shape()[1:], f"{files[0]}: latents", self.DTYPES[first.get_dtype()])
        self.holds_mirrored = all("latents_flip" in self._handle(shard).keys() for shard in range(len(files)))
        self._read_statistics(files[0].with_name("latents_stats.pt"))

    def __getstate__(self):
        return {**self.__dict__, "_handles": {}}

    def _handle(self, shard):
        if shard not in self._handles:
            from safetensors import SafetensorError, safe_open
            try:
                self._handles[shard] = safe_open(self.files[shard], framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.files[shard]} is cut short or not safetensors ({error}); fetch it again") from error
        return self._handles[shard]

    def _slice(self, shard, key):
        return self._handle(shard).get_slice(key)

    def _labels_of(self, shard):
        """The labels of a shard. Raises UserError if its tensors do not fit one another and those of the first shard."""
        file, found = self.files[shard], {key: self._slice(shard, key) for key in self._handle(shard).keys()}
        for key in ("latents", "labels"):
            if key not in found:
                raise UserError(f"{file}: no tensor {key}; found {', '.join(sorted(found)) or 'none'}")
        counts = found["labels"].get_shape()
        first = self._slice(0, "latents")
        for key in ("latents", "latents_flip"):
            if key not in found:
                continue
            shape, dtype = found[key].get_shape(), found[key].get_dtype()
            if shape != counts[:1] + first.get_shape()[1:] or len(counts) != 1:
                raise UserError(f"{file}: {key} of shape {shape} for labels of shape {counts}; the first file has {first.get_shape()}")
            if dtype not in self.DTYPES or dtype != first.get_dtype():
                raise UserError(f"{file}: {key} is {dtype}, wanted one of {', '.join(self.DTYPES)}, the same in all files")
        labels = self._handle(shard).get_tensor("labels")
        if labels.is_floating_point():
            raise UserError(f"{file}: labels are {found['labels'].get_dtype()}, wanted whole numbers")
        return labels.numpy()

    def _read_statistics(self, file):
        if not file.is_file():
            return
        import torch
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
            mean, std = (found[key].double().flatten().tolist() for key in ("mean", "std"))
        except Exception as error:  # whatever unpickling a damaged file leads to
            raise UserError(f"{file} is damaged or holds no mean and std ({type(error).__name__}); "
                            f"fetch it again or move it away") from error
        if min(std, default=0) > 0:
            std = [LATENT_STD / value for value in std]
        self.says_scale = True
        self.scale, self.shift = (per_channel(f"{file}: {name}", value, self.sample_shape[0] // 2)
                                  for name, value in (("scale", std), ("shift", mean)))

    def _array(self, image, mirrored):
        shard = int(np.searchsorted(self._ends, image, side="right"))
        key, file = "latents_flip" if mirrored else "latents", self.files[shard]
        check_not_cut(file, self._sizes[shard], image)
        tensor = self._slice(shard, key)[image - int(self._starts[shard])]
        return (tensor if self.dtype == np.float16 else tensor.float()).numpy(), f"{file}: {key}"

    def _read_labels(self, image_indices):
        return self.labels[image_indices]


class FeatureFolderLatents(FormatSet):
    """fast-DiT's folders: `*_features/NAME.npy` (1, 4, H, W) and `*_labels/NAME.npy` (1,), by the numbers in the names.

    Its latents are already multiplied by 0.18215, so scale is 1 here.
    """

    def __init__(self, features, labels):
        self.name = str(features)
        self.features = {file.name: file for file in _sorted_files(features, ".npy")}
        self.labels = {file.name: file for file in _sorted_files(labels, ".npy")}
        alone = sorted(self.features.keys() ^ self.labels.keys())
        if alone:
            raise UserError(f"{features} and {labels}: {len(alone)} names are in only one of them, first {alone[0]}")
        if not self.features:
            raise UserError(f"{features}: no .npy files")
        self.names = list(self.features)
        self.num_images = len(self.names)
        first, where = self._array(0, False)
        self._set_shape(first.shape, where, first.dtype)
        if self.holds_latents:
            self.scale = 1.0

    def _array(self, image, mirrored):
        file = self.features[self.names[image]]
        array = read_npy(file.read_bytes(), file)
        return array[0] if array.ndim == 4 and array.shape[0] == 1 else array, file

    def _read_labels(self, image_indices):
        files = [self.labels[self.names[image]] for image in image_indices.tolist()]
        return np.array([one_integer(read_npy(file.read_bytes(), file), file) for file in files], np.int64)


class ClassFolderLatents(FormatSet):
    """MAR's folders: CLASS/NAME.npz with `moments` and `moments_flip` (2C, H, W), whatever C; classes are the sorted folders.

    The scale is Stable Diffusion's 0.18215 for a 4-channel VAE and 0.2325, MAR's own, for any other.
    """

    always_moments = True

    def __init__(self, path, folders):
        self.name = str(path)
        self.class_names, self.num_classes = [folder.name for folder in folders], len(folders)
        files_of = [_sorted_files(folder, ".npz") for folder in folders]
        self.files = [file for files in files_of for file in files]
        self.labels = np.repeat(np.arange(len(folders)), [len(files) for files in files_of])
        self.num_images = len(self.files)
        with open_npz(self.files[0]) as members:
            self.holds_mirrored = "moments_flip" in members
        first, where = self._array(0, False)
        self._set_shape(first.shape, where, first.dtype)
        if first.shape[0] != MOMENTS_CHANNELS:
            self.scale = 0.2325

    def _array(self, image, mirrored):
        file, key = self.files[image], "moments_flip" if mirrored else "moments"
        with open_npz(file) as members:
            return read_npz(file, members, key), f"{file}: {key}"

    def _read_labels(self, image_indices):
        return self.labels[image_indices]


def _sorted_files(folder, suffix=""):
    """What in the folder has this suffix, by name; names that are numbers by their value. Nothing if it is no folder."""
    def order(name):
        stem = name.removesuffix(suffix)
        return (0, int(stem), name) if suffix and stem.isdecimal() else (1, 0, name)
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(names, key=order) if name.endswith(suffix) and not name.startswith(".")]
