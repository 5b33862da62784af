"""Embeddings turn images into features: Inception for FID, other networks for images that Inception does not suit.

An embedding has a `name`, a `device`, `dims` {tap: number of features} and `settings`, which one must know to repeat its numbers.
Each has the tap "pool"; Inception also has "spatial", which sFID needs.
"""

import hashlib
import os
import textwrap

import torch
from torch import nn
from torch.nn import functional as F

from fid.sources import check_images
from utils import distributed
from utils.cli import UserError
from utils.files import file_sha256
from utils.precision import arithmetic

PUBLISHED_SHA256_PREFIX = "6726825d"
NUM_FEATURES = 64  # of the demo's classifier
PIXEL_GRID = 16
CPU_CHUNK = 8  # images at a time on a CPU: each takes 8 MB in the first layers


def make_embedding(name="inception", weights=None, device=None):
    """An embedding by name: "inception", "pixels", "classifier" or the folder of one, a timm model as NAME or "timm:NAME".

    weights: Inception's file, the classifier's folder, or a local timm checkpoint. None: the place in assets/, for timm the pretrained
    weights of its hub. Raises UserError if they are not there.
    """
    device = distributed.device() if device is None else device
    if name == "inception":
        return Inception(weights or "assets/pt_inception-2015-12-05-6726825d.pth", device)
    if name == "pixels":
        return Pixels(device)
    if name == "classifier" or os.path.isdir(name):
        return Classifier(weights or ("assets/demo-classifier" if name == "classifier" else name), device)
    return Timm(name.removeprefix("timm:"), weights, device)


class Embedding:
    """Images (B, H, W, 3) uint8, numpy or torch -> pooled features (B, d) float32 on `device`. Sub-classes have `_taps`."""

    def __init__(self, device):
        self.device = torch.device(device)

    def __call__(self, images):
        return self.taps(images)["pool"]

    @torch.no_grad()
    def taps(self, images):
        """{tap: features (B, d)}; images as in a call."""
        check_images(images)
        with arithmetic(self.device):
            return self._taps(torch.as_tensor(images).to(self.device, non_blocking=True))


class Inception(Embedding):
    """The published FID features; the only embedding whose numbers are called FID, sFID and Inception Score."""

    name = "inception"

    def __init__(self, weights, device):
        super().__init__(device)
        from fid import inception  # torchvision takes more than a second to import
        net = inception.make_network()
        load_weights(net, weights, "get it with `python3 download_assets.py --name inception`, or name it as eval.weights (fid: --weights)",
                     "give the FID Inception file pt_inception-2015-12-05-6726825d.pth")
        self.net = net.float().to(self.device, memory_format=torch.channels_last).requires_grad_(False)
        self.class_weight = self.net.fc.weight  # (1008, 2048); IS uses no bias
        self.dims, self.features = inception.DIMS, inception.features
        self.settings = {"resize": inception.RESIZE, "weights_sha256": file_sha256(weights)}

    def _taps(self, images):
        taps = [self.features(self.net, part) for part in images.split(CPU_CHUNK if self.device.type == "cpu" else len(images))]
        return {tap: torch.cat([part[tap] for part in taps]) for tap in self.dims}


class Pixels(Embedding):
    """The pixels themselves, 0..1, averaged to 16 x 16: with fewer features, fewer images suffice."""

    name = "pixels"
    dims = {"pool": PIXEL_GRID * PIXEL_GRID * 3}
    settings = {"resize": f"area-{PIXEL_GRID}"}

    def _taps(self, images):
        return {"pool": F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, PIXEL_GRID).flatten(1)}


class ClassifierNet(nn.Module):
    """Five 3x3 convolutions and a linear layer on grey 32x32 images in 0..1: 64 features, 10 classes, 70,330 parameters."""

    def __init__(self):
        super().__init__()
        widths = (1, 16, 32, 32, 64, NUM_FEATURES)
        layers = []
        for width_in, width_out, stride in zip(widths, widths[1:], (1, 2, 1, 2, 1)):
            layers += [nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # (B, 64)
        self.head = nn.Linear(NUM_FEATURES, 10)

    def forward(self, grey):
        return self.head(self.trunk(grey))


class Classifier(Embedding):
    """The demo's classifier: features (B, 64), and the class that it sees in each image."""

    name = "classifier"
    dims = {"pool": NUM_FEATURES}

    def __init__(self, folder, device):
        super().__init__(device)
        path = os.path.join(folder, "model.safetensors")
        self.net = ClassifierNet().eval().requires_grad_(False)
        load_weights(self.net, path, "train the classifier with `python3 scripts/train_demo_classifier.py --data FOLDER`")
        self.net.to(self.device)
        self.settings = {"resize": "none", "weights_sha256": file_sha256(path)}

    def _taps(self, images):
        if tuple(images.shape[1:3]) != (32, 32):
            raise UserError(f"classifier: images are {images.shape[1]}x{images.shape[2]}, wanted 32x32 as in the demo; "
                            "for other images use the embedding inception")
        grey = images.float().mean(3)[:, None] / 255  # (B, 1, 32, 32)
        return {"pool": self.net.trunk(grey)}

    def classes(self, images):
        """The class index (B,) int64 seen in each image; images as in a call."""
        return self.net.head(self(images)).argmax(1)


class Timm(Embedding):
    """The pooled features of a timm model, on images resized as the model expects (bicubic, antialiased)."""

    def __init__(self, name, weights, device):
        super().__init__(device)
        import timm
        if not timm.is_model(name):
            raise UserError(f"embedding {name!r} is unknown; wanted inception, pixels, classifier or a timm model name, "
                            "for example timm:resnet18.a1_in1k")
        try:
            self.name, self.net = name, timm.create_model(name, pretrained=not weights)
        except Exception as error:  # the hub client raises many kinds
            raise UserError(f"embedding {name}: its pretrained weights could not be fetched ({type(error).__name__}); "
                            "give a local checkpoint of the model: eval.weights (fid: --weights)") from error
        if weights:
            load_weights(self.net, weights, f"wanted a checkpoint of the timm model {name}")
        self.net.reset_classifier(0)
        self.net.to(self.device).eval()
        config = timm.data.resolve_model_data_config(self.net)
        self.size = config["input_size"][1:]
        self.mean, self.std = (torch.tensor(config[key], device=self.device)[:, None, None] for key in ("mean", "std"))
        self.dims = {"pool": getattr(self.net, "head_hidden_size", None) or self.net.num_features}
        named = b"".join(name.encode() + tensor.cpu().numpy().tobytes() for name, tensor in sorted(self.net.state_dict().items()))
        self.settings = {"resize": f"bicubic-antialias-{self.size[0]}x{self.size[1]}", "weights_sha256": hashlib.sha256(named).hexdigest()}

    def _taps(self, images):
        x = F.interpolate(images.permute(0, 3, 1, 2).float(), self.size, mode="bicubic", antialias=True).clamp_(0, 255) / 255
        return {"pool": self.net((x - self.mean) / self.std)}


def load_weights(net, path, missing, misfit="give a plain state dict of exactly this model"):
    """Load a state dict from a .safetensors or torch file. Objects in it are not unpickled.

    missing, misfit: what to do if there is no file, and if its names and shapes are not the network's. Raises UserError.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; {missing}")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError("not tensors alone")
    except Exception as error:  # damaged bytes can raise anything, and torch's texts advise to unpickle
        raise UserError(f"{path}: not a plain state dict, tensors by name ({type(error).__name__}); was the download cut short, "
                        "or is it a whole network? Then save its state_dict() alone") from error
    try:
        net.load_state_dict(dict(state), assign=next(net.parameters()).is_meta)
    except RuntimeError as error:  # it names the tensors that are missing, unexpected or of another shape
        misfits = textwrap.shorten(str(error).partition(":")[2], 300)
        raise UserError(f"{path}: not the weights of this network: {misfits}; {misfit}") from error
