"""Seeds to images: an image depends on its seed alone."""

import dataclasses

import numpy as np
import pytest
import torch

from utils.config import ModelConfig, SampleConfig
from sampling.sample import (SeedStreams, batches_of, build_model, draw_inputs, generate, latents_to_uint8,
                             sample_latents)

CPU = torch.device("cpu")
TINY = ModelConfig(model_type="DiT-S/2", in_size=8, num_classes=5, depth=2, width=32, num_heads=2,
                   decoder_depth=1, decoder_width=16, decoder_num_heads=2)
FAST = SampleConfig(num_steps=4, cfg_scale=1.5, batchsize=4)


@pytest.fixture(scope="module")
def net():
    """A network whose output really depends on its input (fresh ones start as the identity)."""
    net = build_model(TINY).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        if "pos_embed" not in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


def test_streams_draw_noise_then_class_then_churn():
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(4, 8, 8, generator=generator)
    label = torch.randint(5, (), generator=generator)
    churn = torch.randn(4, 8, 8, generator=generator, dtype=torch.float64)
    streams = SeedStreams([3, 7])
    assert torch.equal(streams.randn((4, 8, 8))[1], noise)
    assert streams.randint(5)[1] == label
    assert torch.equal(streams.randn_like(torch.zeros(2, 4, 8, 8, dtype=torch.float64))[1], churn)


def test_seeds_wrap_at_2_to_the_32():
    assert torch.equal(SeedStreams([5]).randn((3,)), SeedStreams([2**32 + 5]).randn((3,)))


@pytest.mark.parametrize("options", [{}, {"S_churn": 5.0}, {"sampler": "ablation", "solver": "euler", "discretization": "vp"}])
def test_image_depends_on_its_seed_alone(net, options):
    """Batch size and company change only the order of float32 sums: 3e-5 here, on latents of standard deviation 2.5."""
    config = dataclasses.replace(FAST, **options)
    alone, label = sample_latents(net, [11], config, CPU)
    together, labels = sample_latents(net, [4, 2**31, 11, 0, 8], config, CPU)
    assert labels[2] == label[0]
    assert torch.allclose(together[2], alone[0], atol=2e-4, rtol=0)
    assert not torch.allclose(together[1], alone[0], atol=0.1)


def test_the_class_asked_for_belongs_to_the_seed(net):
    assert draw_inputs([3, 4, 5], net, CPU, class_idx=[1, 2])[2].tolist() == [2, 1, 2]
    assert draw_inputs([5], net, CPU, class_idx=[1, 2])[2].tolist() == [2]


def test_unconditional_nets_draw_no_class():
    net = build_model(dataclasses.replace(TINY, num_classes=0)).eval()
    assert draw_inputs([1], net, CPU)[2] is None
    latents, labels = sample_latents(net, [1], dataclasses.replace(FAST, cfg_scale=1.0), CPU)
    assert labels is None and latents.shape == (1, 4, 8, 8)


def test_generate_yields_fixed_batches_in_order(net):
    batches = list(generate(net, latents_to_uint8, list(range(10)), FAST, CPU))
    assert [batch.index for batch in batches] == [0, 1, 2]
    assert [batch.seeds for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[0].images.shape == (4, 8, 8, 3) and batches[0].images.dtype == np.uint8


def test_batches_are_dealt_to_ranks_in_turn(monkeypatch):
    monkeypatch.setattr("utils.distributed.world_size", lambda: 2)
    monkeypatch.setattr("utils.distributed.rank", lambda: 1)
    assert batches_of([10, 11, 12, 13, 14], 2) == [(1, [12, 13])]


def test_guidance_changes_the_image(net):
    guided_latents, _ = sample_latents(net, [1], FAST, CPU)
    plain, _ = sample_latents(net, [1], dataclasses.replace(FAST, cfg_scale=1.0), CPU)
    assert not torch.allclose(guided_latents, plain, atol=1e-3)
