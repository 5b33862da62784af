"""fid.winograd: the same convolution as torch's, for every size, padding and number of images."""

import pytest
import torch
from fid_helpers import random_images, random_inception
from torch.nn import functional as F

from fid import inception, winograd


def material(batch, channels_in, channels_out, height, width, layout):
    """Inputs and weights that give outputs of size 1, so that absolute tolerances mean something."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels_in, height, width, generator=generator).contiguous(memory_format=layout)
    weight = torch.randn(channels_out, channels_in, 3, 3, generator=generator) / (9 * channels_in) ** 0.5
    return x, weight, torch.randn(channels_out, generator=generator)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch, channels_in, channels_out, height, width, padding", [
    (1, 3, 5, 3, 3, 0),       # one output
    (2, 7, 5, 4, 9, 0),
    (3, 5, 8, 8, 8, 1),       # whole tiles
    (2, 4, 3, 1, 2, 1),       # smaller than the kernel
    (5, 3, 2, 35, 33, 1),     # 81 tiles an image: images come in groups of 4
    (2, 2, 3, 90, 77, 0),     # one image has more tiles than are taken at a time
])
def test_equals_a_direct_convolution(batch, channels_in, channels_out, height, width, padding, layout):
    x, weight, bias = material(batch, channels_in, channels_out, height, width, layout)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    found = winograd.convolve(x, winograd.transform_weight(weight), bias, padding)
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert (found - exact).abs().max() < 4e-5  # 2^-24 enlarged by the transforms' factors, up to 100 in both directions
    assert (found - F.conv2d(x, weight, bias, padding=padding)).abs().max() < 4e-5


def test_transforms_are_exact_apart_from_rounding():
    """In float64 the identity holds to float64 rounding: no coefficient is a little wrong."""
    tile = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    b, g, a = winograd.INPUT.double(), winograd.WEIGHT, winograd.OUTPUT.double()
    found = a @ ((g @ kernel @ g.T) * (b @ tile @ b.T)) @ a.T
    assert (found - F.conv2d(tile[None, None], kernel[None, None])[0, 0]).abs().max() < 1e-13


def test_an_image_does_not_depend_on_the_others():
    x, weight, bias = material(5, 3, 4, 35, 35, torch.channels_last)
    transformed = winograd.transform_weight(weight)
    together = winograd.convolve(x, transformed, bias, 1)
    alone = torch.cat([winograd.convolve(image[None], transformed, bias, 1) for image in x])
    assert (together - alone).abs().max() < 1e-5  # matrix products of other sizes add in another order


def test_named_layers_are_3x3_and_features_equal_those_of_plain_convolutions():
    shapes = inception.convolution_shapes()
    assert {shapes[name][2] for name in inception.WINOGRAD} == {(3, 3)}
    extractor, images = inception.FeatureExtractor(random_inception(), device="cpu"), random_images(2, 48, 40)
    assert set(extractor._winograd) == set(inception.WINOGRAD)
    fast = extractor(images)
    extractor._winograd = {}  # as on a GPU
    for found, wanted in zip(fast, extractor(images)):
        assert (found - wanted).abs().max() < 1e-5  # measured 2e-6 and 4e-6; the published tolerance is 5e-4
