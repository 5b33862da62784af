"""The Inception network of the published FID numbers, and the resize before it.

It is torchvision's Inception (Szegedy et al. 2016, arXiv 1512.00567) with what Heusel et al. 2017 measured with: 1008 classes, mean
pools that leave out the padding, and a max pool in the last block.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.inception import Inception3, InceptionE

INPUT_SIZE = 299
RESIZE = "tf1-bilinear-299"
SPATIAL_CHANNELS = 7
DIMS = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS}


class LastBlock(InceptionE):
    """An Inception block with a max pool in its pool branch: a slip of the original network that became the standard."""

    def _forward(self, x):
        *branches, _ = super()._forward(x)
        return [*branches, self.branch_pool(F.max_pool2d(x, kernel_size=3, stride=1, padding=1))]


def leave_out_padding(branch, inputs):
    """Hook: correct torchvision's 3x3 means (B, C, H, W), which count the zeros around the image as pixels."""
    (means,) = inputs
    share = F.avg_pool2d(torch.ones_like(means[:1, :1]), kernel_size=3, stride=1, padding=1)  # of each window that lies in the image
    return (means / share,)


def make_network():
    """The network without memory for its weights (on the meta device): load a state dict with assign=True."""
    with torch.device("meta"):  # it draws no random numbers and takes no time
        net = Inception3(1008, aux_logits=False, init_weights=False)
        net.Mixed_7c = LastBlock(2048)
    for name, block in net.named_children():
        if hasattr(block, "branch_pool") and name != "Mixed_7c":
            block.branch_pool.register_forward_pre_hook(leave_out_padding)
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
    rows, columns = (_resize_matrix(length, size, images.device) for length in images.shape[1:3])
    return torch.einsum("yh,bhwc,xw->byxc", rows, images.float(), columns).contiguous()


def _resize_matrix(length, size, device):
    """(size, length) float32: in each row the weights of the two pixels around a place. Beyond the last pixel it counts alone."""
    places = torch.arange(size, dtype=torch.float32, device=device) * torch.tensor(length / size, dtype=torch.float32, device=device)
    distances = places.clamp(max=length - 1)[:, None] - torch.arange(length, device=device)
    return (1 - distances.abs()).clamp(min=0)
