"""Launches are counted as a GPU would see them: by hand on a small layer, and on the real step."""

import importlib.util

import pytest
import torch

from benchmarks import estimate
from benchmarks.launches import Counter, count, pretend_gpu, table_row
from utils.config import load_config

TINY = ["model.model_type=DiT-S/2", "model.in_size=8", "model.num_classes=10", "model.width=32", "model.num_heads=2",
        "model.decoder_width=32", "model.decoder_num_heads=2", "train.batchsize=4", "train.amp=bf16"]


def launches(depth, compiled=False, *overrides):
    """All launches of a step with `depth` encoder blocks and one decoder block."""
    config = load_config(overrides=[*TINY, f"model.depth={depth}", "model.decoder_depth=1", *overrides])
    return table_row("", count(config, compiled))["launches"]


def test_launches_of_a_layer_are_those_counted_by_hand(monkeypatch):
    monkeypatch.setattr("benchmarks.launches.MOST_BLOCKS", 2240)
    counter = Counter()
    with pretend_gpu(counter):
        weight, bias, x = (torch.empty(*shape, device="cuda", requires_grad=True) for shape in ((70000, 2100), (70000,), (5, 2100)))
        optimizer = torch.optim.AdamW([weight, bias, x], fused=True)
        for _ in range(2):  # the first step makes the moments
            counter.launches.clear()
            torch.nn.functional.linear(x, weight, bias).view(-1)[3:].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    # sum and its slice\'s gradient; products, one forward, two backward; the gradient of bias; the count of steps; AdamW on 2,246 blocks
    assert +counter.launches == {"addmm": 1, "sum": 2, "ones_like": 1, "slice_backward": 1, "mm": 2, "_foreach_add_": 1, "_fused_adamw_": 2}


def test_a_block_launches_what_the_estimate_says():
    one, two, recomputed = launches(1), launches(2), launches(2, False, "train.activation_checkpointing=true")
    block, rest = estimate.LAUNCHES["bf16"][False]
    assert two - one == block and one - 2 * block == pytest.approx(rest, rel=0.02)
    assert recomputed - two == pytest.approx(3 * block / 3, rel=0.03)  # each of three blocks launches a third more


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="inductor writes kernels for GPUs only where Triton is installed")
def test_compiled_blocks_launch_about_half_as_much():
    """One graph for both blocks. At this size fewer sums than at XL's need two launches."""
    (eager, _), (compiled, _) = estimate.LAUNCHES["bf16"]
    saved = launches(1, False, "train.mask_ratio=0") - launches(1, True, "train.mask_ratio=0")
    assert 2 * (eager - compiled) <= saved < 2 * (eager - compiled) + 30
