"""The moving average of the weights."""

import torch

from training.ema import EMA


def test_average_after_three_updates_by_hand():
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    ema = EMA(net, decay=0.75)
    for weight in (2.0, 4.0, 0.0):
        net.weight.data.fill_(weight)
        ema.update()
    # 1 -> 0.75 + 0.5 = 1.25 -> 0.9375 + 1 = 1.9375 -> 1.453125: all exact in binary
    assert ema.net.weight.item() == 1.453125


class Mixed(torch.nn.Module):
    """Parameters and buffers of several types, whole numbers among them."""

    def __init__(self):
        super().__init__()
        self.w32 = torch.nn.Parameter(torch.ones(3, 5))
        self.w64 = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.w16 = torch.nn.Parameter(torch.ones(7, dtype=torch.bfloat16))
        self.table = torch.nn.Parameter(torch.arange(4), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def test_every_type_is_averaged_in_its_own_and_buffers_are_copied():
    net = Mixed()
    ema = EMA(net, decay=0.75)
    with torch.no_grad():
        for weight in (net.w32, net.w64, net.w16):
            weight.fill_(2.0)
        net.table += 1
        net.count += 3
        net.mean.fill_(0.5)
        net.scratch.fill_(9.0)
    ema.update()
    for name in ("w32", "w64", "w16"):
        average, weight = getattr(ema.net, name), getattr(net, name)
        assert average.dtype == weight.dtype and (average == 1.25).all(), name
    for name in ("table", "count", "mean", "scratch"):
        copied, original = getattr(ema.net, name), getattr(net, name)
        assert copied.dtype == original.dtype and torch.equal(copied, original) and copied.data_ptr() != original.data_ptr(), name


def test_counts_of_a_normalisation_layer_are_kept():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    ema = EMA(net, 0.9)
    for _ in range(2):
        net(torch.randn(8, 3))
        ema.update()
    assert ema.net[1].num_batches_tracked == 2 and torch.equal(ema.net[1].running_mean, net[1].running_mean)


def test_average_follows_weights_that_were_moved():
    """net.to(), or loading weights into a compiled block, gives a parameter other memory."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 5)
    ema = EMA(net, 0.75)
    wanted = net.weight.detach().clone()
    net.weight.data = net.weight.data.clone()
    ema.net.weight.data = ema.net.weight.data.clone()
    for _ in range(3):
        with torch.no_grad():
            net.weight.add_(torch.randn_like(net.weight))
        ema.update()
        wanted = 0.75 * wanted + 0.25 * net.weight.detach()
    torch.testing.assert_close(ema.net.weight.detach(), wanted, rtol=1e-6, atol=1e-7)


def test_average_starts_as_a_copy_and_is_its_own():
    net = torch.nn.Linear(3, 2)
    ema = EMA(net, 0.9)
    for one, other in zip(net.parameters(), ema.net.parameters()):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
    assert not any(p.requires_grad for p in ema.net.parameters()) and not ema.net.training and net.training


def test_frozen_parameters_stay_bit_for_bit():
    net = torch.nn.Linear(64, 64).requires_grad_(False)
    ema = EMA(net, 0.9999)
    for _ in range(50):
        ema.update()
    assert torch.equal(ema.net.weight, net.weight)  # w + 0.0001 (w - w): no rounding creeps in
