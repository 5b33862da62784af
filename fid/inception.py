"""The Inception network of the published FID numbers, and the resize before it.

It is torchvision's Inception (Szegedy et al. 2016, arXiv 1512.00567) with the three changes of the network that Heusel et al. 2017
measured with: 1008 classes, mean pools that do not count the padding, and a max pool in the last block's pool branch.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.inception import BasicConv2d, Inception3, InceptionA, InceptionAux, InceptionB, InceptionC, InceptionD, InceptionE

INPUT_SIZE = 299
RESIZE = "tf1-bilinear-299"
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
DIMS = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS}

mean_pool = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class FIDInceptionA(InceptionA):
    def _forward(self, x):
        return [self.branch1x1(x),
                self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                self.branch_pool(mean_pool(x))]


class FIDInceptionC(InceptionC):
    def _forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [self.branch1x1(x),
                self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
                self.branch_pool(mean_pool(x))]


class FIDInceptionE(InceptionE):
    pool = staticmethod(mean_pool)

    def _forward(self, x):
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x),
                self.branch3x3_2a(three), self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                self.branch_pool(self.pool(x))]


def make_network():
    """The network without memory for its weights (on the meta device): load a state dict with assign=True."""
    blocks = [BasicConv2d, FIDInceptionA, InceptionB, FIDInceptionC, InceptionD, FIDInceptionE, InceptionAux]
    with torch.device("meta"):  # neither draws random numbers nor takes the time to
        net = Inception3(NUM_CLASSES, aux_logits=False, init_weights=False, inception_blocks=blocks)
    net.Mixed_7c.pool = max_pool  # a slip of the original network that became the standard
    return net.eval()


def features(net, images):
    """images (B, H, W, 3) uint8 -> "pool" (B, 2048) and "spatial" (B, 2023): the first channels of Mixed_6d, flattened as H, W, C."""
    layers = list(net.children())
    x = resize_tf1(images).sub_(128).div_(128).permute(0, 3, 1, 2)  # NCHW view of channels-last memory
    x = nn.Sequential(*layers[:14])(x)  # (B, 768, 17, 17) after Mixed_6d; branch1x1 comes first in it
    spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
    return {"pool": nn.Sequential(*layers[14:18])(x).mean((2, 3)), "spatial": spatial}


def resize_tf1(images, size=INPUT_SIZE):
    """Bilinear resize as TensorFlow 1 does it: no antialias, source = dest * in / out.

    images: (B, H, W, C) uint8 or float. Returns (B, size, size, C) float32 in the same grey levels.
    """
    y0, y1, wy = _taps(images.shape[1], size, images.device)
    x0, x1, wx = _taps(images.shape[2], size, images.device)
    images = images.float()
    left, right = images.index_select(2, x0), images.index_select(2, x1)
    rows = torch.addcmul(left, right.sub_(left), wx[:, None])  # (B, H, size, C)
    top, bottom = rows.index_select(1, y0), rows.index_select(1, y1)
    return torch.addcmul(top, bottom.sub_(top), wy[:, None, None])


def _taps(length, size, device):
    """Lower index, upper index and the upper one's weight of each output position, float32 as in the original graph."""
    source = torch.arange(size, dtype=torch.float32, device=device) * torch.tensor(length / size, dtype=torch.float32, device=device)
    lower = source.floor().long()
    return lower, (lower + 1).clamp(max=length - 1), source - lower
