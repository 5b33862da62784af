"""Outputs of the published model, stored in data/golden.npz, with weights made by a rule from their names.

Denoised latents agree within 2e-5 and sampled ones within 1e-4 (values up to 4, float32, other summation orders).
"""

import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

import models

GOLDEN = dict(np.load(Path(__file__).parent / "data" / "golden.npz"))


def golden(key):
    return torch.from_numpy(GOLDEN[key])


@lru_cache(maxsize=1)
def golden_net(model_type):
    """The network of the golden outputs: every tensor but the position tables from a generator seeded by its name."""
    net = models.build_model(model_type, in_size=32, in_channels=4, num_classes=1000)
    weights = {name: tensor if "pos_embed" in name else
               0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
               for name, tensor in net.state_dict().items()}
    net.load_state_dict(weights)
    return net.eval()


def keys(prefix):
    return sorted(key for key in GOLDEN if key.startswith(prefix))


@pytest.fixture
def inputs():
    return golden("x"), golden("sigma"), torch.tensor([388, 7])


def assert_close(actual, key, atol):
    torch.testing.assert_close(actual.float(), golden(key), rtol=0, atol=atol)


@pytest.mark.parametrize("key", keys("eval|") + keys("uncond|"))
@torch.no_grad()
def test_denoised_equals_published(key, inputs):
    x, sigma, class_labels = inputs
    kind, model_type = key.split("|")
    net = golden_net(model_type)
    assert_close(net(x, sigma, class_labels if kind == "eval" else None), key, 2e-5)


@torch.no_grad()
def test_label_num_classes_equals_published_unconditional(inputs):
    x, sigma, _ = inputs
    net = golden_net("DiT-S/8")
    assert_close(net(x, sigma, torch.full((2,), 1000)), "uncond|DiT-S/8", 2e-5)


@pytest.mark.parametrize("key", keys("train"))
@torch.no_grad()
def test_masked_denoised_equals_published(key, inputs):
    ratio, model_type = key.removeprefix("train").split("|")
    ids_shuffle = golden(f"ids_restore{ratio}|{model_type}").argsort(dim=1)
    mask = models.TokenMask(ids_shuffle, golden(f"ids_keep{ratio}|{model_type}").shape[1])
    assert torch.equal(mask.ids_keep, golden(f"ids_keep{ratio}|{model_type}"))
    assert torch.equal(mask.ids_restore, golden(f"ids_restore{ratio}|{model_type}"))
    assert torch.equal(mask.mask, golden(f"mask{ratio}|{model_type}"))
    assert_close(golden_net(model_type)(*inputs, mask), key, 2e-5)


@pytest.mark.parametrize("key", keys("cfg"))
@torch.no_grad()
def test_guided_equals_published(key, inputs):
    x, _, class_labels = inputs
    cfg_scale, model_type = key.removeprefix("cfg").split("|")
    assert_close(models.guided(golden_net(model_type), float(cfg_scale))(x, 1.7, class_labels), key, 2e-5)


def test_noise_and_class_per_seed_equal_published():
    for seed, noise, label in zip(GOLDEN["seeds"], golden("lat"), GOLDEN["lab"]):
        generator = torch.Generator().manual_seed(int(seed))
        assert torch.equal(torch.randn(4, 32, 32, generator=generator), noise)
        assert torch.randint(1000, (1,), generator=generator).item() == label


@pytest.mark.parametrize("key, cfg_scale", [("edm18", 1.0), ("edm18cfg1.5", 1.5)])
def test_edm_sampler_equals_published(key, cfg_scale):
    model = models.guided(golden_net("DiT-S/8"), cfg_scale)
    assert_close(models.edm_sampler(model, golden("lat"), golden("lab"), num_steps=18), key, 1e-4)


@pytest.mark.parametrize("key", keys("abl|"))
def test_ablation_sampler_equals_published(key):
    _, solver, discretization, schedule, scaling = key.split("|")
    latents = models.ablation_sampler(golden_net("DiT-S/8"), golden("lat"), golden("lab"), num_steps=8, solver=solver,
                                      discretization=discretization, schedule=schedule, scaling=scaling)
    assert_close(latents, key, 1e-4)
