"""Exponential moving average of the weights."""

import copy

import torch

ALIGNMENT = 64  # numbers: every tensor begins where kernels like it best


class EMA:
    """`ema.net` is a frozen copy of `net` whose weights follow it: w_ema <- decay * w_ema + (1 - decay) * w.

    foreach: update all weights in one operation, for which those of both networks are moved together in memory (so make this
    before anything else gets hold of them); else, and should anybody move them again, one tensor after the other.
    """

    def __init__(self, net, decay, foreach=True):
        self.decay = decay
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.averages, self.sources = list(self.net.parameters()), list(net.parameters())
        self.stretches = (_move_together(self.averages), _move_together(self.sources)) if foreach else None
        self.places = self._places()

    def _places(self):
        return [parameter.data_ptr() for parameter in (*self.averages, *self.sources)]

    @torch.no_grad()
    def update(self):
        """Follow the source weights by one step."""
        if self.stretches is not None and self._places() == self.places:
            average, source = self.stretches
            average.lerp_(source, 1.0 - self.decay)
            return
        for average, source in zip(self.averages, self.sources):
            average.lerp_(source, 1.0 - self.decay)


def _move_together(parameters):
    """Give parameters of one type one stretch of memory, in their order, and return it: a CPU follows it faster than pieces from all over."""
    sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
    stretch = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, part in zip(parameters, stretch.split(sizes)):
        parameter.data = part[:parameter.numel()].view_as(parameter).copy_(parameter.detach())
    return stretch
