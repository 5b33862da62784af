"""EDM around the raw network: the denoiser D(x; sigma) and the loss that trains it.

Source: Karras et al. 2022 (EDM), Table 1; Zheng et al. 2024 (MaskDiT) for the loss of the removed patches.
"""

from collections import namedtuple

import torch
from torch import nn

from utils.cli import UserError
from .layers import DiTBlock, ModulatedLinear, patchify
from .masking import count_kept, random_mask

SIGMA_DATA = 0.5  # standard deviation of the latents, for the scalings and the weight of the loss


# ---- denoiser

class EDMPrecond(nn.Module):
    """Scales input, output and noise level so that the network always sees and makes unit variance.

    model: a network with what models/__init__.py lists.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.in_size, self.in_channels = model.in_size, model.in_channels
        self.patch_size, self.num_tokens = model.patch_size, model.num_tokens
        self.num_classes = model.num_classes

    def forward(self, x, sigma, class_labels=None, mask=None):
        """Denoise x (B, C, H, W) = latents + sigma * noise. Returns (B, C, H, W) float32.

        sigma: (B,), or a scalar for all. class_labels: (B,) class indices; num_classes, or None, is unconditional.
        mask: TokenMask of the patches that the encoder does not see. The network may run under autocast; the scalings
        are float32. Raises ValueError for other shapes and, on a CPU, for labels out of range (on a GPU the look-up itself
        fails: reading them here would stall it).
        """
        x = x.to(torch.float32)
        if not torch.is_tensor(sigma) or (sigma.ndim == 0 and sigma.device.type == "cpu"):
            sigma = torch.full((1,), float(sigma), device=x.device)  # filled on the device, so that nothing waits for a copy
        sigma = sigma.to(device=x.device, dtype=torch.float32).reshape(-1)
        self._check(x, sigma, class_labels, mask)
        c_noise = sigma.log() / 4
        sigma = sigma.reshape(-1, 1, 1, 1)
        variance = sigma**2 + SIGMA_DATA**2
        c_skip = SIGMA_DATA**2 / variance
        c_out = sigma * SIGMA_DATA / variance.sqrt()
        c_in = 1 / variance.sqrt()
        output = self.model(c_in * x, c_noise, class_labels, mask)
        return c_skip * x + c_out * output.to(torch.float32)

    def _check(self, x, sigma, class_labels, mask):
        batch_size, wanted = len(x), (self.in_channels, self.in_size, self.in_size)
        if x.ndim != 4 or x.shape[1:] != wanted:
            raise ValueError(f"x has shape {tuple(x.shape)}; this model takes (batch, {', '.join(map(str, wanted))})")
        if len(sigma) not in (1, batch_size):
            raise ValueError(f"sigma has {len(sigma)} values for a batch of {batch_size}; want one, or one per sample")
        if mask is not None and mask.ids_shuffle.shape != (batch_size, self.num_tokens):
            raise ValueError(f"mask is for (batch, tokens) = {tuple(mask.ids_shuffle.shape)}; "
                             f"x has {(batch_size, self.num_tokens)}")
        if class_labels is None:
            return
        if not self.num_classes:
            raise ValueError("class_labels given to an unconditional model (num_classes=0); pass None")
        if class_labels.shape != (batch_size,) or class_labels.is_floating_point():
            raise ValueError(f"class_labels is {class_labels.dtype} of shape {tuple(class_labels.shape)}; "
                             f"want class indices (int64) of shape ({batch_size},), not one-hot rows")
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling() and batch_size:
            low, high = class_labels.aminmax()
            if low < 0 or high > self.num_classes:
                raise ValueError(f"class_labels from {low} to {high} are out of range; want 0 to "
                                 f"{self.num_classes - 1}, or {self.num_classes} for unconditional")

    def cast_layers(self, dtype):
        """Store weights in `dtype` that autocast would round at every call: the same numbers, for sampling only."""
        for module in self.modules():
            if isinstance(module, (DiTBlock, ModulatedLinear)):
                module.to(dtype)

    def compile_blocks(self, **options):
        """torch.compile every DiTBlock in place; parameter names do not change.

        All blocks of one width share a graph, so this starts much sooner than compiling the whole network.
        options go to torch.compile: pass dynamic=True when the number of kept tokens changes during training.
        """
        for module in self.modules():
            if isinstance(module, DiTBlock):
                module.compile(**options)


# ---- loss

LossDraws = namedtuple("LossDraws", "sigma noise mask")  # (B,), unit normal (B, C, H, W), TokenMask or None


class EDMLoss:
    """Weighted denoising error of the kept patches, and reconstruction error (MAE) of the removed ones.

    P_mean, P_std: of ln sigma in training. patch_size: that of the network.
    weights: what each named loss counts in the sum that is trained; a name without a weight counts 1.
    """

    def __init__(self, P_mean=-1.2, P_std=1.2, mae_loss_coef=0.1, patch_size=2):
        self.P_mean, self.P_std, self.patch_size = P_mean, P_std, patch_size
        self.weights = {"denoising": 1.0, "mae": mae_loss_coef}

    def __call__(self, net, latents, class_labels=None, mask_ratio=0.0, generator=None, draws=None):
        """Unweighted losses {"denoising": (B,), "mae": (B,)} float32; mae is exactly 0 where nothing is removed.

        net: EDMPrecond, perhaps wrapped. latents: (B, C, H, W). class_labels: (B,) or None.
        draws: use these instead of drawing (mask_ratio and generator are then not used).
        """
        sigma, noise, mask = self.draw(latents, mask_ratio, generator) if draws is None else draws
        noised = latents + sigma.reshape(-1, 1, 1, 1) * noise
        return self.terms(latents, noised, net(noised, sigma, class_labels, mask=mask), sigma, mask)

    def terms(self, latents, noised, denoised, sigma, mask):
        """The losses of one forward pass; a loss of one's own adds to them. latents, noised, denoised: (B, C, H, W)."""
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        error = patchify(denoised - latents, self.patch_size).square().mean(dim=2)  # (B, L)
        if mask is None:
            return {"denoising": weight * error.mean(dim=1), "mae": torch.zeros_like(weight)}
        target = normalize_patches(patchify(noised, self.patch_size))
        mae = (patchify(denoised, self.patch_size) - target).square().mean(dim=2)  # (B, L)
        kept, removed = 1 - mask.mask, mask.mask
        num_removed = max(1, error.shape[1] - mask.num_keep)  # a mask that removes nothing has an error of 0 there
        return {"denoising": weight * (error * kept).sum(dim=1) / mask.num_keep, "mae": (mae * removed).sum(dim=1) / num_removed}

    def draw(self, latents, mask_ratio=0.0, generator=None):
        """Draw sigma, noise and mask, in that order, from one generator on the device of the latents: LossDraws."""
        batch_size, _, height, width = latents.shape
        num_tokens = (height // self.patch_size) * (width // self.patch_size)
        normal = torch.randn(batch_size, device=latents.device, generator=generator)
        noise = torch.randn(latents.shape, device=latents.device, generator=generator)
        mask = None
        if count_kept(num_tokens, mask_ratio) < num_tokens:
            mask = random_mask(batch_size, num_tokens, mask_ratio, generator, latents.device)
        return LossDraws((normal * self.P_std + self.P_mean).exp(), noise, mask)


def normalize_patches(patches):
    """Every patch (..., N) to mean 0 and unit (unbiased) variance; 1e-6 keeps flat ones finite."""
    if patches.shape[-1] < 2:
        raise UserError("a patch of one value has no variance to predict: use a larger patch size, or train.mask_ratio=0")
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def drop_labels(class_labels, num_classes, prob, generator=None):
    """Replace each label by num_classes (unconditional) with probability prob. class_labels: (B,) int64."""
    dropped = torch.rand(class_labels.shape, device=class_labels.device, generator=generator) < prob
    return class_labels.masked_fill(dropped, num_classes)


LOSSES = {"edm": EDMLoss}
