import inspect
import itertools
import math

import pytest
import torch

from models import SAMPLERS, ablation_sampler, build_model, edm_sampler, guided
from models.samplers import SCHEDULES, edm_sigmas
from utils.cli import UserError

SIGMA_DATA = 0.5
COMBINATIONS = list(itertools.product(("vp", "ve", "iddpm", "edm"), ("vp", "ve", "linear"), ("vp", "none")))


def gaussian_denoiser(x, sigma, class_labels=None):
    """The exact denoiser of N(0, SIGMA_DATA^2): the sampler must scale unit noise to that standard deviation."""
    return x * (SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2))


def gain(sampler, **options):
    """Standard deviation of the samples: the flow of a Gaussian is linear, so every value gets the same factor."""
    ratio = sampler(gaussian_denoiser, torch.ones(1, 1, 1, 1), **options)
    return ratio.item()


def test_heun_recovers_gaussian_std():
    # sigma_max = 80 itself limits this to 2e-5; the discretisation error falls with the square of the step
    errors = [abs(gain(edm_sampler, num_steps=n) - SIGMA_DATA) for n in (40, 80, 160)]
    assert errors[0] < 6e-3 and 3 < errors[0] / errors[1] < 5 and 3 < errors[1] / errors[2] < 5


@pytest.mark.parametrize("discretization, schedule, scaling", COMBINATIONS)
def test_every_combination_recovers_gaussian_std(discretization, schedule, scaling):
    """With 512 steps; the curved ones converge slowly, as EDM reports. Euler's error halves with the step, Heun's quarters."""
    choice = dict(discretization=discretization, schedule=schedule, scaling=scaling)
    assert gain(ablation_sampler, num_steps=512, solver="heun", **choice) == pytest.approx(SIGMA_DATA, rel=0.02)
    assert gain(ablation_sampler, num_steps=512, solver="euler", **choice) == pytest.approx(SIGMA_DATA, rel=0.16)


def test_edm_sampler_is_the_ablation_with_edm_choices():
    noise = torch.randn(2, 3, 4, 4)
    options = dict(num_steps=7, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    assert torch.equal(edm_sampler(gaussian_denoiser, noise, **options), ablation_sampler(gaussian_denoiser, noise, **options))


def test_one_heun_step_by_hand():
    """Two levels, 4 and 1: Heun from 4 to 1, Euler from 1 to 0, with D = x / (1 + 4 sigma^2)."""
    x = 4.0
    d = (x - x / 65) / 4
    end = x - 3 * d
    d_end = (end - end / 5) / 1
    x = x - 3 * (d + d_end) / 2
    expected = x - (x - x / 5)
    assert gain(edm_sampler, num_steps=2, sigma_min=1.0, sigma_max=4.0) == pytest.approx(expected, rel=1e-6)


def test_single_step_denoises_from_sigma_max():
    noise = torch.randn(2, 3, 4, 4)
    expected = gaussian_denoiser(80 * noise, 80.0)
    latents = edm_sampler(gaussian_denoiser, noise, num_steps=1)
    torch.testing.assert_close(latents, expected.double(), rtol=0, atol=1e-11)  # float64 steps end at what the network said, exactly


def test_noise_levels_run_from_max_to_min():
    sigmas = edm_sigmas([0, 0.25, 0.5, 0.75, 1], 0.002, 80.0, 7.0)
    assert sigmas[0] == pytest.approx(80.0) and sigmas[-1] == pytest.approx(0.002)
    assert sigmas[2] == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7)


@pytest.mark.parametrize("discretization, first, last", [  # EDM, Table 1; vp with its beta_d = 19.1, beta_min = 0.1, epsilon_s = 1e-3
    ("vp", (math.exp(19.1 / 2 + 0.1) - 1) ** 0.5, (math.exp(19.1e-6 / 2 + 1e-4) - 1) ** 0.5), ("ve", 100.0, 0.02), ("edm", 80.0, 0.002)])
def test_default_ranges_are_those_of_the_original_methods(discretization, first, last):
    sigmas = []
    ablation_sampler(lambda x, sigma, labels: sigmas.append(sigma.item()) or x, torch.zeros(1, 1, 1, 1), num_steps=4, solver="euler",
                     discretization=discretization)
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(first, rel=1e-5), pytest.approx(last, rel=1e-5))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_inverse_and_derivative(name):
    schedule = SCHEDULES[name](0.01, 150.0)
    for t in (0.01, 0.3, 0.9):
        assert schedule.inverse(schedule.sigma(t)) == pytest.approx(t, rel=1e-9)
        slope = (schedule.sigma(t + 1e-6) - schedule.sigma(t - 1e-6)) / 2e-6
        assert schedule.derivative(t) == pytest.approx(slope, rel=1e-6)


def test_state_is_float64_and_network_input_float32():
    seen = []

    def model(x, sigma, class_labels):
        seen.append((x.dtype, sigma.dtype, sigma.ndim, class_labels))
        return gaussian_denoiser(x, sigma)

    latents = edm_sampler(model, torch.randn(2, 3, 4, 4), "labels", num_steps=3)
    assert latents.dtype == torch.float64
    assert seen == [(torch.float32, torch.float32, 0, "labels")] * 5  # two per step, one in the last


def test_churn_keeps_the_distribution():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, 64, 64, generator=generator)
    latents = edm_sampler(gaussian_denoiser, noise, num_steps=100, S_churn=40, S_min=0.05, S_max=50,
                          randn_like=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype))
    # 49,152 values: standard error 0.3%, and a discretisation error of the same size
    assert latents.std().item() == pytest.approx(SIGMA_DATA, rel=0.02)
    unchurned = edm_sampler(gaussian_denoiser, noise, num_steps=100)
    assert abs(torch.corrcoef(torch.stack([latents.flatten(), unchurned.flatten()]))[0, 1]) < 0.5


def euler_inputs(**options):
    """(sigma, x) that the network is given in three Euler steps from 4, 1 and 0.25, with latent noise 0.5 and churn noise 2."""
    seen = []
    ablation_sampler(lambda x, sigma, labels: seen.append((sigma.item(), x.item())) or x, torch.full((1, 1, 1, 1), 0.5), num_steps=3,
                     solver="euler", discretization="ve", sigma_min=0.25, sigma_max=4.0,
                     randn_like=lambda x: torch.full_like(x, 2.0), **options)
    return seen


@pytest.mark.parametrize("schedule, scaling", [("linear", "none"), ("ve", "none"), ("vp", "vp")])
@pytest.mark.parametrize("S_churn, gamma", [(0.3, 0.1), (0.9, 0.3), (100.0, 2**0.5 - 1)])
def test_churn_raises_the_noise_level_up_to_the_limit(S_churn, gamma, schedule, scaling):
    """In closed form: sigma grows by 1 + gamma, gamma = S_churn / num_steps but at most sqrt(2) - 1, by noise of the missing variance.

    The network sees x / s(t), which does not depend on schedule and scaling. Only the first step lies in the range.
    """
    seen = euler_inputs(S_churn=S_churn, S_min=2.0, S_noise=1.5, schedule=schedule, scaling=scaling)
    added = math.sqrt((4 * (1 + gamma)) ** 2 - 4**2)
    assert seen[0] == pytest.approx((4 * (1 + gamma), 4 * 0.5 + added * 1.5 * 2.0), rel=1e-5)
    assert [sigma for sigma, _ in seen[1:]] == pytest.approx([1.0, 0.25], rel=1e-5)


def test_both_ends_of_the_range_of_churn_belong_to_it():
    assert [sigma for sigma, _ in euler_inputs(S_churn=0.3, S_min=1.0, S_max=4.0)] == pytest.approx([4.4, 1.1, 0.25])


def test_churn_draws_once_per_step_and_only_when_asked():
    draws = []

    def randn_like(x):
        draws.append(x.dtype)
        return torch.zeros_like(x)

    noise = torch.randn(2, 3, 4, 4)
    edm_sampler(gaussian_denoiser, noise, num_steps=6, randn_like=randn_like)
    assert draws == []
    edm_sampler(gaussian_denoiser, noise, num_steps=6, S_churn=1.0, S_min=1.0, randn_like=randn_like)
    assert draws == [torch.float64] * 6


def test_progress_is_told_of_every_step():
    calls = []
    edm_sampler(gaussian_denoiser, torch.randn(1, 1, 2, 2), num_steps=4, progress=calls.append)
    assert calls == [1, 1, 1, 1]


@pytest.mark.parametrize("options, message", [
    (dict(solver="rk4"), "solver='rk4' is unknown; want one of euler, heun"),
    (dict(discretization="ddim"), "want one of vp, ve, iddpm, edm"),
    (dict(schedule="cosine"), "want one of vp, ve, linear"),
    (dict(scaling="ve"), "want one of vp, none"),
    (dict(num_steps=0), "num_steps=0"),
    (dict(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
    (dict(rho=0.0), "rho=0.0"),
    (dict(sigma_max=math.inf), "sigma_max=inf"),
    (dict(sigma_min=math.nan), "sigma_min=nan"),
    (dict(S_churn=-1.0), "S_churn >= 0"),
    (dict(S_churn=math.nan), "S_churn >= 0"),
    (dict(S_noise=0.0), "S_noise > 0"),
    (dict(S_churn=1.0, S_min=2.0, S_max=1.0), "S_min <= S_max"),
    (dict(discretization="iddpm", sigma_min=80.0, sigma_max=80.1), "no iddpm noise level"),
])
def test_bad_options_are_refused_before_the_model_is_called(options, message):
    with pytest.raises(UserError, match=message):
        ablation_sampler(None, torch.randn(0, 1, 2, 2), **options)
    if options.keys() <= inspect.signature(edm_sampler).parameters.keys():
        with pytest.raises(UserError, match=message):
            edm_sampler(None, torch.randn(0, 1, 2, 2), **options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_call_on_an_empty_batch_checks_the_options(name):
    latents = SAMPLERS[name](gaussian_denoiser, torch.zeros(0, 3, 4, 4), None, num_steps=3, S_churn=1.0)
    assert latents.shape == (0, 3, 4, 4) and latents.dtype == torch.float64


# ---- guidance

class ClassNet:
    """D = label + 1 for a class, 0 for none; counts its calls by batch size."""
    num_classes = 10

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma, class_labels=None):
        self.batches.append(len(x))
        values = torch.where(class_labels == 10, 0, class_labels + 1).float()
        return values.reshape(-1, 1, 1, 1).expand_as(x)


def test_guidance_extrapolates_in_one_batch():
    net = ClassNet()
    denoised = guided(net, 2.5)(torch.zeros(3, 1, 2, 2), torch.tensor(1.0), torch.tensor([0, 1, 4]))
    assert denoised[:, 0, 0, 0].tolist() == [2.5, 5.0, 12.5]
    assert net.batches == [6]


def test_guidance_takes_a_sigma_per_sample():
    torch.manual_seed(0)
    net = build_model("DiT-S/2", in_size=4, in_channels=3, num_classes=5, depth=1, width=24, num_heads=3, decoder_depth=1, decoder_width=16)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, sigma, labels = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 4.0]), torch.tensor([1, 3])
    unconditional, conditional = net(x, sigma), net(x, sigma, labels)
    expected = unconditional + 3.0 * (conditional - unconditional)
    # float32: batches of two and of four may round differently
    torch.testing.assert_close(guided(net, 3.0)(x, sigma, labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cfg_scale", [None, 1, 1.0])
def test_guidance_off_is_the_network_itself(cfg_scale):
    net = ClassNet()
    assert guided(net, cfg_scale) is net


def test_interval_guides_only_inside():
    net = ClassNet()
    model = guided(net, 2.0, interval=(0.28, 2.9))
    values = [model(torch.zeros(1, 1, 2, 2), sigma, torch.tensor([2])).mean().item() for sigma in (0.28, 0.29, 2.9, 3.0)]
    assert values == [3.0, 6.0, 6.0, 3.0]
    assert net.batches == [1, 2, 2, 1]


def test_guidance_without_classes_is_refused():
    with pytest.raises(ValueError, match="needs class_labels"):
        guided(ClassNet(), 2.0)(torch.zeros(1, 1, 2, 2), 1.0)
    unconditional = ClassNet()
    unconditional.num_classes = 0
    with pytest.raises(UserError, match="num_classes=0"):
        guided(unconditional, 2.0)


def test_sampling_keeps_no_graph():
    weight = torch.ones(1, requires_grad=True)
    latents = edm_sampler(lambda x, sigma, labels: weight * gaussian_denoiser(x, sigma), torch.randn(1, 1, 2, 2), num_steps=2)
    assert not latents.requires_grad
    assert math.isfinite(latents.sum().item())
