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
        path = tmp_path / "new folder" / f"{kind}.png"
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
    picture = save_grid(tmp_path / "grid.png", images, labels=["ankle boot", "bag"], column_labels="abc", scale=7, title="T")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), picture)
    grid = tile(images, columns=3).repeat(7, axis=0).repeat(7, axis=1)
    np.testing.assert_array_equal(picture[-6 - len(grid):-6, -6 - grid.shape[1]:-6], grid)
    left = picture[-6 - len(grid):-6, :-6 - grid.shape[1]]
    for row in (left[:28], left[28:]):
        assert (row < 100).any()  # ink beside each row
        assert (row[:, :6] == 255).all() and (row[:, -6:] == 255).all()  # nothing cut off at either side


def test_a_long_title_widens_the_picture_rather_than_being_cut(tmp_path, images):
    picture = save_grid(tmp_path / "grid.png", images, title="a title that is much wider than these small images")
    assert (picture[:, -6:] == 255).all() and (picture[:25, 200:] < 100).any()


@pytest.mark.parametrize("arguments, message", [
    (dict(labels=["a", "b"], columns=2), "labels has 2 texts for 3 rows"),
    (dict(column_labels=["a", "b"], columns=3), "column_labels has 2 texts for 3 columns"),
])
def test_labels_that_do_not_fit_are_refused(tmp_path, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        save_grid(tmp_path / "grid.png", images, **arguments)
    with pytest.raises(ValueError, match="N of at least 1"):
        save_grid(tmp_path / "grid.png", images[:0])


def test_plot_curves_draws_each_series_in_its_own_colour(tmp_path):
    path = tmp_path / "plots" / "loss.png"
    plot_curves(path, {"raw": ([1, 2, 3], [0.5, 0.4, 0.3]), "mean": ([1, 2, 3], [0.6, 0.5, 0.4])}, "images", "loss", "Training")
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14)):  # the first two colours of matplotlib's cycle
        assert (pixels == colour).all(axis=1).sum() > 100
