"""The moving average of the weights."""

import pytest
import torch

from training.ema import EMA


@pytest.mark.parametrize("foreach", [True, False])
def test_average_after_three_updates_by_hand(foreach):
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    ema = EMA(net, decay=0.75, foreach=foreach)
    for weight in (2.0, 4.0, 0.0):
        net.weight.data.fill_(weight)
        ema.update()
    # 1 -> 0.75 + 0.5 = 1.25 -> 0.9375 + 1 = 1.9375 -> 1.453125: all exact in binary
    assert ema.net.weight.item() == 1.453125


@pytest.mark.parametrize("move", [lambda net, ema: None,
                                  lambda net, ema: setattr(net[1].weight, "data", net[1].weight.data.clone()),
                                  lambda net, ema: setattr(ema.net[0].bias, "data", ema.net[0].bias.data.clone())])
def test_average_follows_weights_that_were_moved(move):
    """Tensors of sizes that leave gaps between them; a moved one must not be followed where it no longer is."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 70))
    ema, slow = EMA(net, 0.75), EMA(net, 0.75, foreach=False)
    move(net, ema)
    for _ in range(3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        slow.update()
    for one, other in zip(ema.net.parameters(), slow.net.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # another kernel for the last few numbers


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


def test_averages_lie_together_in_memory_and_are_ordinary_parameters_otherwise():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))
    ema = EMA(net, 0.5)
    for weights in (ema.net, net):
        assert len({p.untyped_storage().data_ptr() for p in weights.parameters()}) == 1
        assert all(p.data_ptr() % 64 == 0 for p in weights.parameters())
    assert {name: p.shape for name, p in ema.net.named_parameters()} == {name: p.shape for name, p in net.named_parameters()}
    assert all(p.is_contiguous() and isinstance(p, torch.nn.Parameter) for p in ema.net.parameters())
    net[0].weight.data.zero_()
    other = net[1].weight.detach().clone()
    ema.net.load_state_dict(net.state_dict())
    assert torch.equal(ema.net[0].weight, torch.zeros(4, 3)) and torch.equal(ema.net[1].weight, other)
