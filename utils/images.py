"""Pictures on disk: uint8 conversion, PNGs, labelled grids and curves."""

import math
from pathlib import Path

import numpy as np

from utils.cli import UserError

MARGIN = 6          # pixels around the grid and between labels and images
FONT_SIZE = 15      # of labels; the title is larger
TITLE_FONT_SIZE = 18
PAPER, INK = (255, 255, 255), (20, 20, 20)


def to_uint8(images):
    """images (B, 3, H, W) float tensor, -1 black to 1 white -> (B, H, W, 3) uint8 tensor on the same device.

    floor((x + 1) * 127.5), clipped to 0..255.
    """
    # clipped first and positive, so the cast's truncation is the floor
    return ((images.float() + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def save_png(path, image):
    """Write one image (H, W, 3) uint8, array or tensor, as PNG; makes the folder."""
    from PIL import Image

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_to_array(image)).save(path, format="PNG")


def save_grid(path, images, labels=None, column_labels=None, columns=None, scale=1, title=None):
    """Write images (N, H, W, 3) uint8, array or tensor, row by row as one PNG, and return the picture (h, w, 3) uint8.

    labels: one text per row, written at the left. column_labels: one text per column, written above.
    columns: images per row; by default as many as give the rows that `labels` names, else a square.
    scale: whole number of times each pixel is repeated, so that 32x32 images can be seen.
    Raises ValueError if the labels do not fit the rows or columns.
    """
    from PIL import Image, ImageDraw

    images = _to_array(images)
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[3] != 3:
        raise UserError(f"images have shape {images.shape}, wanted (N, H, W, 3) with N of at least 1")
    columns = columns or _default_columns(len(images), labels)
    grid = tile(images, columns).repeat(scale, axis=0).repeat(scale, axis=1)
    cell_height, cell_width = images.shape[1] * scale, images.shape[2] * scale
    _check_labels("labels", labels, grid.shape[0] // cell_height, "rows")
    _check_labels("column_labels", column_labels, columns, "columns")

    font, title_font = _font(FONT_SIZE), _font(TITLE_FONT_SIZE)
    left = MARGIN + max((_text_width(font, label) + MARGIN for label in labels or ()), default=0)
    top = MARGIN + (TITLE_FONT_SIZE + 2 * MARGIN if title else 0)
    grid_top = top + (FONT_SIZE + MARGIN if column_labels else 0)
    title_width = _text_width(title_font, title or "") + 2 * MARGIN
    picture = Image.new("RGB", (max(left + grid.shape[1] + MARGIN, title_width), grid_top + grid.shape[0] + MARGIN), PAPER)
    picture.paste(Image.fromarray(grid), (left, grid_top))
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, title_font)
    for column, label in enumerate(column_labels or ()):
        draw.text((left + (column + 0.5) * cell_width, top + FONT_SIZE / 2), str(label), INK, font, anchor="mm")
    for row, label in enumerate(labels or ()):
        draw.text((left - MARGIN, grid_top + (row + 0.5) * cell_height), str(label), INK, font, anchor="rm")
    save_png(path, picture)
    return np.asarray(picture)


def tile(images, columns):
    """images (N, H, W, 3) uint8 array -> (rows*H, columns*W, 3), row by row; missing cells are white."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height, width, channels), PAPER[0], np.uint8)
    cells[:count] = images
    return cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def plot_curves(path, series, xlabel, ylabel, title=None):
    """Write line curves as PNG. series: {name: (x values, y values)}; the names are the legend (None: one curve, no legend)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # a Figure of its own, not pyplot: no window system and no global state
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.5, marker="o" if len(x) == 1 else None)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title or "")
    axes.grid(alpha=0.3)
    if any(name is not None for name in series):
        axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _to_array(image):
    """A uint8 numpy array on the CPU, from an array, a tensor or a PIL image."""
    array = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
    if array.dtype != np.uint8:
        raise UserError(f"images are {array.dtype}, wanted uint8 (to_uint8 makes it)")
    return array


def _default_columns(count, labels):
    return math.ceil(count / len(labels)) if labels else math.ceil(math.sqrt(count))


def _check_labels(name, labels, wanted, what):
    if labels and len(labels) != wanted:
        raise UserError(f"{name} has {len(labels)} texts for {wanted} {what}; give one each")


def _font(size):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_width(font, text):
    return math.ceil(font.getlength(str(text)))
