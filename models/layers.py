"""The parts of a diffusion transformer: patches, positions, embedders and the adaLN-Zero block.

Attribute names are the published checkpoint format. Source: Peebles & Xie 2023 (DiT).
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


# ---- patches and positions

def patchify(images, patch_size):
    """(B, C, H, W) -> (B, L, p*p*C): patches row by row, each with its channels last."""
    batch_size, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, rows * columns, -1)


def unpatchify(patches, patch_size):
    """Inverse of patchify for square images: (B, L, p*p*C) -> (B, C, H, H)."""
    batch_size, num_tokens, _ = patches.shape
    grid = math.isqrt(num_tokens)
    images = patches.reshape(batch_size, grid, grid, patch_size, patch_size, -1)
    return images.permute(0, 5, 1, 3, 2, 4).reshape(batch_size, -1, grid * patch_size, grid * patch_size)


def sincos_positions(width, grid, unit_grid=None):
    """Fixed positions (1, grid*grid, width) float32: the column in the first half, the row in the second.

    Each half holds sines, then cosines, at width/4 frequencies from 1 down to 1/10000 (excluded).
    unit_grid: the grid that another network was trained on. Its patch is then the unit of length over the same image,
    which interpolates its positions. None: this grid.
    """
    frequencies = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) * ((unit_grid or grid) / grid) - 0.5
    angles = torch.outer(centres, frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width/2)
    column = axis.repeat(grid, 1)
    row = axis.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1).float().unsqueeze(0)


# ---- embedders

class PatchEmbed(nn.Module):
    """Linear embedding of patches. Checkpoints store it as a convolution, so its weight has that shape."""

    def __init__(self, patch_size, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches):
        """patches: (B, K, p*p*C), all or some of those of patchify. Returns (B, K, D)."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C)
        return F.linear(patches, weight, self.proj.bias)


class TimestepEmbedder(nn.Module):
    """MLP of 128 cosines and 128 sines of the noise label, at frequencies from 1 down to 1/10000 (excluded)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, c_noise):
        """c_noise: (B,) float32. Returns (B, D)."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=c_noise.device) / 128)
        angles = torch.outer(c_noise, frequencies)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """A linear layer without bias on the one-hot label, done as a table look-up."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Linear(num_classes, width, bias=False)

    def forward(self, class_labels):
        """class_labels: (B,) int64. Returns (B, D), exactly zero where the label is num_classes (unconditional).

        Unconditional rows are looked up too, so that the table has a gradient in every step, which DDP waits for.
        """
        unconditional = class_labels == self.embedding_table.in_features
        rows = F.embedding(class_labels.masked_fill(unconditional, 0), self.embedding_table.weight.t())
        return rows.masked_fill(unconditional.unsqueeze(1), 0.0)


# ---- transformer

def attention(q, k, v):
    """Softmax attention of (B, heads, L, d) tensors."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's CPU kernel is 2-4 times slower than plain products in bfloat16, which is 15 % of a training step
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens):
        batch_size, num_tokens, width = tokens.shape
        qkv = self.qkv(tokens).view(batch_size, num_tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, d)
        mixed = attention(q, k, v).transpose(1, 2).reshape(batch_size, num_tokens, width)
        return self.proj(mixed)


def mlp(width):
    """Two linear layers, four times wider in between."""
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(approximate="tanh"), fc2=nn.Linear(4 * width, width)))


def layer_norm(width):
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def adaln(cond_width, num_outputs):
    """The conditioning layer; its linear part carries the published name adaLN_modulation.1."""
    return nn.Sequential(nn.SiLU(), nn.Linear(cond_width, num_outputs))


def modulate(tokens, shift, scale):
    """tokens * (1 + scale) + shift. tokens: (B, L, D). shift, scale: (B or 1, 1, D)."""
    return torch.addcmul(shift, tokens, 1 + scale)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, width, num_heads, cond_width):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = layer_norm(width)
        self.mlp = mlp(width)
        self.adaLN_modulation = adaln(cond_width, 6 * width)

    def forward(self, tokens, c):
        """tokens: (B, L, D). c: (B, D_cond), or (1, D_cond) when all samples share it. Returns (B, L, D)."""
        modulation = self.adaLN_modulation(c).unsqueeze(1)  # (B or 1, 1, 6D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=2)
        attended = self.attn(modulate(self.norm1(tokens), shift_attn, scale_attn))
        tokens = torch.addcmul(tokens, gate_attn, attended)
        return torch.addcmul(tokens, gate_mlp, self.mlp(modulate(self.norm2(tokens), shift_mlp, scale_mlp)))


class ModulatedLinear(nn.Module):
    """LayerNorm, shift and scale by the conditioning, linear: the way into the decoder and out of the network."""

    def __init__(self, width, cond_width, out_features):
        super().__init__()
        self.norm = layer_norm(width)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = adaln(cond_width, 2 * width)

    def forward(self, tokens, c):
        """tokens: (B, L, D). c: as in DiTBlock. Returns (B, L, out_features)."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)
        return self.linear(modulate(self.norm(tokens), shift, scale))
