"""The Inception network of the published FID numbers: weights, resize, features.

The graph is the 2015-12-05 Inception of Szegedy et al. 2016 (arXiv 1512.00567) as Heusel et al. 2017 use it for FID:
1008 classes, average pools that do not count padding, a max pool in the last block's pool branch.
"""

import contextlib
import hashlib
import os

import torch
from torch.nn import functional as F

from fid import winograd
from utils import distributed
from utils.cli import UserError

DEFAULT_WEIGHTS = "assets/pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256_PREFIX = "6726825d"
INPUT_SIZE = 299
RESIZE = "tf1-bilinear-299"
POOL_DIM = 2048
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
NUM_CLASSES = 1008
BN_EPS = 1e-3
# Images at a time on a processor: fewer leave the fast convolutions unused, more fall out of its cache, and arrays above 32 MiB
# are given back to the system and cleared anew at every step. The first layers have the large maps.
CPU_CHUNK, CPU_STEM_CHUNK = 16, 2
# Stride-1 3x3 convolutions with so many channels that Winograd's form is faster on processors.
WINOGRAD = ("Conv2d_4a_3x3", "Mixed_5b.branch3x3dbl_2", "Mixed_5b.branch3x3dbl_3", "Mixed_5c.branch3x3dbl_2", "Mixed_5c.branch3x3dbl_3",
            "Mixed_5d.branch3x3dbl_2", "Mixed_5d.branch3x3dbl_3", "Mixed_6a.branch3x3dbl_2", "Mixed_7b.branch3x3dbl_2",
            "Mixed_7c.branch3x3dbl_2")


def convolution_shapes():
    """Every convolution of the network: name -> (in_channels, out_channels, (kernel_h, kernel_w))."""
    shapes = {}

    def declare(prefix, *rows):
        for name, in_channels, out_channels, kernel in rows:
            shapes[prefix + name] = in_channels, out_channels, kernel if isinstance(kernel, tuple) else (kernel, kernel)

    declare("", ("Conv2d_1a_3x3", 3, 32, 3), ("Conv2d_2a_3x3", 32, 32, 3), ("Conv2d_2b_3x3", 32, 64, 3),
            ("Conv2d_3b_1x1", 64, 80, 1), ("Conv2d_4a_3x3", 80, 192, 3))
    for block, width, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        declare(block, (".branch1x1", width, 64, 1), (".branch5x5_1", width, 48, 1), (".branch5x5_2", 48, 64, 5),
                (".branch3x3dbl_1", width, 64, 1), (".branch3x3dbl_2", 64, 96, 3), (".branch3x3dbl_3", 96, 96, 3),
                (".branch_pool", width, pool, 1))
    declare("Mixed_6a", (".branch3x3", 288, 384, 3), (".branch3x3dbl_1", 288, 64, 1), (".branch3x3dbl_2", 64, 96, 3),
            (".branch3x3dbl_3", 96, 96, 3))
    for block, mid in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        declare(block, (".branch1x1", 768, 192, 1), (".branch7x7_1", 768, mid, 1), (".branch7x7_2", mid, mid, (1, 7)),
                (".branch7x7_3", mid, 192, (7, 1)), (".branch7x7dbl_1", 768, mid, 1),
                (".branch7x7dbl_2", mid, mid, (7, 1)), (".branch7x7dbl_3", mid, mid, (1, 7)),
                (".branch7x7dbl_4", mid, mid, (7, 1)), (".branch7x7dbl_5", mid, 192, (1, 7)),
                (".branch_pool", 768, 192, 1))
    declare("Mixed_7a", (".branch3x3_1", 768, 192, 1), (".branch3x3_2", 192, 320, 3), (".branch7x7x3_1", 768, 192, 1),
            (".branch7x7x3_2", 192, 192, (1, 7)), (".branch7x7x3_3", 192, 192, (7, 1)),
            (".branch7x7x3_4", 192, 192, 3))
    for block, width in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        declare(block, (".branch1x1", width, 320, 1), (".branch3x3_1", width, 384, 1),
                (".branch3x3_2a", 384, 384, (1, 3)), (".branch3x3_2b", 384, 384, (3, 1)),
                (".branch3x3dbl_1", width, 448, 1), (".branch3x3dbl_2", 448, 384, 3),
                (".branch3x3dbl_3a", 384, 384, (1, 3)), (".branch3x3dbl_3b", 384, 384, (3, 1)),
                (".branch_pool", width, 192, 1))
    return shapes


@contextlib.contextmanager
def full_precision(device):
    """Float32 arithmetic without TF32, bfloat16 or autocast, whatever the caller set; the settings are put back after."""
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
        holders, name, exact = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.conv,
                                backends.mkldnn.matmul), "fp32_precision", "ieee"
    else:
        holders, name, exact = (backends.cuda.matmul, backends.cudnn), "allow_tf32", False
    saved = [getattr(holder, name) for holder in holders]
    matmul_precision = torch.get_float32_matmul_precision()
    try:
        for holder in holders:
            setattr(holder, name, exact)
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        for holder, value in zip(holders, saved):
            setattr(holder, name, value)
        if name == "allow_tf32":  # put back as True, it turns "medium" into "high"
            torch.set_float32_matmul_precision(matmul_precision)


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


def check_images(images, what="images"):
    """Raise ValueError unless images is a (B, H, W, 3) uint8 batch, saying what it looks like and how to mend it."""
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    got = f"{what}: got {dtype} {shape}, wanted uint8 (B, H, W, 3)"
    if len(shape) != 4:
        raise UserError(f"{got}; give one array with a batch axis and three colour channels")
    if shape[3] != 3 and shape[1] == 3:
        raise UserError(f"{got}; the layout is NCHW, use images.transpose(0, 2, 3, 1) (torch: permute)")
    if shape[3] != 3:
        raise UserError(f"{got}; repeat a grey channel three times, drop an alpha channel")
    if dtype != "uint8":
        raise UserError(f"{got}; for values in [-1, 1] use floor((x + 1) * 127.5) clipped to 0..255 (utils.images.to_uint8)")
    if 0 in shape:
        raise UserError(f"{got}; the images are empty")


def load_weights(weights):
    """Read Inception weights and check their names and shapes.

    weights: path of a safe torch file, or a state dict. Returns (state dict, sha256 hex; of the file, or of the tensors).
    Raises FileNotFoundError or ValueError with the remedy.
    """
    if isinstance(weights, (str, os.PathLike)):
        state, sha256 = _read_file(weights)
    else:
        state, sha256 = weights, hash_tensors(weights)
    _check_state(state, weights if isinstance(weights, (str, os.PathLike)) else "state dict")
    return state, sha256


def _read_file(path):
    if not os.path.isfile(path):
        raise UserError(f"Inception weights {path} not found; get them with "
                        f"`python3 download_assets.py --name inception`, or give their place with --weights")
    return read_tensors(path), hash_file(path)


def hash_file(path):
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_tensors(path):
    """A state dict from a .safetensors file or a torch file, never by unpickling objects. Raises ValueError if that is not possible."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # in bytes that are no torch file the reader can stumble over anything
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: not a file of plain tensors ({type(error).__name__}: {reason[:120]}); "
                        "was the download cut short, or is it a pickled network?") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: not a plain state dict (name -> tensor); save the network's state_dict() alone")
    return state


def hash_tensors(state):
    """sha256 of a state dict's names and bytes, hex."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_state(state, source):
    wanted = {"fc.weight": (NUM_CLASSES, POOL_DIM), "fc.bias": (NUM_CLASSES,)}
    for name, (in_channels, out_channels, kernel) in convolution_shapes().items():
        wanted[f"{name}.conv.weight"] = (out_channels, in_channels, *kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            wanted[f"{name}.bn.{part}"] = (out_channels,)
    for name, shape in wanted.items():
        if name not in state:
            raise UserError(f"{source}: tensor {name} is missing ({len(state)} tensors found, {len(wanted)} wanted); "
                            "give the FID Inception file pt_inception-2015-12-05-6726825d.pth")
        if tuple(state[name].shape) != shape:
            raise UserError(f"{source}: {name} is {tuple(state[name].shape)}, wanted {shape}; "
                            "torchvision's own Inception has 1000 classes and is another network")


def _fold(state, name):
    """One convolution with its BatchNorm (running statistics) folded in: weight (O, I, h, w) and bias (O,), float32."""
    part = {key: state[f"{name}.{key}"].double() for key in
            ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")}
    scale = part["bn.weight"] / (part["bn.running_var"] + BN_EPS).sqrt()
    weight = part["conv.weight"] * scale[:, None, None, None]
    return weight.float(), (part["bn.bias"] - part["bn.running_mean"] * scale).float()


class FeatureExtractor:
    """uint8 images -> Inception features, in eval mode by construction: the BatchNorms are folded into the convolutions.

    weights: path or state dict, see load_weights; weights_sha256 says which they were.
    device: where to compute; default this process's device.
    """

    def __init__(self, weights, device=None):
        state, self.weights_sha256 = load_weights(weights)
        self.device = torch.device(device if device is not None else distributed.device())
        self._convolutions = {name: self._place(*_fold(state, name)) for name in convolution_shapes()}
        on_cpu = self.device.type == "cpu"
        self._winograd = {name: winograd.transform_weight(self._convolutions[name][0]) for name in WINOGRAD if on_cpu}
        self.class_weight = state["fc.weight"].float().to(self.device)  # (1008, 2048); IS uses no bias

    def _place(self, weight, bias):
        return weight.to(self.device, memory_format=torch.channels_last), bias.to(self.device)

    @torch.no_grad()
    def __call__(self, images):
        """images: (B, H, W, 3) uint8, numpy or torch. Returns float32 pool (B, 2048) and spatial (B, 2023) on the device."""
        check_images(images)
        images = torch.as_tensor(images)
        with full_precision(self.device):
            if self.device.type != "cpu":
                return self._trunk(self._stem(images.to(self.device, non_blocking=True)))
            pool, spatial = zip(*(self._trunk(torch.cat([self._stem(few) for few in part.split(CPU_STEM_CHUNK)]))
                                  for part in images.split(CPU_CHUNK)))
        return torch.cat(pool), torch.cat(spatial)

    @torch.no_grad()
    def logits(self, pool):
        """Class logits (B, 1008) without the bias, as the Inception Score uses them."""
        with full_precision(self.device):
            return pool.to(self.device) @ self.class_weight.T

    def _convolve(self, name, x, stride=1, same=True):
        """Convolution with its folded BatchNorm, before the ReLU; `same` pads so that stride 1 keeps the size."""
        weight, bias = self._convolutions[name]
        if name in self._winograd:
            return winograd.convolve(x, self._winograd[name], bias, padding=int(same))
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if same else 0
        return F.conv2d(x, weight, bias, stride, padding)

    def _conv(self, name, x, stride=1, same=True):
        return self._convolve(name, x, stride, same).relu_()

    def _mean_conv(self, name, x):
        """A mean pool, then a 1x1 convolution; done in the other order, which is equal and pools fewer channels."""
        return F.avg_pool2d(self._convolve(name, x), 3, stride=1, padding=1, count_include_pad=False).relu_()

    def _max_conv(self, name, x):
        """The last block's pool branch, which the FID network has by a slip that became the standard."""
        return self._conv(name, F.max_pool2d(x, 3, stride=1, padding=1))

    def _chain(self, x, *names):
        for name in names:
            x = self._conv(name, x)
        return x

    def _stem(self, images):
        """images: (B, H, W, 3) uint8 on the device. Returns the first layers' output (B, 192, 35, 35)."""
        x = resize_tf1(images).sub_(128).div_(128).permute(0, 3, 1, 2)  # NCHW view of channels-last memory
        x = self._conv("Conv2d_1a_3x3", x, stride=2, same=False)       # (B, 32, 149, 149)
        x = self._conv("Conv2d_2a_3x3", x, same=False)                 # (B, 32, 147, 147)
        x = self._convolve("Conv2d_2b_3x3", x)                           # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2).relu_()                       # (B, 64, 73, 73), the ReLU on the smaller map
        x = self._conv("Conv2d_3b_1x1", x)                             # (B, 80, 73, 73)
        x = self._convolve("Conv2d_4a_3x3", x, same=False)               # (B, 192, 71, 71)
        return F.max_pool2d(x, 3, stride=2).relu_()                    # (B, 192, 35, 35)

    def _trunk(self, x):
        """x: what _stem returns. Returns pool (B, 2048) and spatial (B, 2023)."""
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._block_35(name, x)                                # (B, 256 then 288, 35, 35)
        x = self._reduce_35("Mixed_6a", x)                             # (B, 768, 17, 17)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            branches = self._branches_17(name, x)
            if name == "Mixed_6d":
                spatial = branches[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 2023), order H, W, C
            x = torch.cat(branches, 1)                                 # (B, 768, 17, 17)
            del branches  # or they would stay in memory beside the next block's
        x = self._reduce_17("Mixed_7a", x)                             # (B, 1280, 8, 8)
        x = self._block_8("Mixed_7b", x, self._mean_conv)              # (B, 2048, 8, 8)
        x = self._block_8("Mixed_7c", x, self._max_conv)               # (B, 2048, 8, 8)
        return x.mean((2, 3)), spatial

    def _block_35(self, name, x):
        return torch.cat((
            self._conv(f"{name}.branch1x1", x),
            self._chain(x, f"{name}.branch5x5_1", f"{name}.branch5x5_2"),
            self._chain(x, f"{name}.branch3x3dbl_1", f"{name}.branch3x3dbl_2", f"{name}.branch3x3dbl_3"),
            self._mean_conv(f"{name}.branch_pool", x),
        ), 1)

    def _reduce_35(self, name, x):
        double = self._chain(x, f"{name}.branch3x3dbl_1", f"{name}.branch3x3dbl_2")
        return torch.cat((
            self._conv(f"{name}.branch3x3", x, stride=2, same=False),
            self._conv(f"{name}.branch3x3dbl_3", double, stride=2, same=False),
            F.max_pool2d(x, 3, stride=2),
        ), 1)

    def _branches_17(self, name, x):
        return (
            self._conv(f"{name}.branch1x1", x),
            self._chain(x, *(f"{name}.branch7x7_{i}" for i in (1, 2, 3))),
            self._chain(x, *(f"{name}.branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
            self._mean_conv(f"{name}.branch_pool", x),
        )

    def _reduce_17(self, name, x):
        seven = self._chain(x, *(f"{name}.branch7x7x3_{i}" for i in (1, 2, 3)))
        return torch.cat((
            self._conv(f"{name}.branch3x3_2", self._conv(f"{name}.branch3x3_1", x), stride=2, same=False),
            self._conv(f"{name}.branch7x7x3_4", seven, stride=2, same=False),
            F.max_pool2d(x, 3, stride=2),
        ), 1)

    def _block_8(self, name, x, pool_conv):
        three = self._conv(f"{name}.branch3x3_1", x)
        double = self._chain(x, f"{name}.branch3x3dbl_1", f"{name}.branch3x3dbl_2")
        return torch.cat((
            self._conv(f"{name}.branch1x1", x),
            self._conv(f"{name}.branch3x3_2a", three),
            self._conv(f"{name}.branch3x3_2b", three),
            self._conv(f"{name}.branch3x3dbl_3a", double),
            self._conv(f"{name}.branch3x3dbl_3b", double),
            pool_conv(f"{name}.branch_pool", x),
        ), 1)
