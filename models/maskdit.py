"""MaskDiT: an encoder on the kept patches, a small decoder on all of them.

Source: Zheng et al. 2024, "Fast Training of Diffusion Models with Masked Transformers".
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.cli import UserError
from .layers import (DiTBlock, LabelEmbedder, ModulatedLinear, PatchEmbed, TimestepEmbedder,
                     patchify, sincos_positions, unpatchify)
from .masking import gather_tokens, unmask


class Size(NamedTuple):
    depth: int
    width: int
    num_heads: int


SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
    "H": Size(32, 1280, 16),
}
PATCH_SIZES = (1, 2, 4, 8)


def parse_model_type(model_type):
    """"DiT-XL/2" -> (Size, patch size). Raises ValueError with the known names."""
    name, _, patch = str(model_type).partition("/")
    family, _, size = name.partition("-")
    if family != "DiT" or size not in SIZES or patch not in map(str, PATCH_SIZES):
        raise UserError(f"model_type={model_type!r} is unknown; want DiT-SIZE/PATCH with SIZE one of "
                        f"{', '.join(SIZES)} and PATCH one of {', '.join(map(str, PATCH_SIZES))}")
    return SIZES[size], int(patch)


def _check_width(prefix, width, num_heads):
    if width % num_heads:
        raise UserError(f"{prefix}width={width} must be divisible by {prefix}num_heads={num_heads}")
    if width % 4:
        raise UserError(f"{prefix}width={width} must be divisible by 4 (sines and cosines of two axes)")


class MaskDiT(nn.Module):
    """The raw network F; see EDMPrecond for the denoiser made of it.

    in_size: height and width of the square latents. num_classes: 0 makes it unconditional.
    use_decoder: without it this is a plain DiT, which takes no mask.
    activation_checkpointing: recompute each block in the backward pass instead of storing its activations.
    embed_kept: embed the kept patches only; else all of them, and then drop the removed ones. shuffled_decoder: the tokens stay in
    the mask's order throughout; else the decoder gets them in image order. product_attention: on CPUs in bfloat16, see
    layers.attention. All three change the order of sums, nothing else.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, in_size, patch_size, in_channels, num_classes, depth, width, num_heads,
                 use_decoder=True, decoder_depth=8, decoder_width=512, decoder_num_heads=16,
                 activation_checkpointing=False, embed_kept=True, shuffled_decoder=True, product_attention=True):
        super().__init__()
        if in_size % patch_size:
            raise UserError(f"in_size={in_size} must be divisible by patch_size={patch_size}")
        _check_width("", width, num_heads)
        self.in_size, self.patch_size, self.in_channels = in_size, patch_size, in_channels
        self.num_classes = num_classes
        self.num_tokens = (in_size // patch_size) ** 2
        self.use_decoder = use_decoder
        self.activation_checkpointing = activation_checkpointing
        self.embed_kept, self.shuffled_decoder = embed_kept, shuffled_decoder

        self.x_embedder = PatchEmbed(patch_size, in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width) if num_classes else None
        self.pos_embed = self._positions(width)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, width, product_attention) for _ in range(depth))
        if use_decoder:
            _check_width("decoder_", decoder_width, decoder_num_heads)
            self.decoder_layer = ModulatedLinear(width, width, decoder_width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
            self.decoder_pos_embed = self._positions(decoder_width)
            self.decoder_blocks = nn.ModuleList(
                DiTBlock(decoder_width, decoder_num_heads, width, product_attention) for _ in range(decoder_depth))
        out_width = decoder_width if use_decoder else width
        self.final_layer = ModulatedLinear(out_width, width, patch_size**2 * in_channels)
        self._init_weights()

    def _positions(self, width):
        table = sincos_positions(width, self.in_size // self.patch_size)
        return nn.Parameter(table, requires_grad=False)

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

    def forward(self, x, c_noise, class_labels=None, mask=None, modulations=None):
        """x: (B, C, H, W) scaled input. c_noise: (B,) or (1,). class_labels: (B,) or None. Returns (B, C, H, W).

        modulations: see `modulations`; c_noise and class_labels are then not looked at.
        With a mask the tokens stay in its shuffled order from the first layer to the last (see shuffled_decoder and embed_kept): only
        the p*p*C input and output values of the patches are ever moved.
        """
        if mask is not None and not self.use_decoder:
            raise UserError("a mask needs the decoder: make the model with use_decoder=True, or train it unmasked")
        c = self.embed_conditioning(c_noise, class_labels) if modulations is None else None  # (B or 1, D)
        tokens = self._embed(patchify(x, self.patch_size), mask)        # (B, L_keep, D)
        tokens = self._run(self.blocks, tokens, c, modulations)         # (B, L_keep, D)
        order = None if mask is None else mask.ids_shuffle              # of the tokens; None: image order
        if self.use_decoder:
            tokens = self._run([self.decoder_layer], tokens, c, modulations)  # (B, L_keep, D_dec)
            tokens = unmask(tokens, self.mask_token, self.num_tokens)   # (B, L, D_dec)
            if order is not None and not self.shuffled_decoder:
                tokens, order = gather_tokens(tokens, mask.ids_restore), None
            tokens = tokens + _pick(self.decoder_pos_embed, order)
            tokens = self._run(self.decoder_blocks, tokens, c, modulations)
        patches = self._run([self.final_layer], tokens, c, modulations)  # (B, L, p*p*C)
        if order is not None:
            patches = gather_tokens(patches, mask.ids_restore)
        return unpatchify(patches, self.patch_size)

    def _embed(self, patches, mask):
        """patches (B, L, p*p*C) -> tokens of those that the mask keeps (B, L_keep, D)."""
        if mask is not None and self.embed_kept:
            return self.x_embedder(gather_tokens(patches, mask.ids_keep)) + _pick(self.pos_embed, mask.ids_keep)
        tokens = self.x_embedder(patches) + self.pos_embed
        return tokens if mask is None else gather_tokens(tokens, mask.ids_keep)

    def embed_conditioning(self, c_noise, class_labels):
        """c (B, D); or (1, D), shared by the batch, when there is one c_noise and no label."""
        c = self.t_embedder(c_noise)
        if self.y_embedder is None:
            return c
        if class_labels is None:
            class_labels = torch.full((1,), self.num_classes, dtype=torch.int64, device=c.device)
        return c + self.y_embedder(class_labels)

    def modulations(self, c_noise, class_labels):
        """{layer: its shifts, scales and gates (B or 1, ...)}: all that depends on noise level and class, nothing else.

        For sampling, where several calls have them in common; in training each layer makes its own.
        """
        c = self.embed_conditioning(c_noise, class_labels)
        return {layer: layer.adaLN_modulation(c) for layer in self.modules() if isinstance(layer, (DiTBlock, ModulatedLinear))}

    def _run(self, layers, tokens, c, modulations):
        for layer in layers:
            if modulations is not None:
                tokens = layer(tokens, modulation=modulations[layer])
            elif self.activation_checkpointing and torch.is_grad_enabled() and isinstance(layer, DiTBlock):
                tokens = checkpoint(layer, tokens, c, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = layer(tokens, c)
        return tokens

    def cast_layers(self, dtype):
        """Store the weights that autocast would round to `dtype` at every call rounded once: the same numbers, for sampling only."""
        for module in self.modules():
            if isinstance(module, (DiTBlock, ModulatedLinear)):
                module.to(dtype)

    def compile_blocks(self, **options):
        """torch.compile every block in place; parameter names do not change.

        One graph serves all blocks of one width, so this starts much sooner than compiling the whole network.
        options go to torch.compile: pass dynamic=True when the number of kept tokens changes during training.
        """
        for module in self.modules():
            if isinstance(module, DiTBlock):
                module.compile(**options)


def _pick(positions, ids):
    """Positions (1, L, D) in the order of ids (B, K): (B, K, D); all of them, as they are, without ids."""
    return positions if ids is None else positions[0][ids]
