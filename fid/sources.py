"""Image sets to measure, all images of one size, read in batches that the processes share. dataset.images decodes them."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dataset.base import open_npz
from dataset.images import ArrayImages, open_images
from dataset.stream import read_ahead
from utils import distributed
from utils.cli import UserError

DECODERS = min(8, os.cpu_count() or 1)
SIZES_CHECKED = 64  # images that are read before any work, to see whether all have one size; the others are checked later


class Source:
    """An image set of one size, or a random part of it. Raises UserError for a set that cannot be measured.

    images: a path that dataset.images.open_images takes, or an array (N, H, W, 3) uint8.
    num: how many images, drawn by `seed` and kept in file order; None takes all. option: what the user calls `num`.
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
        self.size = self.images.picture(0).shape[1::-1]  # (width, height)
        self.decoders = ThreadPoolExecutor(DECODERS)
        list(self.decoders.map(self._picture, np.linspace(0, total - 1, min(total, SIZES_CHECKED)).astype(int)))

    def __len__(self):
        return len(self.chosen)

    def read(self, positions):
        """The images (n, H, W, 3) uint8 at these positions."""
        return np.stack(list(self.decoders.map(self._picture, self.chosen[positions])))

    def _picture(self, index):
        picture = self.images.picture(index)
        size = picture.shape[1::-1]
        if size != self.size:
            first, this = (self.images.names[i] if self.images.names else f"image {i}" for i in (0, index))
            raise UserError(f"{self.name}: mixed sizes, {first} is {self.size[0]}x{self.size[1]} and {this} is {size[0]}x{size[1]}; "
                            "give a folder of the samples alone, or crop and resize all to one size first")
        return picture


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
    """Yield this process's (batch_index, images (n, H, W, 3) uint8) of the images at these positions (M,): rank k mod W has batch k.

    So the batches do not depend on the number of processes. The next one is read while one is used.
    """
    parts = np.array_split(positions, range(batch_size, len(positions), batch_size))
    mine = range(distributed.rank(), len(parts), distributed.world_size())
    with ThreadPoolExecutor(1) as reader:
        yield from zip(mine, read_ahead(reader, source.read, (parts[index] for index in mine), depth=1))
