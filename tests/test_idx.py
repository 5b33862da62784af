import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from dataset.idx import FASHION_MNIST_CLASSES, load_fashion_mnist, read_idx

ASSETS = Path(__file__).parents[1] / "assets" / "fashion-mnist"


def idx_bytes(array, code=0x08):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_read_idx_returns_what_was_stored(tmp_path, compress):
    array = (np.arange(24, dtype=np.uint8) * 5).reshape(2, 3, 4)
    path = tmp_path / "file"
    path.write_bytes(compress(idx_bytes(array)))
    read = read_idx(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("damage, message", [
    (lambda data: data[:-1], "cannot reshape array of size 23 into shape .2,3,4."),
    (lambda data: data[:7], "requires a buffer of at least 16 bytes"),
    (lambda data: data + b"x", "cannot reshape array of size 25"),
    (lambda data: b"PK" + data[2:], "no idx file of bytes, it starts with 504b0803"),
    (lambda data: b"", "no idx file of bytes, it starts with nothing"),
    (lambda data: data[:2] + b"\x0d" + data[3:], "no idx file of bytes"),
    (lambda data: gzip.compress(data)[:-9], "cannot be read: "),
    (lambda data: gzip.compress(data)[:-8] + b"12345678", "cannot be read: "),
])
def test_damaged_files_are_refused_by_name(tmp_path, damage, message):
    path = tmp_path / "broken-idx3-ubyte"
    path.write_bytes(damage(idx_bytes(np.ones((2, 3, 4), np.uint8))))
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)


def test_fashion_mnist_test_split_is_the_published_one():
    images, labels = load_fashion_mnist(ASSETS, "test")
    assert images.shape == (10_000, 32, 32) and images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [1000] * len(FASHION_MNIST_CLASSES)
    assert not images[:, :2].any() and not images[:, :, -2:].any()
    assert FASHION_MNIST_CLASSES[labels[0]] == "ankle boot"  # the first test image, well known


def test_missing_split_says_what_was_wanted(tmp_path):
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz"):
        load_fashion_mnist(tmp_path, "train")


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((3, 28, 28), np.uint8)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(2, np.uint8)))
    with pytest.raises(ValueError, match="labels"):
        load_fashion_mnist(tmp_path, "test")
