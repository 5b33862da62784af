"""Exponential moving average of the weights."""

import copy

import torch


class EMA:
    """`ema.net` is a frozen copy of `net` whose weights follow it: w_ema <- decay * w_ema + (1 - decay) * w.

    foreach: update all tensors in one operation, which wants them together; else one after the other.
    """

    def __init__(self, net, decay, foreach=True):
        self.decay, self.foreach = decay, foreach
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.averages = list(self.net.parameters())
        if foreach:
            _move_together(self.averages)
        self.sources = list(net.parameters())

    @torch.no_grad()
    def update(self):
        """Follow the source weights by one step."""
        if self.foreach:
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.sources], 1.0 - self.decay)
            return
        for average, source in zip(self.averages, self.sources):
            average.lerp_(source, 1.0 - self.decay)


def _move_together(parameters):
    """Give parameters of one type one stretch of memory, in their order: a CPU follows it faster than pieces from all over."""
    stretch = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, part in zip(parameters, stretch.split([p.numel() for p in parameters])):
        parameter.data = part.view_as(parameter)
