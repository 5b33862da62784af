"""The parts of a diffusion transformer: patches, positions, embedders, attention and adaLN-Zero blocks.

Attribute names are the published checkpoint format. Source: Peebles & Xie 2023 (DiT).
"""

import math

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

    Each half is sines, then cosines, at width/4 frequencies from 1 down to 1/10000 (excluded).
    unit_grid: measure in patches of a grid of this size over the same image (None: of this one), which interpolates the
    positions of a network trained on that grid.
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
    """Linear embedding of patches, stored as the convolution that it is in the checkpoints."""

    def __init__(self, patch_size, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches):
        """patches: (B, K, p*p*C), any subset of those of patchify. Returns (B, K, D)."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C)
        return F.linear(patches, weight, self.proj.bias)


class TimestepEmbedder(nn.Module):
    """MLP of 128 cosines and 128 sines of the noise label, at frequencies from 1 down to 1/10000 (excluded)."""

    num_frequencies = 128

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, c_noise):
        """c_noise: (B,) float32. Returns (B, D)."""
        exponents = torch.arange(self.num_frequencies, device=c_noise.device) / self.num_frequencies
        angles = torch.outer(c_noise, torch.exp(-math.log(10000) * exponents))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Bias-free linear layer of the one-hot label, done as a table look-up."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Linear(num_classes, width, bias=False)

    def forward(self, class_labels):
        """class_labels: (B,) int64, num_classes meaning unconditional: exactly zero. Returns (B, D).

        The look-up happens also for unconditional rows, so that the table always has a gradient.
        """
        unconditional = class_labels == self.embedding_table.in_features
        rows = F.embedding(class_labels.masked_fill(unconditional, 0), self.embedding_table.weight.t())
        return rows.masked_fill(unconditional.unsqueeze(1), 0.0)


# ---- transformer

def linear(layer, x):
    """layer(x) for a linear layer with bias."""
    if not torch.compiler.is_compiling() or x.device.type != "cpu":
        return layer(x)
    # A compiler adds the bias in whatever follows; on a CPU the product would want it copied into place beforehand.
    product = F.linear(x, layer.weight)
    return product + layer.bias.to(product.dtype)


def attention(q, k, v, products=True):
    """Softmax attention of (B, heads, L, d) tensors. products: by plain matrix products in bfloat16 on a CPU.

    The CPU's flash kernel is 2-4 times slower than these in bfloat16 (and faster in float32).
    """
    if not products or q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    scale = q.shape[-1] ** -0.5
    if not torch.compiler.is_compiling():
        return ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    # A compiler makes one kernel of what is between the products: powers of two are quicker than exp, and it is quicker to divide by
    # the sums after the second product, whose rows are shorter. Softmax does not depend on the maximum, so no gradient goes there.
    scores = (q * (scale / math.log(2))) @ k.transpose(-2, -1)
    weights = torch.exp2(scores - scores.detach().amax(dim=-1, keepdim=True))
    return ((weights @ v) / weights.sum(dim=-1, keepdim=True, dtype=torch.float32)).to(v.dtype)


class Attention(nn.Module):
    """Multi-head self-attention. products: see `attention`."""

    def __init__(self, width, num_heads, products=True):
        super().__init__()
        self.num_heads, self.products = num_heads, products
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens):
        batch_size, num_tokens, width = tokens.shape
        qkv = linear(self.qkv, tokens).view(batch_size, num_tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, d)
        mixed = attention(q, k, v, self.products).transpose(1, 2).reshape(batch_size, num_tokens, width)
        return linear(self.proj, mixed)


def gelu_tanh(x):
    """GELU in its tanh form: x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")  # one kernel
    # A compiler fuses either form into one kernel; exp is nearly three times faster in it than tanh, and products than powers.
    wide, slope = x.float(), math.sqrt(8 / math.pi)
    return (wide * torch.sigmoid(wide * (slope + slope * 0.044715 * (wide * wide)))).to(x.dtype)


class Mlp(nn.Module):
    """Two linear layers, four times wider in between, with the tanh form of GELU."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens):
        return linear(self.fc2, gelu_tanh(linear(self.fc1, tokens)))


def layer_norm(width):
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def adaln(cond_width, num_outputs):
    """The conditioning layer; its linear part carries the published name adaLN_modulation.1."""
    return nn.Sequential(nn.SiLU(), nn.Linear(cond_width, num_outputs))


def modulate(tokens, shift, scale):
    """tokens * (1 + scale) + shift, with one (1 or B, D) row for all tokens of a sample."""
    return torch.addcmul(shift.unsqueeze(1), tokens, 1 + scale.unsqueeze(1))


def add_gated(tokens, gate, update):
    """tokens + gate * update, with one (1 or B, D) row for all tokens of a sample."""
    return torch.addcmul(tokens, gate.unsqueeze(1), update)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning (adaLN-Zero). product_attention: see `attention`."""

    def __init__(self, width, num_heads, cond_width, product_attention=True):
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, num_heads, product_attention)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width)
        self.adaLN_modulation = adaln(cond_width, 6 * width)

    def forward(self, tokens, c=None, modulation=None):
        """tokens: (B, L, D). c: (B, D_cond), or (1, D_cond) when all samples share it. Returns (B, L, D).

        modulation: what adaLN_modulation makes of c, where it is there already.
        """
        modulation = self.adaLN_modulation(c) if modulation is None else modulation
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        tokens = add_gated(tokens, gate_attn, self.attn(modulate(self.norm1(tokens), shift_attn, scale_attn)))
        return add_gated(tokens, gate_mlp, self.mlp(modulate(self.norm2(tokens), shift_mlp, scale_mlp)))


class ModulatedLinear(nn.Module):
    """LayerNorm, shift and scale by the conditioning, linear: the way into the decoder and the way out of the network."""

    def __init__(self, width, cond_width, out_features):
        super().__init__()
        self.norm = layer_norm(width)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = adaln(cond_width, 2 * width)

    def forward(self, tokens, c=None, modulation=None):
        """See DiTBlock.forward."""
        modulation = self.adaLN_modulation(c) if modulation is None else modulation
        shift, scale = modulation.chunk(2, dim=1)
        return self.linear(modulate(self.norm(tokens), shift, scale))
