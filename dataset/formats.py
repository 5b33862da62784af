"""Readers of stored latents in every known format, picked by looking at the path.

| found at the path | format |
|---|---|
| manifest.json | own (dataset/store.py) |
| data.mdb, train/data.mdb, or the .mdb file itself | LMDB of MaskDiT |
| *.tar, or one .tar file | WebDataset shards |
| *.safetensors, or one such file | shards of LightningDiT |
| two folders *_features and *_labels | one .npy per image, as fast-DiT writes them |
| class folders with .npz files | one .npz per image, as MAR writes them |

All hand out VAE moments (2C, H, W). A format that holds latents instead (C, H, W: a sample or the mean) is read as moments
whose log-variance is -30, the lowest that is used: drawing from them gives the stored latent back (standard deviation 3e-7).
Where a format does not say which of the two it holds, 8 channels are moments of a 4-channel VAE and any other number is
latents. Mirrored copies, where all images have one, are counted only when asked for.
"""

import io
import json
import math
import mmap
import os
import threading
from math import isqrt
from pathlib import Path

import numpy as np

from dataset.base import LatentSet, check_not_cut
from dataset.store import MANIFEST, PARTIAL, StoredLatents
from utils.cli import UserError

MOMENTS_CHANNELS = 8
CERTAIN_LOGVAR = -30.0
NPY_MAGIC = b"\x93NUMPY"


def open_latents(path, xflip=False, num_classes=None):
    """The `LatentSet` at `path`.

    xflip: count the mirrored copies too, where the set has them. num_classes: what the model expects (None or 0: not checked).
    Raises UserError if no known format is there or its files are damaged.
    """
    return _open(path, xflip).expect_classes(num_classes)


def _open(path, xflip):
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (stored latents wanted)")
    for reader, finds in READERS:
        found = finds(path)
        if found:
            return reader(found, xflip)
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) if path.is_dir() else "a file of another kind"
    raise UserError(f"{path}: no stored latents found in it ({inside or 'empty'}); wanted {MANIFEST}, data.mdb, *.tar, "
                    f"*.safetensors, *_features with *_labels, or class folders of .npz; extract_latent.py makes them of images")


class FormatSet(LatentSet):
    """A `LatentSet` whose files hold moments or latents, one array per image; sub-classes fill in `_array`."""

    holds_latents = False

    def _set_shape(self, shape, where, dtype=np.float32):
        """Take over the shape (C, H, W) and type of one stored sample."""
        if len(shape) != 3 or shape[1] != shape[2] or np.dtype(dtype) not in (np.float16, np.float32):
            raise UserError(f"{where}: {np.dtype(dtype)} of shape {tuple(shape)}, wanted float16 or float32 (channels, size, size)")
        self.holds_latents = shape[0] != MOMENTS_CHANNELS
        self.sample_shape = (shape[0] * (2 if self.holds_latents else 1), *shape[1:])
        self.dtype = np.dtype(dtype)

    def _read_samples(self, indices, out):
        channels = self.sample_shape[0] // (2 if self.holds_latents else 1)
        out[:, channels:] = CERTAIN_LOGVAR
        wanted = (channels, *self.sample_shape[1:])
        for row, index in zip(out[:, :channels], indices.tolist()):
            mirrored, image = divmod(index, self.num_images)
            array, where = self._array(image, mirrored)
            if array.shape != wanted or array.dtype != self.dtype:
                raise UserError(f"{where}: {array.dtype} of shape {array.shape}, wanted {self.dtype} of shape {wanted} "
                                f"as the first sample")
            row[:] = array

    def _array(self, image, mirrored):
        """The stored array (C, H, W) of an image (or its mirrored copy), and 'file: key' for messages."""
        raise NotImplementedError


class LMDBLatents(FormatSet):
    """MaskDiT's LMDB: `z-{i}` float32 moments [8, H, W], `y-{i}` ascii class, `length` ascii count of images.

    Mirrored copies, told by the key `z-{length}`, follow as i + length. Memory-mapped, read-only, without lock file.
    """

    def __init__(self, file, xflip=False):
        self.file, self.name = file, str(file)
        self._check_whole()
        with _environment(file).begin(buffers=True) as transaction:
            self.num_images = _ascii_int(self._value(transaction, "length"), f"{file}: length")
            if self.num_images < 1:
                raise UserError(f"{file}: length says {self.num_images} images")
            size = isqrt(len(self._value(transaction, "z-0")) // (4 * MOMENTS_CHANNELS))
            self._set_shape((MOMENTS_CHANNELS, size, size), f"{file}: z-0")
            self.mirrored = xflip and transaction.get(f"z-{self.num_images}".encode()) is not None

    def _check_whole(self):
        """Reading past the end of a file cut short would kill the process (SIGBUS), so look before."""
        environment = _environment(self.file)
        wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        found = self.file.stat().st_size
        if found < wanted:
            raise UserError(f"{self.file} is cut short: {found} bytes, its page table wants {wanted}; fetch it again")
        self.num_bytes = wanted

    def _value(self, transaction, key):
        value = transaction.get(key.encode())
        if value is None:
            raise UserError(f"{self.file}: no key {key}; is this a set of latents, and complete?")
        return value

    def _read_samples(self, indices, out):
        wanted = 4 * math.prod(self.sample_shape)
        rows = out.reshape(len(out), math.prod(self.sample_shape))
        if len(indices):
            check_not_cut(self.file, self.num_bytes, int(indices[0]))
        with _environment(self.file).begin(buffers=True) as transaction:
            for row, index in zip(rows, indices.tolist()):
                value = self._value(transaction, f"z-{index}")
                if len(value) != wanted:
                    raise UserError(f"{self.file}: z-{index} has {len(value)} bytes, wanted {wanted} "
                                    f"(float32 {self.sample_shape})")
                row[:] = np.frombuffer(value, np.float32)

    def _read_labels(self, image_indices):
        with _environment(self.file).begin(buffers=True) as transaction:
            return np.array([_ascii_int(self._value(transaction, f"y-{index}"), f"{self.file}: y-{index}")
                             for index in image_indices.tolist()], np.int64)


_environments = {}  # file -> (process id, open LMDB environment); a file may be open only once in a process
_environments_lock = threading.Lock()


def _environment(file):
    """This process's LMDB environment of `file`, opened at the first call, and anew after a fork."""
    process, environment = _environments.get(file, (None, None))
    if process == os.getpid():
        return environment
    import lmdb
    with _environments_lock:
        process, environment = _environments.get(file, (None, None))
        if process == os.getpid():
            return environment
        if environment is not None:
            environment.close()  # the parent's: unmaps only here
        try:
            environment = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise UserError(f"{file} is not a readable LMDB file ({error}); fetch it again") from error
        _environments[file] = (os.getpid(), environment)
        return environment


class WebDatasetLatents(FormatSet):
    """WebDataset tar shards, random access: members are found once by their headers, then read at their offset.

    Members of a sample share the name up to the first dot. Moments or latents (see above), by what follows the dot:
    `latent`, `latents`, `moments` (each also with `.npy`) or `npy`; without `.npy` raw little-endian float32 or float16
    [8, H, W] are also understood. Mirrored: `latent_flip`, `latents_flip`, `moments_flip`, also with `.npy`.
    Labels: `cls`, `label`, `cls.txt`, `label.txt` (ascii), `cls.npy`, `label.npy`, or `json` with a key `label` or `cls`.
    Pickled members (`pyd`, `pickle`, `pth`) are refused: reading them could run code.
    """

    ROLES = {
        "moments": ("moments.npy", "latents.npy", "latent.npy", "npy", "moments", "latents", "latent"),
        "label": ("cls", "label", "cls.txt", "label.txt", "cls.npy", "label.npy", "json"),
        "mirrored moments": ("moments_flip.npy", "latents_flip.npy", "latent_flip.npy",
                             "moments_flip", "latents_flip", "latent_flip"),
    }

    def __init__(self, files, xflip=False):
        self.name = str(files[0].parent if len(files) > 1 else files[0])
        self.files = files
        # (N, 7): file, then offset and size of moments, label and mirrored moments (size 0: none)
        self.index = np.array([(number, *places) for number, file in enumerate(files) for places in self._places(file)], np.int64)
        self.num_images = len(self.index)
        if not self.num_images:
            raise UserError(f"{self.name}: no sample in {len(files)} tar files")
        self._maps = {}
        first, where = self._array(0, False)
        self._set_shape(first.shape, where, first.dtype)
        self.mirrored = xflip and bool((self.index[:, 6] > 0).all())

    def __getstate__(self):
        return {**self.__dict__, "_maps": {}}

    def _places(self, file):
        """Of each sample in a tar: offset and size of its moments, label and mirrored moments."""
        samples = {}
        for name, offset, size in _tar_members(file):
            folder, slash, base = name.rpartition("/")
            key, _, kind = base.partition(".")
            samples.setdefault(folder + slash + key, {})[kind] = (offset, size)
        return [self._roles(file, key, members) for key, members in samples.items()]

    def _roles(self, file, key, members):
        places = []
        for role, kinds in self.ROLES.items():
            place = next((members[kind] for kind in kinds if kind in members), (0, 0))
            if not place[1] and role != "mirrored moments":
                raise UserError(f"{file}: sample {key} has no {role}: it has {', '.join(sorted(members))}, "
                                f"wanted one of {', '.join(kinds)} with content (pickles are not read)")
            places += place
        return places

    def _member(self, image, column):
        """Bytes of the member at (column, column + 1) of the index, and 'file: name' (from its header block) for messages."""
        number, offset, size = self.index[image, [0, column, column + 1]].tolist()
        mapped = self._maps.get(number)
        if mapped is None:
            mapped = self._maps[number] = memoryview(np.memmap(self.files[number], np.uint8, "r"))
        check_not_cut(self.files[number], len(mapped), image)
        name = bytes(mapped[offset - 512:offset - 412]).rstrip(b"\0").decode(errors="replace")
        return mapped[offset:offset + size], f"{self.files[number]}: {name}"

    def _array(self, image, mirrored):
        data, where = self._member(image, 5 if mirrored else 1)
        return (_npy_array if data[:6] == NPY_MAGIC else _raw_moments)(data, where), where

    def _read_labels(self, image_indices):
        return np.array([self._label(image) for image in image_indices.tolist()], np.int64)

    def _label(self, image):
        data, where = self._member(image, 3)
        if data[:6] == NPY_MAGIC:
            return _scalar(_npy_array(data, where), where)
        return _json_label(data, where) if data[:1] == b"{" else _ascii_int(data, where)


class SafetensorsLatents(FormatSet):
    """LightningDiT's shards: tensors `latents` (n, C, H, W), `latents_flip` the same, `labels` (n,), in each file.

    That project stores latents before any scaling, so the VAE's own scale (0.18215 unless told otherwise) is still to be
    applied; its per-channel statistics file is not used. float32, float16 and bfloat16 (read as float32) are understood.
    """

    def __init__(self, files, xflip=False):
        self.name = str(files[0].parent if len(files) > 1 else files[0])
        self.files, self.headers = files, [_safetensors_header(file) for file in files]
        for file, header in zip(files, self.headers):
            self._check_shard(file, header)
        counts = [header["labels"]["shape"][0] for header in self.headers]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self.num_images = sum(counts)
        first = self.headers[0]["latents"]
        self._set_shape(tuple(first["shape"][1:]), f"{files[0]}: latents",
                        np.float16 if first["dtype"] == "F16" else np.float32)
        self.mirrored = xflip and all("latents_flip" in header for header in self.headers)
        self._maps = {}

    def __getstate__(self):
        return {**self.__dict__, "_maps": {}}

    def _check_shard(self, file, header):
        for key in ("latents", "labels"):
            if key not in header:
                raise UserError(f"{file}: no tensor {key}; found {', '.join(header) or 'none'}")
        count = header["labels"]["shape"][0] if header["labels"]["shape"] else None
        wanted = [count, *self.headers[0]["latents"]["shape"][1:]]
        for key in ("latents", "latents_flip"):
            if key in header and header[key]["shape"] != wanted:
                raise UserError(f"{file}: {key} of shape {header[key]['shape']}, wanted {wanted} "
                                f"(labels {header['labels']['shape']}, first file {self.headers[0]['latents']['shape']})")

    def _tensor(self, shard, key):
        tensor = self._maps.get((shard, key))
        if tensor is None:
            tensor = self._maps[shard, key] = _safetensors_map(self.files[shard], self.headers[shard], key)
        return tensor

    def _place(self, image):
        shard = int(np.searchsorted(self._ends, image, side="right"))
        return shard, image - int(self._starts[shard])

    def _array(self, image, mirrored):
        shard, place = self._place(image)
        key = "latents_flip" if mirrored else "latents"
        tensor = self._tensor(shard, key)
        check_not_cut(self.files[shard], tensor.offset + tensor.nbytes, image)
        array = tensor[place]
        if self.headers[shard][key]["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array, f"{self.files[shard]}: {key}"

    def _read_labels(self, image_indices):
        places = [self._place(image) for image in image_indices.tolist()]
        return np.array([self._tensor(shard, "labels")[place] for shard, place in places], np.int64)


class FeatureFolderLatents(FormatSet):
    """fast-DiT's folders: `*_features/NAME.npy` (1, 4, H, W) and `*_labels/NAME.npy` (1,), by the numbers in the names.

    Its latents are already multiplied by 0.18215, so scale is 1 here.
    """

    scale = 1.0

    def __init__(self, folders, xflip=False):
        features, labels = folders
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
        if not self.holds_latents:
            self.scale = LatentSet.scale  # moments come straight from the VAE

    def _array(self, image, mirrored):
        file = self.features[self.names[image]]
        return _without_batch(_npy_array(file.read_bytes(), str(file))), str(file)

    def _read_labels(self, image_indices):
        files = [self.labels[self.names[image]] for image in image_indices.tolist()]
        return np.array([_scalar(_npy_array(file.read_bytes(), str(file)), str(file)) for file in files], np.int64)


class ClassFolderLatents(FormatSet):
    """MAR's folders: CLASS/NAME.npz with `moments` and `moments_flip` (2C, H, W), whatever C; classes are the sorted folders.

    The scale is Stable Diffusion's 0.18215 for a 4-channel VAE and 0.2325, MAR's own, for any other.
    """

    def __init__(self, path, xflip=False):
        self.name = str(path)
        folders = _class_folders(path)
        self.class_names = [folder.name for folder in folders]
        self.num_classes = len(folders)
        listed = [(file, label) for label, folder in enumerate(folders) for file in _sorted_files(folder, ".npz")]
        self.files = [file for file, _ in listed]
        self.labels = np.array([label for _, label in listed], np.int64)
        self.num_images = len(self.files)
        with np.load(self.files[0], allow_pickle=False) as members:
            self.mirrored = xflip and "moments_flip" in members
        first, where = self._array(0, False)
        self._set_shape(first.shape, where, first.dtype)
        self.sample_shape, self.holds_latents = first.shape, False
        self.scale = LatentSet.scale if first.shape[0] == MOMENTS_CHANNELS else 0.2325

    def _array(self, image, mirrored):
        file, key = self.files[image], "moments_flip" if mirrored else "moments"
        return _npz_array(file, key), f"{file}: {key}"

    def _read_labels(self, image_indices):
        return self.labels[image_indices]


def _find_own(path):
    return path if path.is_dir() and ((path / MANIFEST).is_file() or (path / PARTIAL).is_dir()) else None


def _find_lmdb(path):
    if path.suffix == ".mdb" and path.is_file():
        return path.resolve()
    for file in (path / "data.mdb", path / "train" / "data.mdb"):
        if file.is_file():
            return file.resolve()  # one name per file: an environment may be open only once in a process
    return None


def _find_files(suffix):
    def find(path):
        if path.is_file():
            return [path] if path.suffix == suffix else None
        return _sorted_files(path, suffix) or None
    return find


def _find_features(path):
    if not path.is_dir():
        return None
    for features in sorted(path.glob("*_features")):
        labels = features.with_name(features.name.removesuffix("_features") + "_labels")
        if labels.is_dir():
            return features, labels
    return None


def _find_class_folders(path):
    return path if path.is_dir() and any(_sorted_files(folder, ".npz") for folder in _class_folders(path)) else None


READERS = (
    (StoredLatents, _find_own),
    (LMDBLatents, _find_lmdb),
    (WebDatasetLatents, _find_files(".tar")),
    (SafetensorsLatents, _find_files(".safetensors")),
    (FeatureFolderLatents, _find_features),
    (ClassFolderLatents, _find_class_folders),
)


def _class_folders(path):
    return sorted((entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")),
                  key=lambda folder: folder.name)


def _sorted_files(folder, suffix):
    """Files of the folder with this suffix, by name; names that are numbers by their value."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(suffix) and not entry.name.startswith(".")]
    def order(name):
        stem = name.removesuffix(suffix)
        return (0, int(stem), name) if stem.isdecimal() else (1, 0, name)
    return [Path(folder, name) for name in sorted(names, key=order)]


def _ascii_int(data, where):
    text = bytes(data)[:40]
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{where} is {text!r}, wanted a whole number in ascii") from None


def _scalar(array, where):
    if array.size != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{where}: {array.dtype} of shape {array.shape}, wanted one integer")
    return int(array.reshape(()))


def _json_label(data, where):
    try:
        content = json.loads(bytes(data))
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    for key in ("label", "cls"):
        if isinstance(content, dict) and isinstance(content.get(key), int):
            return content[key]
    raise UserError(f"{where}: no whole number under label or cls")


def _tar_members(file):
    """[(name, offset of the data, size)] of the regular files in a tar; long names in pax or GNU form are understood.

    Raises ValueError if the tar is damaged or cut short. `tarfile` would take minutes for millions of members.
    Source: POSIX.1-2001 pax interchange format.
    """
    size = os.path.getsize(file)
    if not size:
        raise UserError(f"{file} is empty; fetch it again")
    members, position, extended = [], 0, {}
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while True:
            header = data[position:position + 512]
            if header == bytes(512):  # the end mark
                return members
            name, length, kind = _tar_header(file, header, position, size)
            begin, length = position + 512, int(extended.get("size", length))
            position = begin + -(-length // 512) * 512
            if position > size:
                raise UserError(f"{file} is cut short inside {name}: {size} bytes, wanted at least {position}; fetch it again")
            if kind == b"x":
                extended = _pax_records(data[begin:begin + length])
            elif kind == b"L":
                extended = {"path": data[begin:begin + length].rstrip(b"\0").decode()}
            else:
                if kind in b"0\0":
                    members.append((extended.get("path", name), begin, length))
                extended = {}


def _tar_header(file, header, position, size):
    """Name, data bytes and type of the member whose header block this is."""
    try:
        if sum(header) - sum(header[148:156]) + 8 * 32 != int(header[148:156].strip(b" \0"), 8):
            raise UserError("wrong checksum")
        name, prefix = (field.split(b"\0", 1)[0].decode() for field in (header[:100], header[345:500]))
        length = header[124:136]
        length = int.from_bytes(length[1:], "big") if length[0] == 0x80 else int(length.strip(b" \0") or b"0", 8)
    except (ValueError, IndexError) as error:
        raise UserError(f"{file} is cut short or not an uncompressed tar: no header or end mark at byte {position} of {size} "
                        f"({error}); fetch it again") from error
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name, length, header[156:157]


def _pax_records(data):
    """{keyword: value} of lines `LENGTH KEYWORD=VALUE\\n`, where LENGTH counts the whole line."""
    records = {}
    while data:
        length = int(data[:data.index(b" ")])
        keyword, _, value = data[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        records[keyword.decode()] = value.decode()
        data = data[length:]
    return records


def _without_batch(array):
    return array[0] if array.ndim == 4 and array.shape[0] == 1 else array


def _npy_array(data, where):
    """The array in the bytes of a .npy file. Raises ValueError if they are cut short or hold Python objects."""
    try:
        stream = io.BytesIO(data)
        return np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:
        raise UserError(f"{where}: {len(data)} bytes are not a whole .npy array of numbers ({error})") from error


def _npz_array(file, key):
    import zipfile
    import zlib
    try:
        with np.load(file, allow_pickle=False) as members:
            if key not in members:
                raise KeyError(f"no {key}; found {', '.join(members.files)}")
            return members[key]
    except (ValueError, EOFError, KeyError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: {key} cannot be read ({error})") from error


def _raw_moments(data, where):
    """Raw [8, H, H] numbers: the byte count fits a square of only one of float32 and float16."""
    for dtype in (np.float32, np.float16):
        values, rest = divmod(len(data), np.dtype(dtype).itemsize * MOMENTS_CHANNELS)
        if not rest and values and isqrt(values) ** 2 == values:
            return np.frombuffer(data, dtype).reshape(MOMENTS_CHANNELS, isqrt(values), isqrt(values))
    raise UserError(f"{where}: {len(data)} bytes are neither float32 nor float16 moments [8, H, H]")


SAFETENSORS_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32}


def _safetensors_header(file):
    """{tensor: {dtype, shape, data_offsets from the file's start}}. Raises ValueError if damaged or cut short."""
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise UserError(f"{file} is cut short or not safetensors: header of {length} bytes in a file of {size}")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(f"{file}: its header is not JSON ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    for key, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        entry["data_offsets"] = start, end
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(f"{file}: {key} is {entry['dtype']}, wanted one of {', '.join(SAFETENSORS_DTYPES)}")
        if end > size or end - start != np.dtype(dtype).itemsize * int(np.prod(entry["shape"], dtype=object)):
            raise UserError(f"{file} is cut short or damaged: {key} {entry['shape']} {entry['dtype']} lies at bytes "
                            f"{start}..{end} of {size}; fetch it again")
    return header


def _safetensors_map(file, header, key):
    entry = header[key]
    return np.memmap(file, SAFETENSORS_DTYPES[entry["dtype"]], "r", entry["data_offsets"][0], tuple(entry["shape"]))
