import gzip
import io
import json
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from dataset.images import CorruptImage, centre_crop, open_images, read_picture
from utils.cli import UserError

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


# ---- one picture

def picture(data):
    return read_picture(io.BytesIO(data), "x")


def saved(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_a_picture_is_read_bit_for_bit(kind):
    found = picture(encoded(PHOTO, kind))
    np.testing.assert_array_equal(found, PHOTO)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    """The upper byte is kept: 257 * v, which is the 16-bit form of v, gives v back; 999 is 3.9 of 255."""
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    found = picture(saved(Image.fromarray(grey), kind))
    np.testing.assert_array_equal(found, np.repeat((grey // 257)[..., None], 3, axis=2))
    assert (picture(saved(Image.fromarray(np.full((4, 4), 999, np.uint16)), kind)) == 3).all()


def test_16_bit_colour_is_scaled_as_grey_is():
    """A PNG with 16 bits per channel written by hand, as Pillow cannot: the upper byte is kept as well."""
    wide = PHOTO.astype(">u2") * 256 + RNG.integers(0, 256, PHOTO.shape).astype(">u2")
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    png = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 31, 20, 16, 2, 0, 0, 0))
           + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(picture(png), PHOTO)


def test_floats_from_0_to_1_are_scaled_and_others_refused():
    grey = np.array([[0, 0.5, 1, 0.25]], np.float32)
    assert picture(saved(Image.fromarray(grey), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 64]  # rounded
    for wrong in (1.5, -0.1, 200.0, np.nan):
        with pytest.raises(CorruptImage, match="x cannot be read: float32 values from .*, wanted 0 to 1; "):
            picture(saved(Image.fromarray(np.array([[0, wrong]], np.float32)), "TIFF"))


def test_integers_beyond_16_bits_are_refused():
    with pytest.raises(CorruptImage, match="int32 values from 0 to 70000, wanted 0 to 65535"):
        picture(saved(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"))


@pytest.mark.parametrize("orientation, turn", [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)), (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
    (8, lambda a: np.rot90(a, 1))])
def test_rotation_in_exif_is_applied(orientation, turn):
    """The eight orientations of the EXIF standard, as turns and mirrorings of the stored array."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(picture(encoded(PHOTO, "PNG", exif=exif)), turn(PHOTO))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_broken_exif_does_not_cost_the_picture(kind, exif):
    plain, marked = encoded(PHOTO, kind, quality=90), encoded(PHOTO, kind, quality=90, exif=exif)
    np.testing.assert_array_equal(picture(marked), picture(plain))


def test_transparent_parts_are_laid_on_white():
    alpha = np.array([0, 51, 255], np.uint8)  # none, a fifth, all of a colour
    colour = np.zeros((1, 3, 4), np.uint8)
    colour[0, :, 0], colour[0, :, 3] = 200, alpha
    assert picture(encoded(colour)).tolist() == [[[255, 255, 255], [244, 204, 204], [200, 0, 0]]]
    grey = np.stack([np.full((1, 3), 100, np.uint8), alpha[None]], axis=2)
    assert picture(encoded(grey))[0, :, 0].tolist() == [255, 224, 100]
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert picture(saved(palette, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_an_opaque_alpha_channel_changes_nothing():
    opaque = np.concatenate([PHOTO, np.full((20, 31, 1), 255, np.uint8)], axis=2)
    np.testing.assert_array_equal(picture(encoded(opaque)), PHOTO)


# ---- layouts

LAYOUTS = {"folder": write_folder, "zip": lambda path, files: write_zip(path.with_suffix(".zip"), files)}


@pytest.fixture(params=LAYOUTS)
def write(request, tmp_path):
    return lambda files: LAYOUTS[request.param](tmp_path / "set", files)


def test_classes_are_the_sorted_folders(write):
    a, b, c, d = squares(10, 20, 30, 40)
    images = open_images(write({"dog/x.png": a, "cat/z.png": b, "cat/Y.PNG": c, "emu/1.png": d, "emu/read.me": b""}), 8)
    assert images.names == ["cat/Y.PNG", "cat/z.png", "dog/x.png", "emu/1.png"]
    assert (images.class_names, images.num_classes) == (["cat", "dog", "emu"], 3)
    pixels, labels = images.read([2, 0, 3, 1])
    assert pixels[:, 0, 0, 0].tolist() == [10, 30, 40, 20] and labels.tolist() == [1, 0, 2, 0]


def test_flat_images_have_no_classes(write):
    images = open_images(write(dict(zip(("b.png", "a.png"), squares(1, 2)))), 8)
    assert (len(images), images.num_classes, images.class_names) == (2, 0, [])
    assert images.read([0])[0][0, 0, 0, 0] == 2 and images.read([0])[1].tolist() == [0]


def test_dataset_json_goes_before_folders(write):
    files = dict(zip(("00/0.png", "00/1.png"), squares(1, 2)))
    files["dataset.json"] = json.dumps({"labels": [["00/1.png", 0], ["00/0.png", 6]]}).encode()
    images = open_images(write(files), 8)
    assert images.num_classes == 7 and images.read([0, 1])[1].tolist() == [6, 0]


def test_dataset_json_without_labels_leaves_the_folders(write):
    files = dict(zip(("a.png", "b.png"), squares(1, 2)))
    assert open_images(write({**files, "dataset.json": b'{"labels": null}'}), 8).num_classes == 0


@pytest.mark.parametrize("extra, message", [
    ({"dataset.json": b'{"labels": [["a/0.png", 1]]}'}, "dataset.json .wanted .* with every image. cannot be read: KeyError.'b/0.png'."),
    ({"dataset.json": b'{"labels": 5}'}, "dataset.json .wanted .* cannot be read"),
    ({"dataset.json": b'[]'}, "dataset.json .wanted .* cannot be read"),
    ({"train/a/0.png": b""}, "found b/0.png and train/a/0.png, wanted all images as CLASS/IMAGE or none in a folder"),
    ({"0.png": b""}, "found 0.png and b/0.png, wanted all images as CLASS/IMAGE"),
])
def test_unclear_layouts_are_refused(write, extra, message):
    files = dict(zip(("a/0.png", "b/0.png"), squares(1, 2)))
    with pytest.raises(ValueError, match=message):
        open_images(write({**files, **extra}), 8)


def test_hidden_files_are_no_images(write):
    files = {"a/0.png": squares(1)[0], "a/._0.png": b"", ".thumbs/0.png": b"", "__MACOSX/a/0.png": b""}
    assert open_images(write(files), 8).names == ["a/0.png"]


def test_every_mode_becomes_rgb(write):
    grey = np.full((8, 8), 100, np.uint8)
    palette = Image.fromarray(grey).convert("P")
    stream = io.BytesIO()
    palette.save(stream, "GIF")
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 0, 0, 155)).save(cmyk, "JPEG")
    files = {"0.png": encoded(grey), "1.png": encoded(np.full((8, 8, 2), (100, 255), np.uint8)), "2.gif": stream.getvalue(),
             "3.jpeg": cmyk.getvalue(), "4.webp": encoded(np.full((8, 8, 3), 100, np.uint8), "WEBP", lossless=True)}
    pixels, _ = open_images(write(files), 8).read(range(5))
    assert pixels.shape == (5, 3, 8, 8) and np.abs(pixels.astype(int) - 100).max() <= 2  # JPEG is not exact


def test_without_a_resolution_images_keep_their_size(write):
    files = {"a/0.png": encoded(PHOTO), "b/1.png": squares(7)[0], "b/deep/2.png": squares(8)[0], "3.png": squares(9)[0]}
    images = open_images(write(files))
    assert (images.names, len(images), images.num_classes) == (["3.png", "a/0.png", "b/1.png", "b/deep/2.png"], 4, 0)
    np.testing.assert_array_equal(images.picture(1), PHOTO)
    assert images.picture(3).shape == (8, 8, 3) and images.picture(3).max() == 8


def test_damaged_images_are_told_by_name(write):
    jpeg = encoded(RNG.integers(0, 256, (40, 40, 3), np.uint8), "JPEG")
    images = open_images(write({"a/cut.jpg": jpeg[:700], "a/empty.jpg": b"", "b/text.png": b"hello" * 50, "b/ok.jpg": jpeg}), 8)
    images.read([2])
    for index, name in ((0, "a/cut.jpg"), (1, "a/empty.jpg"), (3, "b/text.png")):
        with pytest.raises(CorruptImage, match=f"set.*: {name} cannot be read: "):
            images.read([2, index])


def test_image_damaged_inside_a_zip_is_told_by_name(tmp_path):
    path = write_zip(tmp_path / "set.zip", dict(zip(("a.png", "b.png"), squares(1, 2))))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    path.write_bytes(data)
    images = open_images(path, 8)
    images.read([1])
    with pytest.raises(CorruptImage, match="a.png cannot be read: .*CRC"):
        images.read([0])


@pytest.mark.parametrize("place", [0, 5, 20, 28, 30, 40])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_in_a_zip_never_shows_an_address_or_errno(tmp_path, place, compression):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a.png", squares(1)[0])
        archive.writestr("b.png", b"no image at all")
    data = bytearray(path.read_bytes())
    data[place] ^= 255
    path.write_bytes(data)
    images = open_images(path, 8)
    for index, name in ((0, "a.png"), (1, "b.png")):
        try:
            images.read([index])  # a changed time stamp, say, harms nothing
        except CorruptImage as error:
            assert f"set.zip: {name} cannot be read: " in str(error) and "0x" not in str(error) and "Errno" not in str(error)


def test_encrypted_and_damaged_members_are_told(tmp_path):
    path = write_zip(tmp_path / "set.zip", {"a.png": squares(1)[0], "dataset.json": b'{"labels": null}'})
    data = bytearray(path.read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(header) + flags] |= 1  # says: encrypted
    path.write_bytes(data)
    with pytest.raises(CorruptImage, match="set.zip: a.png cannot be read: .*encrypted"):
        open_images(path, 8).read([0])
    path = write_zip(tmp_path / "other.zip", {"a.png": squares(1)[0], "dataset.json": b'{"labels": null}'})
    path.write_bytes(path.read_bytes().replace(b'{"labels": null}', b'{"labels": nul!}', 1))
    with pytest.raises(ValueError, match="other.zip: dataset.json cannot be read: .*CRC"):
        open_images(path, 8)


def test_links_in_a_loop_are_told_in_one_line(tmp_path):
    folder = write_folder(tmp_path / "set", {"a/0.png": squares(1)[0]})
    (folder / "b").symlink_to(folder / "a")
    assert open_images(folder, 8).names == ["a/0.png", "b/0.png"]  # a link elsewhere is followed
    (folder / "a" / "back").symlink_to(folder)
    with pytest.raises(UserError, match="set: [ab]/back is a link to a folder that it lies in; remove it"):
        open_images(folder, 8)
    (folder / "a" / "back").unlink()
    (folder / "a" / "self.png").symlink_to(folder / "a" / "self.png")
    with pytest.raises(CorruptImage, match="a/self.png cannot be read: .*symbolic links"):
        open_images(folder, 8).read([1])


def test_zip_cut_short_is_told(tmp_path):
    path = write_zip(tmp_path / "set.zip", {"a.png": squares(1)[0]})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="set.zip cannot be read: .*not a zip"):
        open_images(path, 8)


def test_open_zip_can_be_pickled(tmp_path):
    images = open_images(write_zip(tmp_path / "set.zip", {"a.png": squares(77)[0]}), 8)
    images.read([0])
    assert pickle.loads(pickle.dumps(images)).read([0])[0].max() == 77


def test_mirrored_images_follow_the_others(write):
    images = open_images(write({"a/0.png": encoded(PHOTO), "b/0.png": squares(1)[0]}), 8, xflip=True)
    pixels, labels = images.read([0, 2, 3])
    assert len(images) == 4 and labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(pixels[1], pixels[0][:, :, ::-1])


@pytest.mark.parametrize("index", [-1, 1])
def test_index_outside_the_set_is_refused(tmp_path, index):
    images = open_images(write_folder(tmp_path, {"a.png": squares(1)[0]}), 8)
    with pytest.raises(IndexError, match="samples 0..0"):
        images.read([index])


@pytest.mark.parametrize("name", ["nowhere", "notes.txt", "empty"])
def test_nothing_to_read_says_what_is_wanted(tmp_path, name):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="wanted"):
        open_images(tmp_path / name, 8)


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
    grey, labels = RNG.integers(0, 256, (3, 28, 28), np.uint8), np.array([4, 0, 8], np.uint8)
    images = open_images(write_idx(tmp_path / "fashion", grey, labels), 32)
    pixels, found = images.read([0, 2])
    np.testing.assert_array_equal(pixels, np.repeat(np.pad(grey[[0, 2]], ((0, 0), (2, 2), (2, 2)))[:, None], 3, axis=1))
    assert found.tolist() == [4, 8] and images.num_classes == 10 and images.class_names[9] == "ankle boot"
    enlarged = centre_crop(Image.fromarray(np.repeat(grey[0, :, :, None], 3, axis=2)), 56)  # smaller by half: no border
    np.testing.assert_array_equal(open_images(tmp_path / "fashion", 56).read([0])[0][0], enlarged)


def test_idx_problems_are_told(tmp_path):
    grey = np.zeros((3, 28, 28), np.uint8)
    with pytest.raises(ValueError, match="neither t10k-labels-idx1-ubyte.gz nor t10k-labels-idx1-ubyte"):
        open_images(write_idx(tmp_path / "a", grey, None), 32)
    with pytest.raises(ValueError, match=r"labels are uint8 of shape \(2,\), wanted integers \(3,\)"):
        open_images(write_idx(tmp_path / "b", grey, np.zeros(2, np.uint8)), 32)
    path = write_idx(tmp_path / "c", grey, np.zeros(3, np.uint8))
    (path / "train-images-idx3-ubyte").write_bytes(idx_bytes(grey))
    with pytest.raises(ValueError, match="several idx sets .t10k-images-idx3-ubyte.gz, train-images-idx3-ubyte"):
        open_images(path, 32)
    assert len(open_images(path / "t10k-images-idx3-ubyte.gz", 32)) == 3


@pytest.mark.parametrize("key", ["labels", "arr_1", None])
def test_npz_images(tmp_path, key):
    colour = RNG.integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.savez_compressed(tmp_path / "set.npz", arr_0=colour, **({key: np.array([1, 0, 3])} if key else {}))
    images = open_images(tmp_path / "set.npz", 8)
    pixels, labels = images.read([2, 0])
    np.testing.assert_array_equal(pixels, colour[[2, 0]].transpose(0, 3, 1, 2))
    assert (labels.tolist(), images.num_classes) == (([3, 1], 4) if key else ([0, 0], 0))


@pytest.mark.parametrize("arrays, message", [
    ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "images are float32"),
    ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"images are uint8 of shape \(2, 3, 8, 8\), wanted"),
    ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "no array arr_0; found images"),
    ({"arr_0": np.array([{}, {}])}, "arr_0 cannot be read: it does not hold plain numbers"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros((2, 10), np.float32)}, "labels are float32"),
])
def test_npz_problems_are_told(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=f"set.npz.*{message}"):
        open_images(tmp_path / "set.npz", 8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_plainly_stored_npz_images_are_mapped_not_read(tmp_path, save):
    colour = RNG.integers(0, 256, (3, 8, 9, 3), np.uint8)
    save(tmp_path / "set.npz", labels=np.arange(3), arr_0=colour)
    images = open_images(tmp_path / "set.npz")
    assert isinstance(images.array, np.memmap) == (save is np.savez) and images.picture(0).shape == (8, 9, 3)
    np.testing.assert_array_equal([images.picture(i) for i in range(3)], colour)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_changed_bytes_in_npz_are_told_or_harmless(tmp_path, save):
    """Each byte of the file, up to the pixels, is changed in turn: what opens is as it was, or the file is named."""
    colour = RNG.integers(0, 256, (2, 4, 4, 3), np.uint8)
    save(tmp_path / "whole.npz", arr_0=colour)
    whole, refused = (tmp_path / "whole.npz").read_bytes(), 0
    for place in range(0, 200, 3):
        (tmp_path / "set.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1:])
        try:
            np.testing.assert_array_equal(open_images(tmp_path / "set.npz").array.shape, colour.shape)
        except UserError as error:
            refused += "set.npz" in str(error)
    assert refused > 20


@pytest.mark.parametrize("content", [b"PK\3\4", pickle.dumps([1]), b"", b"hello"])
def test_npz_that_is_none_is_told_without_advice_to_unpickle(tmp_path, content):
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(UserError, match="set.npz cannot be read: ") as caught:
        open_images(tmp_path / "set.npz", 8)
    assert "allow_pickle" not in str(caught.value)


def test_fingerprint_sees_names_and_labels(tmp_path):
    a, b = squares(1, 2)
    prints = [open_images(write_folder(tmp_path / str(i), files), 8).fingerprint()
              for i, files in enumerate(({"x/0.png": a, "y/0.png": b}, {"x/0.png": a, "x/1.png": b}, {"x/0.png": b, "y/0.png": a}))]
    assert prints[0] != prints[1] and prints[0] == prints[2]
