"""Pictures on disk: uint8 conversion, PNGs, labelled grids and curves."""

import io
import math
from pathlib import Path

import numpy as np

DPI, MARGIN, FONT_SIZE = 128, 6, 8  # of grids; a power of two, so that pixels are exact in inches; in pixels; in points
LABEL_LETTERS = 22  # beside a row; longer labels are cut short
SMALLEST_CELL = 64  # smaller images are enlarged by a whole number


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
    return make_grid(planes, nrow=columns, padding=0, pad_value=255).permute(1, 2, 0).numpy()


def save_grid(path, images, labels=(), title=""):
    """Write images (N, H, W, 3) uint8, array or tensor, row by row as one PNG, and return the picture (h, w, 3) uint8.

    labels: one text per row, at the left; long ones are cut. Without labels the grid is a square. title: a text above.
    """
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
    from PIL import Image

    columns = math.ceil(len(images) / len(labels) if labels else math.sqrt(len(images)))
    scale = max(1, math.ceil(SMALLEST_CELL / images.shape[2]))
    grid = tile(images, columns).repeat(scale, axis=0).repeat(scale, axis=1)
    height = images.shape[1] * scale
    assert len(labels) * height in (0, len(grid)), "one label per row"

    # The axes fill the figure and labels lie outside of it, so that one pixel of the grid is one of the picture.
    figure = Figure(figsize=(grid.shape[1] / DPI, len(grid) / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False)
    axes.imshow(grid, interpolation="nearest", aspect="auto")
    short = [label if len(label) <= LABEL_LETTERS else label[:LABEL_LETTERS - 1].rstrip() + "…" for label in labels]
    axes.set_yticks(height * (np.arange(len(labels)) + 0.5), short)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=FONT_SIZE)
    axes.set_title(title, loc="left", fontsize=FONT_SIZE)
    drawn = io.BytesIO()
    edges = figure.get_tightbbox().padded(MARGIN / DPI).extents
    figure.savefig(drawn, format="png", bbox_inches=Bbox.from_extents(np.rint(edges * DPI) / DPI))
    picture = Image.open(drawn).convert("RGB")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_png(path, picture)
    return np.asarray(picture)


def plot_curves(path, series, xlabel, ylabel, title):
    """Write line curves as PNG. series: {name: (x values, y values)}; the names are the legend."""
    from matplotlib.figure import Figure

    # not pyplot, which keeps global state and wants a window system
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title)
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.5, marker="o" if len(x) == 1 else None)
    axes.grid(alpha=0.3)
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _to_array(images):
    array = np.asarray(images.cpu() if hasattr(images, "cpu") else images)  # of an array, a tensor or a PIL image
    if array.dtype != np.uint8:
        raise ValueError(f"images are {array.dtype}, wanted uint8 (to_uint8 makes it)")
    return array
