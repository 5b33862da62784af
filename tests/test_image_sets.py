import gzip
import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from dataset.images import CorruptImage, centre_crop, open_image_set

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (20, 31, 3), np.uint8)


def encoded(array, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def write_folder(path, files):
    for name, data in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def squares(*values):
    """PNG files of 8x8 images of one grey each."""
    return [encoded(np.full((8, 8, 3), value, np.uint8)) for value in values]


# ---- the crop

@pytest.mark.parametrize("height, width, top, left", [(8, 8, 0, 0), (8, 15, 0, 3), (13, 8, 2, 0)])
def test_crop_of_an_image_of_the_right_size_takes_the_middle(height, width, top, left):
    image = RNG.integers(0, 256, (height, width, 3), np.uint8)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(image), 8), image[top:top + 8, left:left + 8].transpose(2, 0, 1))


@pytest.mark.parametrize("times", [2, 4])
def test_crop_halves_with_a_box_filter_first(times):
    """An image of the size times 2 or 4 ends at the rounded mean of 2x2 blocks, taken once or twice."""
    image = RNG.integers(0, 256, (8 * times, 8 * times, 3), np.uint8)
    wanted = image.astype(int)
    while len(wanted) > 8:
        wanted = np.floor(wanted.reshape(len(wanted) // 2, 2, -1, 2, 3).mean((1, 3)) + 0.5)
    difference = np.abs(centre_crop(Image.fromarray(image), 8).transpose(1, 2, 0) - wanted)
    # Pillow filters the two directions one after the other and rounds after each: at most 1 for each halving. Noise filtered
    # bicubically instead, or only once, would differ by tens.
    assert difference.max() <= times / 2


def test_crop_keeps_a_ramp_and_its_middle():
    """A horizontal ramp of slope 1, 20x36, shrunk to 10x18: bicubic keeps a ramp away from the borders.

    Halving gives value 2i + 0.5 at column i of 18; the middle 10 columns are 4..13. Rounding at each of two steps: 1.
    """
    ramp = np.broadcast_to(np.arange(36, dtype=np.uint8)[None, :, None], (20, 36, 3))
    found = centre_crop(Image.fromarray(np.ascontiguousarray(ramp)), 10)
    assert np.abs(found - (2 * np.arange(4, 14) + 0.5)).max() <= 1


@pytest.mark.parametrize("height, width, size", [(5, 7, 16), (100, 17, 16), (31, 33, 16), (16, 333, 16)])
def test_crop_always_gives_the_size(height, width, size):
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))
    assert centre_crop(image, size).shape == (3, size, size)


# ---- layouts

LAYOUTS = {"folder": write_folder, "zip": lambda path, files: write_zip(path.with_suffix(".zip"), files)}


@pytest.fixture(params=LAYOUTS)
def write(request, tmp_path):
    return lambda files: LAYOUTS[request.param](tmp_path / "set", files)


def test_classes_are_the_sorted_folders(write):
    a, b, c, d = squares(10, 20, 30, 40)
    images = open_image_set(write({"dog/x.png": a, "cat/z.png": b, "cat/Y.PNG": c, "emu/1.png": d, "emu/read.me": b""}), 8)
    assert images.names == ["cat/Y.PNG", "cat/z.png", "dog/x.png", "emu/1.png"]
    assert (images.class_names, images.num_classes) == (["cat", "dog", "emu"], 3)
    pixels, labels = images.read([2, 0, 3, 1])
    assert pixels[:, 0, 0, 0].tolist() == [10, 30, 40, 20] and labels.tolist() == [1, 0, 2, 0]


def test_flat_images_have_no_classes(write):
    images = open_image_set(write(dict(zip(("b.png", "a.png"), squares(1, 2)))), 8)
    assert (len(images), images.num_classes, images.class_names) == (2, 0, [])
    assert images.read([0])[0][0, 0, 0, 0] == 2 and images.read([0])[1].tolist() == [0]


def test_dataset_json_goes_before_folders(write):
    files = dict(zip(("00/0.png", "00/1.png"), squares(1, 2)))
    files["dataset.json"] = json.dumps({"labels": [["00/1.png", 0], ["00/0.png", 6]]}).encode()
    images = open_image_set(write(files), 8)
    assert images.num_classes == 7 and images.read([0, 1])[1].tolist() == [6, 0]


def test_dataset_json_without_labels_leaves_the_folders(write):
    files = dict(zip(("a.png", "b.png"), squares(1, 2)))
    assert open_image_set(write({**files, "dataset.json": b'{"labels": null}'}), 8).num_classes == 0


@pytest.mark.parametrize("extra, message", [
    ({"dataset.json": b'{"labels": [["a/0.png", 1]]}'}, "dataset.json has no label for b/0.png"),
    ({"dataset.json": b'{"labels": 5}'}, "dataset.json is not"),
    ({"dataset.json": b'[]'}, "dataset.json is not"),
    ({"train/a/0.png": b""}, "train/a/0.png lies two folders deep"),
    ({"0.png": b""}, "0.png lies beside class folders"),
])
def test_unclear_layouts_are_refused(write, extra, message):
    files = dict(zip(("a/0.png", "b/0.png"), squares(1, 2)))
    with pytest.raises(ValueError, match=message):
        open_image_set(write({**files, **extra}), 8)


def test_hidden_files_are_no_images(write):
    files = {"a/0.png": squares(1)[0], "a/._0.png": b"", ".thumbs/0.png": b"", "__MACOSX/a/0.png": b""}
    assert open_image_set(write(files), 8).names == ["a/0.png"]


def test_every_mode_becomes_rgb(write):
    grey = np.full((8, 8), 100, np.uint8)
    palette = Image.fromarray(grey).convert("P")
    stream = io.BytesIO()
    palette.save(stream, "GIF")
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 0, 0, 155)).save(cmyk, "JPEG")
    files = {"0.png": encoded(grey), "1.png": encoded(np.full((8, 8, 4), 100, np.uint8)), "2.gif": stream.getvalue(),
             "3.jpeg": cmyk.getvalue(), "4.webp": encoded(np.full((8, 8, 3), 100, np.uint8), "WEBP", lossless=True)}
    pixels, _ = open_image_set(write(files), 8).read(range(5))
    assert pixels.shape == (5, 3, 8, 8) and np.abs(pixels.astype(int) - 100).max() <= 2  # JPEG is not exact


def test_damaged_images_are_told_by_name(write):
    jpeg = encoded(RNG.integers(0, 256, (40, 40, 3), np.uint8), "JPEG")
    images = open_image_set(write({"a/cut.jpg": jpeg[:700], "a/empty.jpg": b"", "b/text.png": b"hello" * 50, "b/ok.jpg": jpeg}), 8)
    images.read([2])
    for index, name in ((0, "a/cut.jpg"), (1, "a/empty.jpg"), (3, "b/text.png")):
        with pytest.raises(CorruptImage, match=f"set.*: {name} cannot be read: ") as caught:
            images.read([2, index])
        assert caught.value.image == name and pickle.loads(pickle.dumps(caught.value)).image == name


def test_image_damaged_inside_a_zip_is_told_by_name(tmp_path):
    path = write_zip(tmp_path / "set.zip", dict(zip(("a.png", "b.png"), squares(1, 2))))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    path.write_bytes(data)
    images = open_image_set(path, 8)
    images.read([1])
    with pytest.raises(CorruptImage, match="a.png cannot be read: .*CRC"):
        images.read([0])


def test_zip_cut_short_is_told(tmp_path):
    path = write_zip(tmp_path / "set.zip", {"a.png": squares(1)[0]})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="set.zip is cut short or not a zip"):
        open_image_set(path, 8)


def test_open_zip_can_be_pickled(tmp_path):
    images = open_image_set(write_zip(tmp_path / "set.zip", {"a.png": squares(77)[0]}), 8)
    images.read([0])
    assert pickle.loads(pickle.dumps(images)).read([0])[0].max() == 77


def test_mirrored_images_follow_the_others(write):
    images = open_image_set(write({"a/0.png": encoded(PHOTO), "b/0.png": squares(1)[0]}), 8, xflip=True)
    pixels, labels = images.read([0, 2, 3])
    assert len(images) == 4 and labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(pixels[1], pixels[0][:, :, ::-1])


@pytest.mark.parametrize("index", [-1, 1])
def test_index_outside_the_set_is_refused(tmp_path, index):
    images = open_image_set(write_folder(tmp_path, {"a.png": squares(1)[0]}), 8)
    with pytest.raises(IndexError, match="samples 0..0"):
        images.read([index])


@pytest.mark.parametrize("name", ["nowhere", "notes.txt", "empty"])
def test_nothing_to_read_says_what_is_wanted(tmp_path, name):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="wanted"):
        open_image_set(tmp_path / name, 8)


# ---- arrays

def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(path, images, labels):
    path.mkdir(exist_ok=True)
    (path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    if labels is not None:
        (path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return path


def test_idx_images_get_a_black_border_and_three_channels(tmp_path):
    grey, labels = RNG.integers(0, 256, (3, 28, 28), np.uint8), np.array([4, 0, 9], np.uint8)
    images = open_image_set(write_idx(tmp_path / "fashion", grey, labels), 32)
    pixels, found = images.read([0, 2])
    np.testing.assert_array_equal(pixels, np.repeat(np.pad(grey[[0, 2]], ((0, 0), (2, 2), (2, 2)))[:, None], 3, axis=1))
    assert found.tolist() == [4, 9] and images.num_classes == 10 and images.class_names[9] == "ankle boot"
    assert open_image_set(tmp_path / "fashion", 56).read([0])[0][0, :, 0, 0].max() > 0 or grey[0, 0, 0] == 0  # enlarged, no border


def test_idx_problems_are_told(tmp_path):
    grey = np.zeros((3, 28, 28), np.uint8)
    with pytest.raises(ValueError, match="neither t10k-labels-idx1-ubyte.gz nor t10k-labels-idx1-ubyte"):
        open_image_set(write_idx(tmp_path / "a", grey, None), 32)
    with pytest.raises(ValueError, match=r"labels are uint8 of shape \(2,\), wanted integers \(3,\)"):
        open_image_set(write_idx(tmp_path / "b", grey, np.zeros(2, np.uint8)), 32)
    path = write_idx(tmp_path / "c", grey, np.zeros(3, np.uint8))
    (path / "train-images-idx3-ubyte").write_bytes(idx_bytes(grey))
    with pytest.raises(ValueError, match="several idx sets .t10k-images-idx3-ubyte.gz, train-images-idx3-ubyte"):
        open_image_set(path, 32)
    assert len(open_image_set(path / "t10k-images-idx3-ubyte.gz", 32)) == 3


@pytest.mark.parametrize("key", ["labels", "arr_1", None])
def test_npz_images(tmp_path, key):
    colour = RNG.integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.savez_compressed(tmp_path / "set.npz", arr_0=colour, **({key: np.array([1, 0, 3])} if key else {}))
    images = open_image_set(tmp_path / "set.npz", 8)
    pixels, labels = images.read([2, 0])
    np.testing.assert_array_equal(pixels, colour[[2, 0]].transpose(0, 3, 1, 2))
    assert (labels.tolist(), images.num_classes) == (([3, 1], 4) if key else ([0, 0], 0))


@pytest.mark.parametrize("arrays, message", [
    ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "images are float32"),
    ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"images are uint8 of shape \(2, 3, 8, 8\), wanted"),
    ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "no images under arr_0"),
    ({"arr_0": np.array([{}, {}])}, "not an npz of numbers"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros((2, 10), np.float32)}, "labels are float32"),
])
def test_npz_problems_are_told(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=f"set.npz.*{message}"):
        open_image_set(tmp_path / "set.npz", 8)


def test_fingerprint_sees_names_and_labels(tmp_path):
    a, b = squares(1, 2)
    prints = [open_image_set(write_folder(tmp_path / str(i), files), 8).fingerprint()
              for i, files in enumerate(({"x/0.png": a, "y/0.png": b}, {"x/0.png": a, "x/1.png": b}, {"x/0.png": b, "y/0.png": a}))]
    assert prints[0] != prints[1] and prints[0] == prints[2]
