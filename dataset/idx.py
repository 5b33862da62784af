"""The idx format of MNIST and Fashion-MNIST: big-endian header, then a raw array; gzip or plain."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from utils.cli import UserError

FASHION_MNIST_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)

# Type codes of the format (third byte of the file); multi-byte values are big-endian.
IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

SPLIT_PREFIXES = {"train": "train", "test": "t10k"}


def read_idx(path):
    """Read one idx file, gzip-compressed or plain.

    Returns a writable array with the shape and type the file states, in native byte order.
    Raises UserError (naming the file) if it is not idx, is cut short or has bytes left over.
    Source: the format's description on the MNIST page (LeCun, Cortes, Burges).
    """
    path = Path(path)
    data = _read_bytes(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in IDX_DTYPES:
        raise UserError(f"{path} is not an idx file: it starts with {data[:4].hex() or 'nothing'}, wanted 0000TTNN "
                        f"(type, number of dimensions)")
    dtype, num_dims = np.dtype(IDX_DTYPES[data[2]]), data[3]
    header_bytes = 4 + 4 * num_dims
    if len(data) < header_bytes:
        raise UserError(f"{path} is cut short: {len(data)} bytes, its header alone has {header_bytes}; fetch it again")
    shape = struct.unpack(f">{num_dims}I", data[4:header_bytes])
    wanted = header_bytes + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(data) != wanted:
        state = "is cut short" if len(data) < wanted else "has bytes left over"
        raise UserError(f"{path} {state}: {len(data)} bytes, its header (shape {shape}) wants {wanted}; fetch it again")
    array = np.frombuffer(data, dtype, offset=header_bytes).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def read_idx_set(path):
    """Images (N, H, W) and labels (N,) of an idx images file, and the class names if it is Fashion-MNIST.

    The labels lie beside it, named `labels-idx1` in place of `images-idx3`, gzip or plain.
    """
    path = Path(path)
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = read_idx(_gzip_or_plain(path.parent, stem, f"{path.name} needs its labels"))
    return read_idx(path), labels, FASHION_MNIST_CLASSES if "fashion" in path.resolve().parent.name.lower() else ()


def load_fashion_mnist(folder, split):
    """Load one split of Fashion-MNIST (or MNIST), padded with black from 28x28 to 32x32.

    folder: holds `train-*` or `t10k-*` idx files under their published names, gzip or plain.
    split: "train" (60,000 images) or "test" (10,000).
    Returns images (N, 32, 32) uint8 and labels (N,) int64. Raises UserError for missing files or files that do not fit together.
    """
    name = f"{SPLIT_PREFIXES[split]}-images-idx3-ubyte"
    path = _gzip_or_plain(folder, name, "`python3 download_assets.py --name fashion-mnist` fetches the set")
    images, labels, _ = read_idx_set(path)
    if images.shape != (*labels.shape, 28, 28) or images.dtype != np.uint8:
        raise UserError(f"{path} holds {images.dtype} of shape {images.shape} and labels of shape {labels.shape}, wanted uint8 (N, 28, 28)")
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels.astype(np.int64)


def _read_bytes(path):
    """The file's bytes, decompressed if they are gzip (told by its first two bytes, not by the name)."""
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut short or damaged gzip ({error}); fetch it again") from error


def _gzip_or_plain(folder, name, remedy):
    for path in (Path(folder, f"{name}.gz"), Path(folder, name)):
        if path.is_file():
            return path
    raise UserError(f"neither {name}.gz nor {name} is in {folder}; {remedy}")
