"""Material of the fid tests: a random Inception state dict, small images, a tiny network in Inception's place."""

import torch

from fid.evaluate import Evaluator
from fid.inception import make_network
from fid.sources import Source, check_images


def random_inception(seed=0):
    """A seeded state dict with the names and shapes of the FID Inception file; activations keep their scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def near_one(size):
        return 0.8 + 0.4 * torch.rand(size, generator=generator)

    def of(name, shape):
        if name.startswith("fc."):
            return normal(*shape) * (0.05 if name == "fc.weight" else 1)
        if name.endswith("conv.weight"):
            return normal(*shape) * (2 / shape[1:].numel()) ** 0.5
        return near_one(shape) if name.endswith(("bn.weight", "bn.running_var")) else 0.1 * normal(*shape)

    tensors = make_network().state_dict().items()
    return {name: of(name, tensor.shape) for name, tensor in tensors if not name.endswith("num_batches_tracked")}


def measure(images, reference, num=None, **options):
    """The result for an image set against a reference, as `python -m fid calc` computes it. options: of Evaluator."""
    source = Source(images, num)
    evaluator = Evaluator(reference, num_images=len(source), conversion="as stored", **options)
    evaluator.add_all(source)
    return evaluator.result()


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
    dims = {"pool": 8, "spatial": 6}
    device = torch.device("cpu")

    def __init__(self, sha256="6726825d" + "0" * 56):
        generator = torch.Generator().manual_seed(0)
        self.settings = {"resize": "tf1-bilinear-299", "weights_sha256": sha256}
        self.projection = torch.randn(4 * 4 * 3, 8 + 6, generator=generator)
        self.class_weight = 8 * torch.eye(8)

    def taps(self, images):
        check_images(images)
        x = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255 - 0.5
        taps = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.projection
        return {"pool": taps[:, :8].tanh(), "spatial": taps[:, 8:]}

    def __call__(self, images):
        return self.taps(images)["pool"]
