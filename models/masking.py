"""Which patches the encoder sees: random masks over the tokens of a batch."""

from dataclasses import dataclass
from functools import cached_property

import torch

from utils.cli import UserError


@dataclass(frozen=True, eq=False)
class TokenMask:
    """One permutation of the tokens per sample; the first `num_keep` of them are kept.

    ids_shuffle: (B, L) int64, token indices, the kept ones first. num_keep: the same for all samples.
    Raises ValueError if the shape or the count is impossible.
    """

    ids_shuffle: torch.Tensor
    num_keep: int

    def __post_init__(self):
        if self.ids_shuffle.ndim != 2:
            raise UserError(f"ids_shuffle has shape {tuple(self.ids_shuffle.shape)}; want (batch, tokens)")
        if not 1 <= self.num_keep <= self.num_tokens:
            raise UserError(f"num_keep={self.num_keep} must be from 1 to the number of tokens, {self.num_tokens}")

    @property
    def num_tokens(self):
        return self.ids_shuffle.shape[1]

    @property
    def ids_keep(self):
        """(B, num_keep): the kept tokens, in the order in which the encoder sees them."""
        return self.ids_shuffle[:, : self.num_keep]

    @cached_property
    def ids_restore(self):
        """(B, L): the inverse permutation, so that shuffled[ids_restore] is in image order."""
        places = torch.arange(self.num_tokens, device=self.ids_shuffle.device).expand_as(self.ids_shuffle)
        return torch.empty_like(self.ids_shuffle).scatter_(1, self.ids_shuffle, places)

    @cached_property
    def mask(self):
        """(B, L) float32 in image order: 0 = kept, 1 = removed."""
        removed = torch.ones(self.ids_shuffle.shape, device=self.ids_shuffle.device)
        return removed.scatter_(1, self.ids_keep, 0.0)


def count_kept(num_tokens, mask_ratio, multiple=1):
    """Tokens left by a mask ratio in [0, 1): int(L * (1 - ratio)) as published, but at least one.

    multiple: a divisor of num_tokens; the count is rounded to the nearest multiple of it above 0, so that few counts occur.
    Raises ValueError for a ratio out of range, or a multiple that does not divide.
    """
    if not 0 <= mask_ratio < 1:
        raise UserError(f"mask_ratio={mask_ratio} must be at least 0 and below 1")
    if num_tokens % multiple:
        raise UserError(f"token_multiple={multiple} must divide the number of tokens, {num_tokens}")
    kept = int(num_tokens * (1 - mask_ratio))
    return max(1, (kept + multiple // 2) // multiple) * multiple


def random_mask(batch_size, num_tokens, mask_ratio=0.0, generator=None, device=None, num_keep=None):
    """Draw a TokenMask: the kept tokens are chosen uniformly, independently for every sample.

    One draw of (B, L) uniform numbers from `generator`, on `device` (that of the generator by default).
    num_keep, when given, takes the place of mask_ratio.
    """
    if device is None:
        device = generator.device if generator is not None else "cpu"
    if num_keep is None:
        num_keep = count_kept(num_tokens, mask_ratio)
    order = torch.rand(batch_size, num_tokens, generator=generator, device=device)
    return TokenMask(order.argsort(dim=1), num_keep)


def gather_tokens(tokens, ids):
    """Pick tokens (B, L, D) by index (B, K): returns (B, K, D)."""
    return torch.gather(tokens, 1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def unmask(tokens, mask_token, num_tokens):
    """Append the mask token (1, 1, D) to kept tokens (B, K, D) until there are L: (B, L, D), in shuffled order.

    It is appended also when none is missing, so that it always has a gradient (of zeros then).
    """
    batch_size, num_keep, _ = tokens.shape
    return torch.cat([tokens, mask_token.expand(batch_size, num_tokens - num_keep, -1)], dim=1)
