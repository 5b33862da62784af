"""What turns images into features: Inception for FID, or another network for data that Inception does not suit.

An embedding has `name`, `dim`, `settings` (what has to be known to repeat its numbers) and is called with images
(B, H, W, 3) uint8; it returns features (B, dim) float32. Only the Inception one has the second tap that sFID needs.
"""

import os

import torch
from torch import nn
from torch.nn import functional as F

from fid import inception
from utils import distributed
from utils.cli import UserError

DEFAULT_CLASSIFIER = "assets/demo-classifier"
NUM_FEATURES = 64
PIXEL_GRID = 16


def make_embedding(name="inception", weights=None, device=None):
    """Build an embedding by name.

    name: "inception"; "pixels"; "classifier", or the folder of one; or a timm model name, plain or as "timm:NAME".
    weights: file of Inception weights, folder of the classifier, or a local timm checkpoint; None takes the default place
    (timm: its own pretrained weights, which need a connection). Raises FileNotFoundError or ValueError with the remedy.
    """
    device = torch.device(device if device is not None else distributed.device())
    if name == "inception":
        return Inception(weights if weights is not None else inception.DEFAULT_WEIGHTS, device)
    if name == "pixels":
        return Pixels(device)
    if name == "classifier":
        return Classifier(weights if weights is not None else DEFAULT_CLASSIFIER, device)
    if os.path.isdir(name):
        return Classifier(name, device)
    return Timm(name.removeprefix("timm:"), weights, device)


class Inception:
    """The published FID features; the only embedding whose numbers are called FID, sFID and Inception Score."""

    name = "inception"
    dim = inception.POOL_DIM
    spatial_dim = inception.SPATIAL_DIM

    def __init__(self, weights, device):
        self.extractor = inception.FeatureExtractor(weights, device)
        self.device = torch.device(device)
        self.class_weight = self.extractor.class_weight
        self.settings = {"resize": inception.RESIZE, "weights_sha256": self.extractor.weights_sha256}

    def __call__(self, images):
        return self.extractor(images)[0]

    def both_taps(self, images):
        return self.extractor(images)


class Pixels:
    """The pixels themselves, scaled to 0..1; averaged down to 16 x 16 so that few images suffice. dim 768."""

    name = "pixels"
    dim = PIXEL_GRID * PIXEL_GRID * 3

    def __init__(self, device):
        self.device = torch.device(device)
        self.settings = {"resize": f"area-{PIXEL_GRID}"}

    def __call__(self, images):
        inception.check_images(images)
        x = torch.as_tensor(images).to(self.device).permute(0, 3, 1, 2).float() / 255
        return F.adaptive_avg_pool2d(x, PIXEL_GRID).flatten(1)


class ClassifierNet(nn.Module):
    """Five 3x3 convolutions and a linear layer on grey 32x32 images in 0..1: 64 features, 70,330 parameters for 10 classes."""

    def __init__(self, num_classes=10):
        super().__init__()
        widths = (1, 16, 32, 32, 64, NUM_FEATURES)
        strides = (1, 2, 1, 2, 1)
        layers = []
        for width_in, width_out, stride in zip(widths, widths[1:], strides):
            layers += [nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def features(self, grey):
        return self.trunk(grey).mean((2, 3))  # (B, 64)

    def forward(self, grey):
        return self.head(self.features(grey))


class Classifier:
    """The demo's classifier: features (B, 64) for FD-classifier, and the class it sees in each image."""

    name = "classifier"
    dim = NUM_FEATURES

    def __init__(self, folder, device):
        path = os.path.join(folder, "model.safetensors")
        if not os.path.isfile(path):
            raise UserError(f"{path} not found; train it with `python scripts/train_demo_classifier.py`")
        state = inception.read_tensors(path)
        self.device = torch.device(device)
        self.net = ClassifierNet(len(state.get("head.bias", ()))).to(device).eval()
        _load_strictly(self.net, state, path)
        self.settings = {"resize": "none", "weights_sha256": inception.hash_file(path)}

    @torch.no_grad()
    def __call__(self, images):
        with inception.full_precision(self.device):
            return self.net.features(self._grey(images))

    @torch.no_grad()
    def classes(self, images):
        """The class index (B,) int64 seen in each image."""
        with inception.full_precision(self.device):
            return self.net(self._grey(images)).argmax(1)

    def _grey(self, images):
        inception.check_images(images)
        if tuple(images.shape[1:3]) != (32, 32):
            raise UserError(f"classifier: images are {images.shape[1]}x{images.shape[2]}, wanted 32x32 as in the demo; "
                            "for other images use --embedding inception")
        return torch.as_tensor(images).to(self.device).float().mean(3)[:, None] / 255  # (B, 1, 32, 32)


class Timm:
    """The pooled features of a timm model, on images resized as the model expects (bicubic, antialiased)."""

    def __init__(self, name, weights, device):
        self.name, self.device = name, torch.device(device)
        self.net = _timm_model(name, weights).to(device).eval()
        import timm
        config = timm.data.resolve_model_data_config(self.net)
        self.size = config["input_size"][1:]
        self.mean = torch.tensor(config["mean"], device=device)[:, None, None]
        self.std = torch.tensor(config["std"], device=device)[:, None, None]
        self.dim = getattr(self.net, "head_hidden_size", None) or self.net.num_features
        digest = inception.hash_tensors(self.net.state_dict())
        self.settings = {"resize": f"bicubic-antialias-{self.size[0]}x{self.size[1]}", "weights_sha256": digest}

    @torch.no_grad()
    def __call__(self, images):
        inception.check_images(images)
        with inception.full_precision(self.device):
            x = torch.as_tensor(images).to(self.device).permute(0, 3, 1, 2).float()
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True).clamp_(0, 255) / 255
            return self.net((x - self.mean) / self.std)


def _timm_model(name, weights):
    import timm
    if not timm.is_model(name):
        raise UserError(f"embedding {name!r} is unknown; wanted inception, pixels, classifier or a timm model name, "
                        "for example timm:resnet18.a1_in1k")
    if weights is None:
        try:
            return timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # the hub client raises many kinds, all of which mean the same here
            raise UserError(f"embedding {name}: its pretrained weights could not be fetched ({type(error).__name__}); "
                            "give a local checkpoint of the model with --weights FILE") from error
    if not os.path.isfile(weights):
        raise UserError(f"{weights}: no such file; --weights wants a checkpoint of the timm model {name}")
    model = timm.create_model(name, pretrained=False)
    state = inception.read_tensors(weights)
    _load_strictly(model, state, weights)
    model.reset_classifier(0)
    return model


def _load_strictly(model, state, path):
    own = model.state_dict()
    wrong = [key for key in own.keys() | state.keys()
             if key not in own or key not in state or own[key].shape != state[key].shape]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit the model, the first is {sorted(wrong)[0]}; "
                        "give a plain state dict of exactly this model")
    model.load_state_dict(state)
