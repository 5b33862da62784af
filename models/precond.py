"""The denoiser D(x; sigma) around the raw network. Source: Karras et al. 2022 (EDM), Table 1."""

import torch
from torch import nn

from utils.cli import UserError
from .maskdit import MaskDiT, parse_model_type


class EDMPrecond(nn.Module):
    """Scales input, output and noise level so that the network always sees and makes unit variance.

    model: a MaskDiT. sigma_data: standard deviation of the latents.
    """

    def __init__(self, model, sigma_data=0.5):
        super().__init__()
        self.model = model
        self.sigma_data = sigma_data
        self.in_size, self.in_channels = model.in_size, model.in_channels
        self.patch_size, self.num_tokens = model.patch_size, model.num_tokens
        self.num_classes = model.num_classes

    def forward(self, x, sigma, class_labels=None, mask=None, modulations=None):
        """Denoise x (B, C, H, W) = latents + sigma * noise. Returns (B, C, H, W) float32.

        sigma: (B,), or a scalar for all. class_labels: (B,) class indices; num_classes, or None, is unconditional.
        mask: TokenMask of the patches that the encoder does not see. modulations: what `modulations` returned for the same
        sigma and class_labels (or rows that broadcast to them), so as not to be computed again. The network may run under autocast;
        the scalings are float32. A label out of range is a ValueError on the CPU; on a GPU, where looking would
        stall it, a device-side assertion.
        """
        self._check(x, class_labels, mask)
        x = x.to(torch.float32)
        sigma = _as_batch(sigma, x).reshape(-1, 1, 1, 1)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        output = self.model(c_in * x, _noise_label(sigma.flatten()), class_labels, mask, modulations)
        return c_skip * x + c_out * output.to(torch.float32)

    def modulations(self, sigma, class_labels=None):
        """See MaskDiT.modulations. sigma: a number or CPU scalar. class_labels: (R,) or None."""
        sigma = _as_batch(sigma, self.model.pos_embed)
        return self.model.modulations(_noise_label(sigma), class_labels)

    def cast_layers(self, dtype):
        """See MaskDiT.cast_layers."""
        self.model.cast_layers(dtype)

    def compile_blocks(self, **options):
        """See MaskDiT.compile_blocks."""
        self.model.compile_blocks(**options)

    def _check(self, x, class_labels, mask):
        wanted = (self.in_channels, self.in_size, self.in_size)
        if x.ndim != 4 or x.shape[1:] != wanted:
            raise UserError(f"x has shape {tuple(x.shape)}; this model takes (batch, {', '.join(map(str, wanted))})")
        if mask is not None and mask.ids_shuffle.shape != (len(x), self.num_tokens):
            raise UserError(f"mask is for (batch, tokens) = {tuple(mask.ids_shuffle.shape)}; "
                            f"x has {(len(x), self.num_tokens)}")
        if class_labels is not None:
            self._check_labels(class_labels, len(x))

    def _check_labels(self, class_labels, batch_size):
        if not self.num_classes:
            raise UserError("class_labels given to an unconditional model (num_classes=0); pass None")
        if class_labels.shape != (batch_size,) or class_labels.is_floating_point():
            raise UserError(f"class_labels is {class_labels.dtype} of shape {tuple(class_labels.shape)}; "
                            f"want class indices (int64) of shape ({batch_size},), not one-hot rows")
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = class_labels.aminmax()
            if low < 0 or high > self.num_classes:
                raise UserError(f"class_labels from {low} to {high} are out of range; want 0 to "
                                f"{self.num_classes - 1}, or {self.num_classes} for unconditional")


def _noise_label(sigma):
    return sigma.log() / 4


def _as_batch(sigma, x):
    """sigma as a float32 tensor (1,) or (B,) on x's device. A number or a CPU scalar does not stall a GPU."""
    if not torch.is_tensor(sigma) or (sigma.ndim == 0 and sigma.device.type == "cpu"):
        return torch.full((1,), float(sigma), dtype=torch.float32, device=x.device)
    sigma = sigma.to(device=x.device, dtype=torch.float32).reshape(-1)
    if len(sigma) not in (1, len(x)):
        raise UserError(f"sigma has {len(sigma)} values for a batch of {len(x)}; want one, or one per sample")
    return sigma


def create_model(model_type, in_size, in_channels, num_classes, use_decoder=True, *, depth=None, width=None,
                 num_heads=None, patch_size=None, decoder_depth=8, decoder_width=512, decoder_num_heads=16,
                 activation_checkpointing=False, embed_kept=True, shuffled_decoder=True, product_attention=True):
    """Make a denoiser by name: "DiT-XL/2" is size XL (S, B, L, XL, H) with patch size 2 (1, 2, 4, 8).

    in_size, in_channels: of the latents, e.g. 32 and 4. num_classes: 0 is unconditional.
    depth, width, num_heads and patch_size, when given, replace those of the name; see MaskDiT for the rest.
    Returns EDMPrecond with fresh weights. Raises ValueError for unknown names and sizes that do not divide.
    """
    size, named_patch_size = parse_model_type(model_type)
    model = MaskDiT(
        in_size=in_size, in_channels=in_channels, num_classes=num_classes,
        patch_size=named_patch_size if patch_size is None else patch_size,
        depth=size.depth if depth is None else depth,
        width=size.width if width is None else width,
        num_heads=size.num_heads if num_heads is None else num_heads,
        use_decoder=use_decoder, decoder_depth=decoder_depth, decoder_width=decoder_width,
        decoder_num_heads=decoder_num_heads, activation_checkpointing=activation_checkpointing,
        embed_kept=embed_kept, shuffled_decoder=shuffled_decoder, product_attention=product_attention)
    return EDMPrecond(model)
