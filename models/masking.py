"""Which patches the encoder sees: random masks over the tokens of a batch."""

import torch


class TokenMask:
    """One permutation of the tokens per sample; the first `num_keep` of them are kept.

    ids_shuffle: (B, L) int64, token indices, the kept ones first. num_keep: the same for all samples.
    ids_keep: (B, num_keep), the kept tokens in the order in which the encoder sees them.
    ids_restore: (B, L), the inverse permutation: shuffled[ids_restore] is in image order.
    mask: (B, L) float32 in image order, 0 = kept, 1 = removed.
    """

    def __init__(self, ids_shuffle, num_keep):
        if ids_shuffle.ndim != 2:
            raise ValueError(f"ids_shuffle has shape {tuple(ids_shuffle.shape)}; want (batch, tokens)")
        num_tokens = ids_shuffle.shape[1]
        if not 1 <= num_keep <= num_tokens:
            raise ValueError(f"num_keep={num_keep} must be from 1 to the number of tokens, {num_tokens}")
        self.ids_shuffle, self.num_keep = ids_shuffle, num_keep
        self.ids_keep = ids_shuffle[:, :num_keep]
        self.ids_restore = ids_shuffle.argsort(dim=1)  # not by scatter_: deterministic, it made the host wait on torch 2.7
        self.mask = (self.ids_restore >= num_keep).float()


def count_kept(num_tokens, mask_ratio):
    """Number of tokens that a mask ratio in [0, 1) keeps: int(L * (1 - ratio)) as published, but at least one."""
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio} must be at least 0 and below 1")
    return max(1, int(num_tokens * (1 - mask_ratio)))


def random_mask(batch_size, num_tokens, mask_ratio, generator=None, device=None):
    """Draw a TokenMask: the kept tokens are chosen uniformly, for every sample by itself.

    Makes one draw of (B, L) uniform numbers from `generator`, which has to be on `device`.
    """
    order = torch.rand(batch_size, num_tokens, generator=generator, device=device)
    return TokenMask(order.argsort(dim=1), count_kept(num_tokens, mask_ratio))


def gather_tokens(tokens, ids):
    """Pick tokens (B, L, D) by index (B, K): returns (B, K, D)."""
    return torch.gather(tokens, 1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class Unshuffle(torch.autograd.Function):
    """Shuffled tokens (B, L, D) back in image order: Unshuffle.apply(tokens, mask.ids_restore, mask.ids_shuffle).

    gather's own backward pass adds into zeros, for which a deterministic torch 2.7 makes the host wait. A permutation needs no sums:
    its gradient is permuted back.
    """

    @staticmethod
    def forward(ctx, tokens, ids_restore, ids_shuffle):
        ctx.save_for_backward(ids_shuffle)
        return gather_tokens(tokens, ids_restore)

    @staticmethod
    def backward(ctx, gradient):
        return gather_tokens(gradient, ctx.saved_tensors[0]), None, None
