"""Exponential moving average of the weights."""

import contextlib
import copy

import torch

from utils import distributed


class EMA:
    """`ema.net` is a frozen copy of `net` whose weights follow it: w_ema <- decay * w_ema + (1 - decay) * w.

    Every tensor keeps its type. Buffers, and what has no fractions (integers), are copied. owners: see training/shard.py; a process
    follows its own weights and those that nobody owns, and `ema.net` has the rest of its weights only inside `whole`.
    """

    def __init__(self, net, decay, owners=None):
        self.decay, owners, rank = decay, owners or {}, distributed.rank()
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        pairs = list(zip(self.net.parameters(), net.parameters()))
        self.owners = {average: owners[source] for average, source in pairs if source in owners}
        self.elsewhere = [pair for pair in pairs if owners.get(pair[1], rank) != rank]
        here = [pair for pair in pairs if owners.get(pair[1], rank) == rank]
        self.averages = [average for average, source in here if source.is_floating_point()]
        self.sources = [source for _, source in here if source.is_floating_point()]
        self.copied = [pair for pair in here if not pair[1].is_floating_point()] + list(zip(self.net.buffers(), net.buffers()))
        self._free()

    @torch.no_grad()
    def update(self):
        """Follow the source weights by one step."""
        torch._foreach_lerp_(self.averages, self.sources, 1.0 - self.decay)
        for average, original in self.copied:
            average.copy_(original)

    @contextlib.contextmanager
    def whole(self):
        """`ema.net` with all its weights, those that other processes own among them. Collective."""
        for average, source in self.elsewhere:
            average.data = torch.empty_like(source)
        distributed.share(self.owners)
        yield self.net
        self._free()

    def _free(self):
        for average, _ in self.elsewhere:
            average.data = average.new_empty(0)
