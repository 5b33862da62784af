"""Pictures on disk: uint8 conversion, PNGs, labelled grids and curves."""

import math
from pathlib import Path

import numpy as np

MARGIN, FONT_SIZE = 6, 15
LABEL_WIDTH = 170   # pixels beside a row; longer texts are cut short
SMALLEST_CELL = 64  # smaller images are enlarged by a whole number
PAPER, INK = (255, 255, 255), (20, 20, 20)


def to_uint8(images):
    """images (B, 3, H, W) float tensor, -1 black to 1 white -> (B, H, W, 3) uint8 tensor on the same device.

    floor((x + 1) * 127.5), clipped to 0..255. NaN becomes 0: look for it before.
    """
    # clipped first and positive, so the cast's truncation is the floor
    return ((images.float() + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def save_png(path, image):
    """Write one image (H, W, 3) uint8, array or tensor, as PNG to a path or a stream."""
    from PIL import Image

    Image.fromarray(_to_array(image)).save(path, format="PNG")


def tile(images, columns):
    """images (N, H, W, 3) uint8 -> one picture (rows*H, columns*W, 3), row by row; missing cells are white."""
    import torch
    from torchvision.utils import make_grid

    planes = torch.from_numpy(_to_array(images).transpose(0, 3, 1, 2).copy())
    return make_grid(planes, nrow=columns, padding=0, pad_value=PAPER[0]).permute(1, 2, 0).numpy()


def save_grid(path, images, labels=None, column_labels=None, columns=None, title=None):
    """Write images (N, H, W, 3) uint8, array or tensor, row by row as one PNG, and return the picture (h, w, 3) uint8.

    labels: one text per row, at the left. column_labels: one text per column, above. Texts too long for their place are cut.
    columns: images per row; by default as many as give the rows that `labels` names, else a square.
    """
    from PIL import Image, ImageDraw

    images = _to_array(images)
    columns = columns or math.ceil(len(images) / len(labels) if labels else math.sqrt(len(images)))
    grid = Image.fromarray(tile(images, columns))
    scale = max(1, math.ceil(SMALLEST_CELL / images.shape[2]))
    grid = grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)
    width, height = images.shape[2] * scale, images.shape[1] * scale
    assert not labels or len(labels) == grid.height // height, "one label per row"
    assert not column_labels or len(column_labels) == grid.width // width, "one label per column"

    font = _font()
    labels = [_shortened(label, font, LABEL_WIDTH) for label in labels or ()]
    left = MARGIN + max((math.ceil(font.getlength(label)) + MARGIN for label in labels), default=0)
    top = MARGIN + (FONT_SIZE + MARGIN) * (bool(title) + bool(column_labels))
    title_width = MARGIN + math.ceil(font.getlength(title or ""))
    picture = Image.new("RGB", (max(left + grid.width, title_width) + MARGIN, top + grid.height + MARGIN), PAPER)
    picture.paste(grid, (left, top))
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), title or "", INK, font)
    for column, label in enumerate(column_labels or ()):
        draw.text((left + (column + 0.5) * width, top - MARGIN), _shortened(label, font, width), INK, font, anchor="ms")
    for row, label in enumerate(labels):
        draw.text((left - MARGIN, top + (row + 0.5) * height), label, INK, font, anchor="rm")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_png(path, picture)
    return np.asarray(picture)


def plot_curves(path, series, xlabel, ylabel, title=None):
    """Write line curves as PNG. series: {name: (x values, y values)}; the names are the legend (None: one curve, no legend)."""
    from matplotlib.figure import Figure

    # not pyplot, which keeps global state and wants a window system
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title or "")
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.5, marker="o" if len(x) == 1 else None)
    axes.grid(alpha=0.3)
    if any(name is not None for name in series):
        axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _to_array(images):
    array = np.asarray(images.cpu() if hasattr(images, "cpu") else images)  # of an array, a tensor or a PIL image
    if array.dtype != np.uint8:
        raise ValueError(f"images are {array.dtype}, wanted uint8 (to_uint8 makes it)")
    return array


def _font():
    """DejaVu Sans, which comes with matplotlib: Pillow's own font draws boxes for å, ä, ö and other letters."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", FONT_SIZE)


def _shortened(text, font, width):
    """`text`, or as much of its beginning as fits into `width` pixels with an ellipsis."""
    text, end = str(text), ""
    while text and font.getlength(text + end) > width:
        text, end = text[:-1].rstrip(), "…"
    return text + end
