"""Image sets to measure: what dataset.images reads, all of one size, in batches that the processes share."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dataset.base import open_npz
from dataset.images import ArrayImages, open_images
from utils import distributed
from utils.cli import UserError

DECODERS = min(8, os.cpu_count() or 1)
SIZES_CHECKED = 256  # files whose size is looked at before any work; the others' when they are read


class Source:
    """An image set of one size, or a random part of it.

    images: a path that dataset.images.open_images takes, or an array (N, H, W, 3) uint8.
    num: how many images, drawn by `seed` and kept in file order; None takes all. option: where the user gave `num`, for messages.
    Raises UserError before any image work.
    """

    def __init__(self, images, num=None, seed=0, option="--num"):
        if not isinstance(images, (str, os.PathLike)):
            self.images = ArrayImages("array", np.asarray(images), None, None)
        elif holds(images, "mu") and not holds(images, "arr_0"):
            raise UserError(f"{images}: no arr_0; it holds statistics only, which can be the reference but not the images")
        else:
            self.images = open_images(images)
        self.name, total = self.images.name, len(self.images)
        if num is not None and not 1 <= num <= total:
            raise UserError(f"{self.name}: {option} asks for {num} images, it has {total}; give 1 to {total}")
        self.chosen = random_positions(total, total if num is None else num, seed)
        self.size = self.images.size(0)  # (width, height)
        for index in np.linspace(0, total - 1, min(total, SIZES_CHECKED)).astype(int):
            self._check_size(index, self.images.size(index))
        self.decoders = ThreadPoolExecutor(DECODERS)

    def __len__(self):
        return len(self.chosen)

    def read(self, positions):
        """The images (n, H, W, 3) uint8 at these positions."""
        return np.stack(list(self.decoders.map(self._picture, self.chosen[positions])))

    def _picture(self, index):
        picture = self.images.picture(index)
        self._check_size(index, picture.shape[1::-1])
        return picture

    def _check_size(self, index, size):
        if size != self.size:
            first, this = (self.images.names[i] if self.images.names else f"image {i}" for i in (0, index))
            raise UserError(f"{self.name}: mixed sizes, {first} is {self.size[0]}x{self.size[1]} and {this} is {size[0]}x{size[1]}; "
                            "give a folder of the samples alone, or crop and resize all to one size first")


def random_positions(total, num, seed):
    """`num` of the numbers 0..total-1, ascending."""
    return np.sort(np.random.default_rng(seed).choice(total, num, replace=False))


def holds(path, key):
    """True if `path` is an .npz with an array `key`: `arr_0` of images, `mu` of a reference."""
    if not str(path).endswith(".npz"):
        return False
    with open_npz(path) as file:
        return key in file


def check_images(images):
    """Raise UserError unless images is a (B, H, W, 3) uint8 batch."""
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    if len(shape) != 4 or shape[3] != 3 or dtype != "uint8" or 0 in shape:
        raise UserError(f"images: got {dtype} {shape}, wanted uint8 (B, H, W, 3) with a batch axis; if the layout is NCHW, use "
                        "images.transpose(0, 2, 3, 1) (torch: permute), for values in [-1, 1] floor((x + 1) * 127.5) clipped to 0..255; "
                        "repeat a grey channel three times, drop an alpha channel")


def batches(source, batch_size, positions):
    """Yield (batch_index, positions (n,), images (n, H, W, 3) uint8) of fixed global batches; batch k belongs to rank k mod W.

    positions: which images make up the batches, ascending (M,). One batch is read ahead in a thread.
    """
    parts = np.array_split(positions, range(batch_size, len(positions), batch_size))
    mine = range(distributed.rank(), len(parts), distributed.world_size())
    with ThreadPoolExecutor(1) as reader:
        reads = (reader.submit(source.read, parts[index]) for index in mine)
        ahead = next(reads, None)
        for index in mine:
            current, ahead = ahead, next(reads, None)
            yield index, parts[index], current.result()
