"""3x3 convolutions of stride 1 with a quarter of the multiplications, for processors: Winograd's F(4x4, 3x3).

A tile of 4x4 outputs depends on 6x6 inputs. Both are polynomials' coefficients, and in the values at 0, 1, -1, 2, -2 and infinity
along each axis the convolution is one product for each of the 36 points: 36 matrix products for all tiles, instead of 144.
Rounding grows by about 5 (maximum 3e-5 where outputs are of size 1). Source: Lavin and Gray 2015 (arXiv 1509.09308).
"""

import torch
from torch.nn import functional as F

OUT, IN = 4, 6           # side of a tile: outputs, inputs
TILES_AT_A_TIME = 324    # more, and what lies between the steps falls out of the processor's cache

INPUT = torch.tensor([
    [4., 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]])
WEIGHT = torch.tensor([[6., 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64) / 24
OUTPUT = torch.tensor([[1., 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def transform_weight(weight):
    """weight (O, I, 3, 3) -> its values at the 36 points (36, I, O) float32, computed in float64."""
    return torch.einsum("ph,qw,oihw->pqio", WEIGHT, WEIGHT, weight.double()).flatten(0, 1).float()


def convolve(x, transformed, bias, padding):
    """F.conv2d(x, weight, bias, stride=1, padding) of x (B, I, H, W), with the weight from transform_weight; no gradients.

    Returns (B, O, H + 2 padding - 2, W + 2 padding - 2) as a view of channels-last memory.
    """
    height, width = (side + 2 * padding - 2 for side in x.shape[2:])
    rows, columns = -(-height // OUT), -(-width // OUT)
    right, below = (OUT * tiles + 2 - side - padding for tiles, side in ((columns, x.shape[3]), (rows, x.shape[2])))
    x = F.pad(x, (padding, right, padding, below))  # to whole tiles, whose surplus is cut off at the end
    out = x.new_empty(len(x), rows, OUT, columns, OUT, len(bias))
    images = max(1, TILES_AT_A_TIME // (rows * columns))
    for part, out_part in zip(x.split(images), out.split(images)):
        torch.add(_tiles(part, transformed).permute(2, 3, 0, 4, 1, 5), bias, out=out_part)
    return out.view(len(x), OUT * rows, OUT * columns, -1)[:, :height, :width].permute(0, 3, 1, 2)


def _tiles(x, transformed):
    """Output tiles (4, 4, B, rows, columns, O) without the bias, of x padded to whole tiles."""
    tiles = x.unfold(2, IN, OUT).unfold(3, IN, OUT)                             # (B, I, rows, columns, 6, 6), a view
    batch, channels, rows, columns = tiles.shape[:4]
    values = tiles.permute(4, 5, 0, 2, 3, 1).reshape(IN, -1)
    values = (INPUT @ (INPUT @ values).view(IN, IN, -1)).view(IN * IN, -1, channels)  # (36, tiles, I)
    values = torch.bmm(values, transformed).view(IN, -1)                         # (6, 6 * tiles * O)
    return (OUTPUT @ (OUTPUT @ values).view(OUT, IN, -1)).view(OUT, OUT, batch, rows, columns, -1)
