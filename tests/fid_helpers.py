"""Material of the fid tests: a random Inception state dict, small images, peers built from the same weights."""

import torch

from fid.inception import NUM_CLASSES, POOL_DIM, convolution_shapes


def random_inception(seed=0):
    """A seeded state dict with the names and shapes of the FID Inception file; activations keep their scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def near_one(size):
        return 0.8 + 0.4 * torch.rand(size, generator=generator)

    state = {"fc.weight": 0.05 * normal(NUM_CLASSES, POOL_DIM), "fc.bias": normal(NUM_CLASSES)}
    for name, (in_channels, out_channels, kernel) in convolution_shapes().items():
        fan_in = in_channels * kernel[0] * kernel[1]
        state[f"{name}.conv.weight"] = normal(out_channels, in_channels, *kernel) * (2 / fan_in) ** 0.5
        state[f"{name}.bn.weight"] = near_one(out_channels)
        state[f"{name}.bn.bias"] = 0.1 * normal(out_channels)
        state[f"{name}.bn.running_mean"] = 0.1 * normal(out_channels)
        state[f"{name}.bn.running_var"] = near_one(out_channels)
    return state


def random_images(num, height=64, width=64, seed=0):
    """Smooth random colour images (num, height, width, 3) uint8, each with its own colours and texture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num, 3, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    fine = fine + 0.3 * torch.randn(num, 3, height, width, generator=generator)
    return (128 + 50 * fine).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class TinyInception:
    """Stands in for the Inception embedding: the same interface and name, 8 + 6 features of a random projection."""

    name = "inception"
    dim, spatial_dim = 8, 6
    device = torch.device("cpu")

    def __init__(self, sha256="6726825d" + "0" * 56):
        generator = torch.Generator().manual_seed(0)
        self.settings = {"resize": "tf1-bilinear-299", "weights_sha256": sha256}
        self.projection = torch.randn(4 * 4 * 3, self.dim + self.spatial_dim, generator=generator)
        self.class_weight = 8 * torch.eye(self.dim)

    def both_taps(self, images):
        x = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255 - 0.5
        taps = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.projection
        return taps[:, :self.dim].tanh(), taps[:, self.dim:]

    def __call__(self, images):
        return self.both_taps(images)[0]
