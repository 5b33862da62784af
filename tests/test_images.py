import numpy as np
import pytest
import torch
from PIL import Image

from utils.images import plot_curves, save_grid, save_png, tile, to_uint8


@pytest.fixture
def images():
    """6 images (H 4, W 5), each of one colour."""
    colours = np.arange(18, dtype=np.uint8).reshape(6, 1, 1, 3) * 10
    return np.broadcast_to(colours, (6, 4, 5, 3)).copy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_is_the_floor_of_the_scaled_value_clipped(dtype):
    values = torch.tensor([-1.5, -1.0, -0.995, 0.0, 0.5, 0.999, 1.0, 1.7], dtype=dtype)
    wanted = [0, 0, 0, 127, 191, 254, 255, 255]  # by hand: (x + 1) * 127.5, cut off
    images = values.view(1, 1, 2, 4).expand(3, 3, 2, 4)
    converted = to_uint8(images)
    assert converted.shape == (3, 2, 4, 3) and converted.dtype == torch.uint8
    assert converted[1, :, :, 2].flatten().tolist() == wanted


def test_to_uint8_inverts_the_usual_scaling_of_every_grey_level_to_one_level():
    grey = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    error = to_uint8(grey / 127.5 - 1)[0, :, :, 0].int() - grey[0, 0]
    assert error.min() >= -1 and error.max() == 0  # floor may lose one level to rounding


def test_save_png_keeps_every_pixel(tmp_path, images):
    for kind, image in (("array", images[3]), ("tensor", torch.from_numpy(images[3]))):
        path = tmp_path / f"{kind}.png"
        save_png(path, image)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), images[3])


def test_save_png_refuses_floats(tmp_path, images):
    with pytest.raises(ValueError, match="float64, wanted uint8"):
        save_png(tmp_path / "a.png", images[0] / 255)


def test_tile_goes_row_by_row_and_leaves_missing_cells_white(images):
    tiled = tile(images[:5], columns=3)
    assert tiled.shape == (2 * 4, 3 * 5, 3)
    for index in range(5):
        row, column = divmod(index, 3)
        np.testing.assert_array_equal(tiled[row * 4:row * 4 + 4, column * 5:column * 5 + 5], images[index])
    assert (tiled[4:, 10:] == 255).all()


def test_grid_holds_the_enlarged_images_at_the_lower_right(tmp_path, images):
    picture = save_grid(tmp_path / "new folder" / "grid.png", images, labels=["ankle boot", "bag"], title="T")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new folder" / "grid.png")), picture)
    grid = tile(images, columns=3).repeat(13, axis=0).repeat(13, axis=1)  # 5 pixels wide become 65, the first multiple above 64
    np.testing.assert_array_equal(picture[-6 - len(grid):-6, -6 - grid.shape[1]:-6], grid)
    left = picture[-6 - len(grid):-6, :-6 - grid.shape[1]]
    for row in (left[:52], left[52:]):
        assert (row < 100).any()  # ink beside each row
        assert (row[:, :6] == 255).all() and (row[:, -6:] == 255).all()  # nothing cut off at either side


def test_grid_is_no_larger_than_it_needs_to_be(tmp_path, images):
    for count, wanted in ((1, (4 * 13, 65)), (5, (2 * 4 * 13, 3 * 65)), (2, (4 * 13, 2 * 65))):
        picture = save_grid(tmp_path / "grid.png", images[:count])
        assert picture.shape == (wanted[0] + 12, wanted[1] + 12, 3)  # a margin of 6 all round


def test_large_images_are_not_enlarged(tmp_path):
    assert save_grid(tmp_path / "grid.png", np.zeros((4, 80, 64, 3), np.uint8)).shape == (160 + 12, 128 + 12, 3)


def label_ink(tmp_path, images, text):
    """What is drawn beside a grid of one row: True where there is ink."""
    picture = save_grid(tmp_path / "grid.png", images, labels=[text])
    return (picture[:, :-6 - 6 * 65] < 128).any(axis=2)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_labels_show_letters_with_accents(tmp_path, images):
    """A font without a letter draws the same box for each of them."""
    drawn = [label_ink(tmp_path, images, letter) for letter in "åäöéñ\u0378"]  # the last one is no letter: it is the box
    for i, one in enumerate(drawn):
        for other in drawn[i + 1:]:
            assert one.shape != other.shape or (one != other).any()


def test_long_labels_are_cut_with_an_ellipsis(tmp_path, images):
    ink = label_ink(tmp_path, images, "English springer, English springer spaniel")
    assert 130 < ink.shape[1] < 190
    assert not ink[:, :6].any() and not ink[:, -6:].any()
    assert label_ink(tmp_path, images, "English springer").shape[1] < ink.shape[1]


def test_a_long_title_widens_the_picture_rather_than_being_cut(tmp_path, images):
    picture = save_grid(tmp_path / "grid.png", images, title="a title that is much wider than these small images")
    assert (picture[:, -6:] == 255).all() and (picture[:25, 210:] < 100).any()


def test_labels_that_do_not_fit_are_a_bug_of_the_caller(tmp_path, images):
    with pytest.raises(AssertionError, match="one label per row"):
        save_grid(tmp_path / "grid.png", images, labels=["a", "b", "c", "d"])


def test_plot_curves_draws_each_series_in_its_own_colour(tmp_path):
    path = tmp_path / "plots" / "loss.png"
    plot_curves(path, {"raw": ([1, 2, 3], [0.5, 0.4, 0.3]), "mean": ([1, 2, 3], [0.6, 0.5, 0.4])}, "images", "loss", "Training")
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14)):  # the first two colours of matplotlib's cycle
        assert (pixels == colour).all(axis=1).sum() > 100
