"""Seeds to images: an image depends on its seed alone; samplers and their options are checked before any work."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import models
from models import SAMPLERS, ablation_sampler, edm_sampler
from sampling import sample
from sampling.sample import (SeedStreams, batches_of, build_sampler, check_sampler, classes_of, describe_bad, draw_grid, draw_inputs,
                             generate, image_decoder, latents_to_uint8, sample_latents, save_by_class)
from utils.cli import UserError
from utils.schema import Config, LogConfig, SampleConfig, VAEConfig

CPU = torch.device("cpu")
TINY = dict(model_type="DiT-S/2", in_size=8, in_channels=4, depth=2, width=32, num_heads=2, decoder_depth=1, decoder_width=16,
            decoder_num_heads=2)
FAST = SampleConfig(num_steps=4, cfg_scale=1.5, batchsize=4)


def tiny_net(num_classes=5):
    """A network whose output really depends on its input (fresh ones start as the identity)."""
    net = models.build_model(**TINY, num_classes=num_classes).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        if "pos_embed" not in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


@pytest.fixture(scope="module")
def net():
    return tiny_net()


# ------------------------------------------------------------------------------------------------ seeds

def test_streams_draw_noise_then_class_then_churn():
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(4, 8, 8, generator=generator)
    label = torch.randint(5, (), generator=generator)
    churn = torch.randn(4, 8, 8, generator=generator, dtype=torch.float64)
    streams = SeedStreams([3, 7])
    assert torch.equal(streams.randn_like(torch.zeros(2, 4, 8, 8))[1], noise)
    assert streams.randint(5)[1] == label
    assert torch.equal(streams.randn_like(torch.zeros(2, 4, 8, 8, dtype=torch.float64))[1], churn)


def test_seeds_wrap_at_2_to_the_32():
    x = torch.zeros(1, 3)
    assert torch.equal(SeedStreams([5]).randn_like(x), SeedStreams([2**32 + 5]).randn_like(x))
    assert not torch.equal(SeedStreams([5]).randn_like(x), SeedStreams([2**31 + 5]).randn_like(x))


def test_latents_are_those_of_the_noise_and_class_that_the_seed_draws(net):
    """By hand: the generator's noise and class go through the sampler, guidance in one batch of conditional and unconditional rows."""
    generator = torch.Generator().manual_seed(3)
    noise, label = torch.randn(1, 4, 8, 8, generator=generator), torch.randint(5, (1,), generator=generator)

    def guided(x, sigma, labels):
        plain, none = net(x, sigma, labels), net(x, sigma, torch.full_like(labels, 5))
        return none + 1.5 * (plain - none)

    with torch.no_grad():
        wanted = edm_sampler(guided, noise, label, num_steps=4)
    latents, labels = sample_latents(net, [3], FAST, CPU)
    assert labels.tolist() == label.tolist() and latents.dtype == torch.float32
    torch.testing.assert_close(latents, wanted.float(), rtol=0, atol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("options", [{}, {"S_churn": 5.0}, {"solver": "euler", "discretization": "vp"}])
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


def test_classes_of_seeds_are_those_that_sampling_gives_them(net):
    seeds = [9, 0, 4, 11]
    assert classes_of(seeds, net) == sample_latents(net, seeds, FAST, CPU)[1].tolist() and len(set(classes_of(seeds, net))) > 1
    assert classes_of(seeds, net, [3, 1]) == [1, 3, 3, 1]
    assert classes_of(seeds, tiny_net(num_classes=0)) is None


def test_without_classes_none_is_drawn_and_guidance_is_off_by_itself():
    net = tiny_net(num_classes=0)
    assert draw_inputs([1], net, CPU)[2] is None
    latents, labels = sample_latents(net, [1], FAST, CPU)  # cfg_scale 1.5
    assert labels is None and latents.shape == (1, 4, 8, 8)
    assert torch.equal(latents, sample_latents(net, [1], dataclasses.replace(FAST, cfg_scale=1.0), CPU)[0])


def test_guidance_and_its_interval_change_the_image(net):
    found = [sample_latents(net, [1], dataclasses.replace(FAST, **options), CPU)[0]
             for options in ({}, {"cfg_scale": 1.0}, {"cfg_interval": (0.1, 5.0)})]
    for i, one in enumerate(found):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in found[i + 1:])


def test_network_and_decoder_compute_as_the_config_says(net, monkeypatch, tiny_vae):
    """TF32 is for the network, in grids and evaluations too: all of them sample here. The decoder stays float32 unless vae.amp says else."""
    asked, arithmetic = [], sample.arithmetic
    monkeypatch.setattr(sample, "arithmetic", lambda device, *options: (asked.append(options), arithmetic(device, *options))[1])
    decode = image_decoder(VAEConfig(path=str(tiny_vae), amp="bf16"), 4, CPU)
    list(generate(net, decode, [0], dataclasses.replace(FAST, tf32=True), CPU))
    assert asked == [("no", True), ("bf16",)]


def test_generate_yields_fixed_batches_in_order(net):
    batches = list(generate(net, latents_to_uint8, list(range(10)), FAST, CPU))
    assert [batch.index for batch in batches] == [0, 1, 2]
    assert [batch.seeds for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[0].images.shape == (4, 8, 8, 3) and batches[0].images.dtype == np.uint8 and batches[0].bad_seeds == []
    assert torch.equal(batches[2].latents, sample_latents(net, [8, 9], FAST, CPU)[0])


def test_batches_are_dealt_to_ranks_in_turn(monkeypatch):
    monkeypatch.setattr("utils.distributed.world_size", lambda: 2)
    for rank, wanted in ((0, [(0, [10, 11]), (2, [14])]), (1, [(1, [12, 13])])):
        monkeypatch.setattr("utils.distributed.rank", lambda: rank)
        assert batches_of([10, 11, 12, 13, 14], 2) == wanted


# ------------------------------------------------------------------------------------------------ samplers and their options

def test_null_takes_the_ablation_sampler_if_one_of_its_choices_is_set_else_edm():
    noise = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))

    def model(x, sigma, labels):
        return x / (1 + sigma**2)

    def sampled(**options):
        return build_sampler(SampleConfig(num_steps=5, **options))(model, noise)

    assert torch.equal(sampled(), edm_sampler(model, noise, num_steps=5))
    euler = ablation_sampler(model, noise, num_steps=5, solver="euler")
    assert torch.equal(sampled(solver="euler"), euler) and not torch.equal(sampled(), euler)
    assert torch.equal(sampled(discretization="ve"), ablation_sampler(model, noise, num_steps=5, discretization="ve"))
    assert torch.equal(sampled(sigma_max=20.0, rho=3.0), edm_sampler(model, noise, num_steps=5, sigma_max=20.0, rho=3.0))


@pytest.mark.parametrize("options, message", [
    ({"sampler": "dpm"}, "sample.sampler='dpm' is unknown; wanted one of edm, ablation"),
    ({"sampler": "edm", "solver": "euler"}, r"sample.solver=euler is not an option of the sampler edm, but of ablation \(sample.sampler=ablation\)"),
    ({"options": {"order": 3}}, "sample.options.order=3 is not an option of the sampler edm, nor of any other"),
    ({"solver": "rk4"}, "solver='rk4'"),
    ({"sigma_min": 90.0}, "sigma_min=90.0"),
    ({"rho": 1e-200}, "out of range"),
    ({"discretization": "iddpm", "sigma_min": 0.002, "sigma_max": 0.0021}, "no iddpm noise level"),
])
def test_what_cannot_be_sampled_with_is_refused_before_any_work(options, message):
    with pytest.raises(UserError, match=message):
        check_sampler(SampleConfig(**options))


def test_a_good_config_passes_and_draws_no_global_random_numbers():
    before = torch.get_rng_state()
    for options in ({}, {"S_churn": 40.0}, {"solver": "euler", "discretization": "vp", "schedule": "vp", "scaling": "vp"}):
        check_sampler(SampleConfig(**options))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sampler_of_ones_own_gets_its_options_and_no_others(monkeypatch):
    def toy(model, noise, class_labels=None, *, num_steps=40, gain=1.0, randn_like=None, progress=None):
        return noise * gain * num_steps

    monkeypatch.setitem(SAMPLERS, "toy", toy)
    noise = torch.ones(1, 1, 2, 2)
    assert build_sampler(SampleConfig(sampler="toy", num_steps=3, options={"gain": 2.0}))(None, noise).eq(6).all()
    check_sampler(SampleConfig(sampler="toy"))
    with pytest.raises(UserError, match="sample.options={'gain': None}: unsupported operand"):
        check_sampler(SampleConfig(sampler="toy", options={"gain": None}))
    with pytest.raises(UserError, match="sample.S_churn=3.0 is not an option of the sampler toy, but of edm and ablation"):
        check_sampler(SampleConfig(sampler="toy", S_churn=3.0))


def test_a_bug_in_a_sampler_is_no_user_error(monkeypatch):
    def broken(model, noise, class_labels=None, *, num_steps=40, randn_like=None, progress=None):
        return noise + None

    monkeypatch.setitem(SAMPLERS, "broken", broken)
    with pytest.raises(TypeError):
        check_sampler(SampleConfig(sampler="broken"))


# ------------------------------------------------------------------------------------------------ NaN, decoding, grids

def poisoned(monkeypatch, seed):
    """From now on the noise of this seed is NaN."""
    def randn_like(streams, x, original=SeedStreams.randn_like):
        noise = original(streams, x)
        own = torch.Generator().manual_seed(seed)
        bad = (noise == torch.randn(x.shape[1:], generator=own)).flatten(1).all(dim=1)
        return torch.where(bad.view(-1, 1, 1, 1), torch.nan, noise)

    monkeypatch.setattr(SeedStreams, "randn_like", randn_like)


def test_images_with_nan_are_told_by_seed(net, monkeypatch):
    poisoned(monkeypatch, 6)
    for decode in (latents_to_uint8, None):
        batches = list(generate(net, decode, list(range(10)), FAST, CPU))
        assert [batch.bad_seeds for batch in batches] == [[], [6], []]
    assert describe_bad([7, 3], 16) == "2 of 16 images have NaN or Inf: seeds 3, 7"
    assert describe_bad(range(30), 40).endswith("18, 19 and 10 more")


class HalfBroken:
    """An autoencoder of f = 1 whose second image overflows."""

    latent_channels, scale, shift, digest = 4, 0.5, 0.0, "d" * 16

    def decode(self, latents):
        images = latents[:, :3].clone()
        images[1, 0, 0, 0] = torch.inf
        return images


def test_images_that_overflow_in_the_decoder_are_found(monkeypatch):
    autoencoder = HalfBroken()
    monkeypatch.setattr(sample, "load_autoencoder", lambda path, device: autoencoder)
    decode = image_decoder(VAEConfig(batchsize=7), 4, CPU)
    assert autoencoder.decode_batch == 7
    latents = torch.zeros(4, 4, 2, 2)
    latents[3, 3, 0, 0] = torch.nan  # a channel that the images do not show
    images, finite = decode(latents)
    assert images.shape == (4, 2, 2, 3) and images.dtype == np.uint8 and finite.tolist() == [True, False, True, False]
    assert decode.digest == "d" * 16
    with pytest.raises(UserError, match="decodes 4 latent channels, the model makes 8"):
        image_decoder(VAEConfig(), 8, CPU)
    with pytest.raises(UserError, match="checkpoint x.pt has latents of the autoencoder eeee"):
        image_decoder(VAEConfig(), 4, CPU, {"vae": "eeee"}, "checkpoint x.pt")


def config_of(**log):
    return Config(sample=FAST, log=LogConfig(**log))


def test_grid_shows_classes_in_rows_and_says_which_seeds_are_bad(net, monkeypatch, tmp_path, capsys):
    asked = []

    def record(latents):
        asked.append(len(latents))
        return latents_to_uint8(latents)

    picture = draw_grid(net, record, config_of(num_grid_images=11), CPU, tmp_path / "grid.png", ["å", "b", "c", "d", "e"])
    assert asked == [4, 4, 2]  # 5 classes, 2 images each
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), picture)
    images, _ = latents_to_uint8(sample_latents(net, [4, 5, 6, 7], FAST, CPU, class_idx=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4])[0])
    cell = picture[6 + 3 * 64:6 + 4 * 64, -6 - 128:-6 - 64]  # the fourth class, its first image: seed 6
    np.testing.assert_array_equal(cell[::8, ::8], images[2])
    assert "NaN" not in capsys.readouterr().out
    poisoned(monkeypatch, 9)
    draw_grid(net, latents_to_uint8, config_of(num_grid_images=11), CPU, tmp_path / "grid.png")
    assert "WARNING: sample grid: 1 of 10 images have NaN or Inf: seeds 9" in capsys.readouterr().out


def test_grid_of_many_classes_shows_evenly_spaced_ones(monkeypatch, tmp_path):
    labels = []
    monkeypatch.setattr(sample, "sample_latents", lambda net, seeds, config, device, class_idx: (labels.extend(class_idx[s] for s in seeds),
                                                                                                 torch.zeros(len(seeds), 4, 8, 8)[None])[1])
    net = tiny_net(num_classes=100)
    draw_grid(net, latents_to_uint8, config_of(num_grid_images=9), CPU, tmp_path / "grid.png")
    assert labels == [0] * 3 + [33] * 3 + [66] * 3


def numbered(count):
    """Images of 64 pixels, each filled with its number."""
    return np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1) + np.zeros((1, 64, 64, 3), np.uint8)


def cells(path, rows, columns):
    picture = np.asarray(Image.open(path))[-6 - rows * 64:-6, -6 - columns * 64:-6]
    return picture.reshape(rows, 64, columns, 64, 3)[:, 0, :, 0, 0].tolist()


def test_classes_are_rows_without_gaps(tmp_path):
    save_by_class(tmp_path / "grid.png", numbered(5), [2, 0, 2, 0, 2])
    assert cells(tmp_path / "grid.png", 2, 2) == [[1, 3], [0, 2]]
    save_by_class(tmp_path / "grid.png", numbered(8), [1] * 8)
    assert cells(tmp_path / "grid.png", 1, 8) == [list(range(8))]
    for labels in (list(range(20)), ()):  # more classes than rows, or none: as they come
        save_by_class(tmp_path / "grid.png", numbered(20), labels)
        assert Image.open(tmp_path / "grid.png").size == (5 * 64 + 12, 4 * 64 + 12)
