"""Exponential moving average of the weights."""

import copy

import torch


class EMA:
    """`ema.net` is a frozen copy of `net` whose weights follow it: w_ema <- decay * w_ema + (1 - decay) * w.

    Every tensor keeps its type. Buffers, and what has no fractions (integers), are copied.
    """

    def __init__(self, net, decay):
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.averages, self.sources, self.copies, self.originals = [], [], [], []
        for average, source in zip(self.net.parameters(), net.parameters()):
            averaged = source.is_floating_point()
            (self.averages if averaged else self.copies).append(average)
            (self.sources if averaged else self.originals).append(source)
        self.copies += self.net.buffers()
        self.originals += net.buffers()

    @torch.no_grad()
    def update(self):
        """Follow the source weights by one step."""
        torch._foreach_lerp_(self.averages, self.sources, 1.0 - self.decay)
        for copied, original in zip(self.copies, self.originals):
            copied.copy_(original)
