"""The training loss: denoising on the kept patches, reconstruction on the removed ones."""

from typing import NamedTuple

import torch

from utils.cli import UserError
from .layers import patchify
from .masking import TokenMask, count_kept, random_mask


class LossDraws(NamedTuple):
    """Everything random in one loss: sigma (B,), unit noise (B, C, H, W), and the mask, None if nothing is removed."""

    sigma: torch.Tensor
    noise: torch.Tensor
    mask: TokenMask | None


class LossParts(NamedTuple):
    """Per-sample losses (B,) float32; mae is exactly 0 where nothing is removed."""

    denoising: torch.Tensor
    mae: torch.Tensor


class EDMLoss:
    """Weighted denoising error of the kept patches + mae_loss_coef * reconstruction error of the removed ones.

    P_mean, P_std: of ln sigma in training. patch_size: of the network; None asks the network itself,
    which a wrapped one (DDP) cannot answer. token_multiple: see count_kept. Source: Karras et al. 2022, Zheng et al. 2024.
    """

    def __init__(self, P_mean=-1.2, P_std=1.2, sigma_data=0.5, mae_loss_coef=0.1, patch_size=None, token_multiple=1):
        self.P_mean, self.P_std = P_mean, P_std
        self.sigma_data = sigma_data
        self.mae_loss_coef = mae_loss_coef
        self.patch_size = patch_size
        self.token_multiple = token_multiple

    def __call__(self, net, latents, class_labels=None, mask_ratio=0.0, generator=None, draws=None):
        """Per-sample losses (B,); see parts."""
        denoising, mae = self.parts(net, latents, class_labels, mask_ratio, generator, draws)
        return denoising + self.mae_loss_coef * mae

    def draw(self, latents, mask_ratio=0.0, generator=None, num_keep=None, patch_size=None):
        """Draw sigma, noise and mask, in that order, from one generator on the device of the latents.

        num_keep, when given, takes the place of mask_ratio; patch_size that of the loss. Returns LossDraws.
        """
        batch_size, _, height, width = latents.shape
        patch_size = self.patch_size if patch_size is None else patch_size
        if patch_size is None:
            raise UserError("patch_size is unknown; pass it here or to EDMLoss")
        num_tokens = (height // patch_size) * (width // patch_size)
        if num_keep is None:
            num_keep = count_kept(num_tokens, mask_ratio, self.token_multiple)
        normal = torch.randn(batch_size, device=latents.device, generator=generator)
        noise = torch.randn(latents.shape, device=latents.device, generator=generator)
        mask = None
        if num_keep != num_tokens:
            mask = random_mask(batch_size, num_tokens, num_keep=num_keep, generator=generator, device=latents.device)
        return LossDraws((normal * self.P_std + self.P_mean).exp(), noise, mask)

    def parts(self, net, latents, class_labels=None, mask_ratio=0.0, generator=None, draws=None):
        """Both parts of the loss, unweighted: LossParts.

        net: EDMPrecond, perhaps wrapped. latents: (B, C, H, W). class_labels: (B,) or None.
        draws: use these instead of drawing (mask_ratio and generator are then not used).
        """
        patch_size = net.patch_size if self.patch_size is None else self.patch_size
        if draws is None:
            draws = self.draw(latents, mask_ratio, generator, patch_size=patch_size)
        noised = latents + draws.sigma.reshape(-1, 1, 1, 1) * draws.noise
        denoised = net(noised, draws.sigma, class_labels, mask=draws.mask)

        weight = (draws.sigma**2 + self.sigma_data**2) / (draws.sigma * self.sigma_data) ** 2
        error = patchify(denoised - latents, patch_size).square().mean(dim=2)  # (B, L)
        if draws.mask is None:
            return LossParts(weight * error.mean(dim=1), torch.zeros_like(weight))
        target = normalize_patches(patchify(noised, patch_size))
        mae = (patchify(denoised, patch_size) - target).square().mean(dim=2)  # (B, L)
        removed = draws.mask.mask
        return LossParts(weight * _masked_mean(error, 1 - removed), _masked_mean(mae, removed))


def normalize_patches(patches):
    """Every patch (..., N) to mean 0 and unit (unbiased) variance; 1e-6 keeps flat ones finite."""
    if patches.shape[-1] < 2:
        raise UserError("a patch of one value cannot be normalised; use a larger patch or no masking")
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def _masked_mean(values, chosen):
    """Mean of values (B, L) where chosen (B, L) is 1; 0 where none is."""
    return (values * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)


def drop_labels(class_labels, num_classes, prob, generator=None):
    """Replace each label by num_classes (unconditional) with probability prob. class_labels: (B,) int64."""
    dropped = torch.rand(class_labels.shape, device=class_labels.device, generator=generator) < prob
    return class_labels.masked_fill(dropped, num_classes)
