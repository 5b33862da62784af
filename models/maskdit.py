"""MaskDiT: an encoder on the kept patches, a small decoder on all of them.

Source: Zheng et al. 2024, "Fast Training of Diffusion Models with Masked Transformers".
"""

from collections import namedtuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.cli import UserError
from .layers import (DiTBlock, LabelEmbedder, ModulatedLinear, PatchEmbed, TimestepEmbedder,
                     patchify, sincos_positions, unpatchify)
from .masking import Unshuffle, gather_tokens


Size = namedtuple("Size", "depth width num_heads")
SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
    "H": Size(32, 1280, 16),
}
PATCH_SIZES = (1, 2, 4, 8)


def parse_model_type(model_type):
    """"DiT-XL/2" -> (Size, patch size). Raises UserError with the known names."""
    name, _, patch = model_type.partition("/")
    _, _, size = name.partition("-")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        raise UserError(f"model.model_type={model_type!r} is unknown; want DiT-SIZE/PATCH with SIZE one of "
                        f"{', '.join(SIZES)} and PATCH one of {', '.join(map(str, PATCH_SIZES))}")
    return SIZES[size], int(patch)


class MaskDiT(nn.Module):
    """The raw network F; EDMPrecond makes the denoiser of it.

    model_type: "DiT-XL/2" is size XL (S, B, L, XL, H) with patch size 2 (1, 2, 4, 8).
    in_size: height and width of the square latents. num_classes: 0 makes it unconditional.
    use_decoder: without it this is a plain DiT, which takes no mask.
    depth, width, num_heads: of the encoder; None takes those of the size.
    activation_checkpointing: recompute each block in the backward pass instead of storing its activations.
    Raises UserError for unknown types and sizes that do not divide.
    """

    def __init__(self, model_type, in_size, in_channels, num_classes, use_decoder=True,
                 depth=None, width=None, num_heads=None,
                 decoder_depth=8, decoder_width=512, decoder_num_heads=16, activation_checkpointing=False):
        super().__init__()
        size, patch_size = parse_model_type(model_type)
        depth, width, num_heads = (own if given is None else given for own, given in zip(size, (depth, width, num_heads)))
        if in_size % patch_size:
            raise UserError(f"model.in_size={in_size} must be divisible by the patch size, {patch_size} in {model_type}")
        _check_width("", width, num_heads)
        self.in_size, self.patch_size, self.in_channels = in_size, patch_size, in_channels
        self.num_tokens = (in_size // patch_size) ** 2
        self.num_classes = num_classes
        self.use_decoder = use_decoder
        self.activation_checkpointing = activation_checkpointing

        self.x_embedder = PatchEmbed(patch_size, in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width) if num_classes else None
        self.pos_embed = nn.Parameter(sincos_positions(width, in_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, width) for _ in range(depth))
        if use_decoder:
            _check_width("decoder_", decoder_width, decoder_num_heads)
            self.decoder_layer = ModulatedLinear(width, width, decoder_width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
            self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_width, in_size // patch_size), requires_grad=False)
            self.decoder_blocks = nn.ModuleList(
                DiTBlock(decoder_width, decoder_num_heads, width) for _ in range(decoder_depth))
        out_width = decoder_width if use_decoder else width
        self.final_layer = ModulatedLinear(out_width, width, patch_size**2 * in_channels)
        self._init_weights()

    def _init_weights(self):
        """Xavier everywhere, small normal tables, and zeros where a block must start as the identity."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                if "adaLN_modulation" in name or name in ("final_layer.linear", "decoder_layer.linear"):
                    nn.init.zeros_(module.weight)
                elif name.startswith(("t_embedder", "y_embedder")):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: fills the weight itself
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.use_decoder:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x, c_noise, class_labels=None, mask=None):
        """x: (B, C, H, W) scaled input. c_noise: (B,) or (1,). class_labels: (B,) or None. Returns (B, C, H, W).

        mask: TokenMask of the patches that the encoder does not see. The tokens then stay in its shuffled order to the
        end: only the p*p*C values of the patches are put in another order, never the wide tokens.
        """
        if mask is not None and not self.use_decoder:
            raise ValueError("a mask needs the decoder: make the model with use_decoder=True, or give no mask")
        c = self.t_embedder(c_noise)  # (B, D), or (1, D) when one c_noise and no label serve the whole batch
        if self.y_embedder is not None:
            if class_labels is None:
                class_labels = torch.full((1,), self.num_classes, dtype=torch.int64, device=c.device)
            c = c + self.y_embedder(class_labels)

        patches, positions = patchify(x, self.patch_size), self.pos_embed
        if mask is not None:
            patches, positions = gather_tokens(patches, mask.ids_keep), positions[0][mask.ids_keep]
        tokens = self.x_embedder(patches) + positions         # (B, L_keep, D)
        tokens = self._run(self.blocks, tokens, c)
        if self.use_decoder:
            tokens = self.decoder_layer(tokens, c)            # (B, L_keep, D_dec)
            # appended also when no token is missing, so that the mask token has a gradient in every step
            num_missing = self.num_tokens - tokens.shape[1]
            tokens = torch.cat([tokens, self.mask_token.expand(len(tokens), num_missing, -1)], dim=1)  # (B, L, D_dec)
            positions = self.decoder_pos_embed
            tokens = tokens + (positions if mask is None else positions[0][mask.ids_shuffle])
            tokens = self._run(self.decoder_blocks, tokens, c)
        patches = self.final_layer(tokens, c)                 # (B, L, p*p*C)
        if mask is not None:
            patches = Unshuffle.apply(patches, mask.ids_restore, mask.ids_shuffle)
        return unpatchify(patches, self.patch_size)

    def _run(self, blocks, tokens, c):
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, c)
        return tokens


def _check_width(prefix, width, num_heads):
    if width % num_heads:
        raise UserError(f"model.{prefix}width={width} must be divisible by model.{prefix}num_heads={num_heads}")
    if width % 4:
        raise UserError(f"model.{prefix}width={width} must be divisible by 4 (sines and cosines of two axes)")
