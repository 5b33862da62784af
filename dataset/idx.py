"""The idx format of MNIST (LeCun, Cortes, Burges), of unsigned bytes: big-endian header, then a raw array; gzip or plain."""

import gzip
import struct
from pathlib import Path

import numpy as np

from dataset.base import reading
from utils.cli import UserError

FASHION_MNIST_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)
SPLIT_PREFIXES = {"train": "train", "test": "t10k"}


def read_idx(path):
    """The uint8 array of one idx file. Raises UserError if it is damaged or holds another type."""
    with reading(path):
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        if data[:3] != b"\0\0\x08":
            raise ValueError(f"no idx file of bytes, it starts with {data[:4].hex() or 'nothing'}, wanted 000008NN")
        shape = struct.unpack_from(f">{data[3]}I", data, 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def read_idx_set(path, resolution=None):
    """Images (N, H, W) and labels (N,) uint8 of an idx images file, and the class names if it is Fashion-MNIST.

    resolution: smaller images get a black border up to this many pixels a side, unless they are smaller by half.
    The labels lie beside the images, named `labels-idx1` in place of `images-idx3`, gzip or plain.
    """
    path = Path(path)
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = read_idx(_gzip_or_plain(path.parent, stem, f"{path.name} needs its labels"))
    images = read_idx(path)
    sides = images.shape[1:]
    if resolution and len(sides) == 2 and max(sides) <= resolution < 2 * min(sides):
        images = np.pad(images, [(0, 0), *(((resolution - side) // 2, (resolution - side + 1) // 2) for side in sides)])
    return images, labels, FASHION_MNIST_CLASSES if "fashion" in path.resolve().parent.name.lower() else ()


def load_fashion_mnist(folder, split):
    """Images (N, 32, 32) uint8, padded with black from 28x28, and labels (N,) int64 of Fashion-MNIST (or MNIST).

    folder: holds `train-*` or `t10k-*` idx files under their published names. split: "train" (60,000 images) or "test" (10,000).
    """
    name = f"{SPLIT_PREFIXES[split]}-images-idx3-ubyte"
    path = _gzip_or_plain(folder, name, "`python3 download_assets.py --name fashion-mnist` fetches the set")
    images, labels, _ = read_idx_set(path, 32)
    if images.shape != (*labels.shape, 32, 32):
        raise UserError(f"{path}: images of shape {images.shape} with {len(labels)} labels, wanted one each and 28 x 28 pixels")
    return images, labels.astype(np.int64)


def _gzip_or_plain(folder, name, remedy):
    for path in (Path(folder, f"{name}.gz"), Path(folder, name)):
        if path.is_file():
            return path
    raise UserError(f"neither {name}.gz nor {name} is in {folder}; {remedy}")
