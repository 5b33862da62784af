"""Image sets to measure: a folder, a zip, an .npz or an array in memory, all read as uint8 (n, H, W, 3)."""

import io
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from fid.inception import check_images
from fid.statistics import DAMAGE, open_npz, read_array
from utils import distributed
from utils.cli import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
DECODERS = min(8, os.cpu_count() or 1)
SIZES_CHECKED = 256  # files whose size is looked at before any work; the others' when they are read


def open_source(images, num=None, seed=0):
    """Open an image set.

    images: folder (recursive, sorted), .zip, .npz with arr_0, or an array (N, H, W, 3) uint8.
    num: measure a random subset of so many images, drawn by `seed` and kept in file order; None takes all.
    Returns a source with len(), .name and .read(positions). Raises FileNotFoundError or ValueError before any image work.
    """
    if not isinstance(images, (str, os.PathLike)):
        source = ArraySource(images, "array")
    elif os.path.isdir(images):
        source = FileSource(_folder_files(images), str(images))
    elif not os.path.exists(images):
        raise UserError(f"{images}: no such file or folder; give a folder, a .zip or an .npz of images")
    elif str(images).endswith(".zip"):
        names, open_file = _zip_files(images)
        source = FileSource(names, str(images), open_file)
    elif str(images).endswith(".npz"):
        source = ArraySource(_npz_images(images), str(images))
    else:
        raise UserError(f"{images}: not an image set; give a folder, a .zip or an .npz of images")
    return source if num is None else _subset(source, num, seed)


class ArraySource:
    """Images (N, H, W, 3) uint8 of an array or a memory-mapped file."""

    def __init__(self, images, name):
        check_images(images, name)
        self.images, self.name = images, name
        self.chosen = np.arange(len(images))

    def __len__(self):
        return len(self.chosen)

    def read(self, positions):
        """The images (n, H, W, 3) uint8 at these positions of the (chosen) set."""
        return np.asarray(self.images[self.chosen[positions]])


class FileSource:
    """Images in files; every file is decoded to RGB, and all have to be of one size."""

    def __init__(self, files, name, open_file=lambda file: open(file, "rb")):
        if not files:
            raise UserError(f"{name}: no images found (looked for {' '.join(SUFFIXES)})")
        self.files, self.name, self.open_file = files, name, open_file
        self.chosen = np.arange(len(files))
        self.decoders = ThreadPoolExecutor(DECODERS)
        self.size = self._size_of(files[0])
        for i in np.linspace(0, len(files) - 1, min(len(files), SIZES_CHECKED)).astype(int):
            self._check_size(files[i], self._size_of(files[i]))

    def __len__(self):
        return len(self.chosen)

    def read(self, positions):
        return np.stack(list(self.decoders.map(self._decode, [self.files[i] for i in self.chosen[positions]])))

    def _size_of(self, file):
        return self._with_image(file, lambda image: image.size)

    def _decode(self, file):
        def pixels(image):
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{file}: mode {image.mode} (16 bits or more per channel), wanted 8-bit images")
            return np.asarray(image.convert("RGB"))
        array = self._with_image(file, pixels)
        self._check_size(file, array.shape[1::-1])
        return array

    def _with_image(self, file, function):
        from PIL import Image, UnidentifiedImageError
        try:
            with self.open_file(file) as stream, Image.open(stream) as image:
                return function(image)
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{self.name}: {file} cannot be read as an image ({error})") from None

    def _check_size(self, file, size):
        if size != self.size:
            raise UserError(f"{self.name}: mixed sizes, {self.files[0]} is {self.size[0]}x{self.size[1]} and {file} is "
                            f"{size[0]}x{size[1]}; give a folder of the samples alone, or crop and resize all to one size first")


def _folder_files(folder):
    return sorted(str(path) for path in Path(folder).rglob("*") if _is_image(path.name) and path.is_file())


def _zip_files(path):
    """(sorted names, opener) of the images in a zip; one reader for all threads, behind a lock."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not a readable zip ({error})") from None
    names = sorted(name for name in archive.namelist() if _is_image(name.rsplit("/", 1)[-1]))
    lock = threading.Lock()

    def open_file(name):
        with lock:
            return io.BytesIO(archive.read(name))

    return names, open_file


def _is_image(name):
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def has_images(path):
    """True if an .npz holds images (arr_0) and not statistics alone."""
    with open_npz(path) as file:
        return "arr_0" in file


def _npz_images(path):
    """arr_0 of an .npz: memory-mapped where it is stored plainly (np.savez), else read."""
    with open_npz(path) as file:
        if "arr_0" not in file:
            statistics_only = "; it holds statistics only, which can be the reference but not the images" if "mu" in file else ""
            raise UserError(f"{path}: no arr_0 among its arrays ({', '.join(file.files)}){statistics_only}")
    info, start, (shape, fortran_order, dtype) = _array_header(path)
    check_images(SimpleNamespace(shape=shape, dtype=dtype), f"{path} arr_0")
    if info.compress_type != zipfile.ZIP_STORED or fortran_order:
        with open_npz(path) as file:
            return read_array(path, file, "arr_0")
    return np.memmap(path, np.uint8, "r", _data_offset(path, info) + start, shape)


def _array_header(path):
    """arr_0's entry in the zip, where its numbers begin in it, and (shape, fortran_order, dtype)."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as entry:
            version = np.lib.format.read_magic(entry)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            header = read_header(entry)
            return archive.getinfo("arr_0.npy"), entry.tell(), header
    except DAMAGE as error:
        raise UserError(f"{path}: arr_0 is damaged ({error}); get or make the file anew") from None


def _data_offset(path, info):
    """Where a zip entry's bytes begin: after its local header (30 bytes, the name, the extra field)."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _subset(source, num, seed):
    if not 1 <= num <= len(source):
        raise UserError(f"{source.name}: {num} images asked for, it has {len(source)}; give --num between 1 and {len(source)}")
    source.chosen = np.sort(np.random.default_rng(seed).choice(len(source), num, replace=False))
    return source


def batches(source, batch_size, positions=None):
    """Yield (batch_index, images (n, H, W, 3) uint8) of this process: of fixed global batches, k belongs to rank k mod W.

    positions: which images make up the batches, ascending (M,); None takes all. One batch is read ahead in a thread.
    """
    positions = np.arange(len(source)) if positions is None else positions
    mine = range(distributed.rank(), -(-len(positions) // batch_size), distributed.world_size())

    def read(index):
        return source.read(positions[index * batch_size:(index + 1) * batch_size])

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, mine[0]) if mine else None
        for place, index in enumerate(mine):
            images = ahead.result()
            ahead = reader.submit(read, mine[place + 1]) if place + 1 < len(mine) else None
            yield index, images
