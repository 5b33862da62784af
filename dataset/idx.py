"""The idx format of MNIST and Fashion-MNIST, of unsigned bytes: big-endian header, then a raw array; gzip or plain."""

import gzip
import math
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
    """The uint8 array of one idx file. Raises UserError if it is damaged or holds another type.

    Source: the format's description on the MNIST page (LeCun, Cortes, Burges).
    """
    with reading(path):
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise UserError(f"{path} is not an idx file of bytes: it starts with {data[:4].hex() or 'nothing'}, wanted 000008NN")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start]) if len(data) >= start else None
    wanted = start if shape is None else start + math.prod(shape)
    if len(data) != wanted:
        state = "is cut short" if len(data) < wanted else "has bytes left over"
        raise UserError(f"{path} {state}: {len(data)} bytes, its header (shape {shape}) wants {wanted}; fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_idx_set(path):
    """Images (N, H, W) and labels (N,) of an idx images file, and the class names if it is Fashion-MNIST.

    The labels lie beside it, named `labels-idx1` in place of `images-idx3`, gzip or plain.
    """
    path = Path(path)
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = read_idx(_gzip_or_plain(path.parent, stem, f"{path.name} needs its labels"))
    return read_idx(path), labels, FASHION_MNIST_CLASSES if "fashion" in path.resolve().parent.name.lower() else ()


def load_fashion_mnist(folder, split):
    """Images (N, 32, 32) uint8, padded with black from 28x28, and labels (N,) int64 of Fashion-MNIST (or MNIST).

    folder: holds `train-*` or `t10k-*` idx files under their published names. split: "train" (60,000 images) or "test" (10,000).
    Raises UserError for missing files or files that do not fit together.
    """
    name = f"{SPLIT_PREFIXES[split]}-images-idx3-ubyte"
    path = _gzip_or_plain(folder, name, "`python3 download_assets.py --name fashion-mnist` fetches the set")
    images, labels, _ = read_idx_set(path)
    if images.shape != (*labels.shape, 28, 28):
        raise UserError(f"{path} holds images of shape {images.shape} and labels of shape {labels.shape}, wanted (N, 28, 28) and (N,)")
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels.astype(np.int64)


def _gzip_or_plain(folder, name, remedy):
    for path in (Path(folder, f"{name}.gz"), Path(folder, name)):
        if path.is_file():
            return path
    raise UserError(f"neither {name}.gz nor {name} is in {folder}; {remedy}")
