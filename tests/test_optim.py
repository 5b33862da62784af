"""Schedules against hand-worked numbers; optimizer steps that skip what is not finite, in every precision."""

import pytest
import torch

from training.optim import Stepper, learning_rate, make_optimizer, mask_ratio
from utils.schema import MASK_SCHEDULES, TrainConfig

CPU = torch.device("cpu")


def test_learning_rate_stays_or_falls_to_zero():
    rates = {name: [learning_rate(TrainConfig(lr=2.0, lr_schedule=name), 10, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
             for name in ("constant", "linear", "cosine")}
    assert rates["constant"] == [2, 2, 2, 2]
    assert rates["linear"] == [2, 1.5, 1, 0]
    assert rates["cosine"] == pytest.approx([2, 1 + 0.5**0.5, 1, 0], abs=1e-12)


def test_warm_up_rises_with_images_and_multiplies_the_schedule():
    config = TrainConfig(lr=2.0, warmup_images=100, lr_schedule="linear")
    assert [learning_rate(config, images, 0.5) for images in (0, 25, 100, 1000)] == [0, 0.25, 1, 1]


def test_mask_ratio_ends_of_every_schedule():
    for name in MASK_SCHEDULES:
        config = TrainConfig(mask_ratio=0.5, mask_ratio_min=0.1, mask_ratio_fn=name)
        assert mask_ratio(config, 0.0) == 0.5
        ratios = [mask_ratio(config, i / 20) for i in range(21)]
        assert ratios == sorted(ratios, reverse=True)
        if name not in ("constant", "exp"):
            assert ratios[-1] == pytest.approx(0.1, abs=1e-12)


def test_mask_ratio_at_half_way():
    """0.5 * cos^4(pi/4) = 0.5 / 4; cos^2 gives half; exp(-3.5) = 0.030197; linear is the mean of its ends."""
    half = {name: mask_ratio(TrainConfig(mask_ratio=0.5, mask_ratio_fn=name), 0.5) for name in MASK_SCHEDULES}
    assert half["constant"] == 0.5 and half["linear"] == 0.25
    assert half["exp"] == pytest.approx(0.5 * 0.0301974, rel=1e-5)
    assert half["cosine2"] == pytest.approx(0.25) and half["cosine4"] == pytest.approx(0.125) and half["cosine6"] == pytest.approx(0.0625)


def test_published_short_names_mean_the_same():
    for short, name in (("cos4", "cosine4"), ("const", "constant")):
        assert mask_ratio(TrainConfig(mask_ratio_fn=short), 0.3) == mask_ratio(TrainConfig(mask_ratio_fn=name), 0.3)


# ------------------------------------------------------------------------------------------------ steps

def make(scaled=False, fused=True, **options):
    """A problem of two weights of 1, AdamW with lr 0.1; scaled: with fp16's loss scaler, which also runs on a CPU."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=fused)
    stepper = Stepper(optimizer, "fp16", CPU, **options)
    if scaled:
        stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    return weight, optimizer, stepper


def step(weight, stepper, factor=1.0):
    stepper.backward((weight * factor).sum())
    return stepper.step()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_step_changes_nothing_and_is_counted(scaled, fused, bad):
    weight, optimizer, stepper = make(scaled, fused)
    norm = step(weight, stepper, 3.0)
    assert norm.item() == pytest.approx(3 * 2**0.5, rel=1e-6)  # unscaled
    before = weight.detach().clone(), {key: value.clone() for key, value in optimizer.state[weight].items()}
    assert torch.isnan(step(weight, stepper, bad))
    assert torch.equal(weight, before[0])
    for key, value in before[1].items():
        assert torch.equal(optimizer.state[weight][key], value), key
    assert stepper.bad_steps.tolist() == [1, 1]
    step(weight, stepper, bad), step(weight, stepper, 1.0)
    assert stepper.bad_steps.tolist() == [0, 2] and not torch.equal(weight, before[0])


def test_scaled_steps_equal_plain_ones_bit_for_bit():
    """The scale is a power of two, so scaling and unscaling are exact."""
    plain, scaled = make(), make(scaled=True)
    for factor in (1.0, 0.3, float("nan"), 2.0):
        for weight, _, stepper in (plain, scaled):
            step(weight, stepper, factor)
    assert torch.equal(plain[0], scaled[0])


def test_scale_falls_on_bad_steps_and_rises_again():
    weight, _, stepper = make(scaled=True)
    scales = []
    for factor in (1.0, float("nan"), 1.0, 1.0, 1.0):
        step(weight, stepper, factor)
        scales.append(stepper.scaler.get_scale())
    assert scales == [1024, 512, 512, 512, 1024]


def test_infinite_loss_with_finite_gradients_is_a_bad_step():
    weight, _, stepper = make()
    weight.data.fill_(2e19)  # the square overflows float32, its derivative 4e19 does not
    loss = weight.square().sum()
    assert torch.isinf(loss)
    stepper.backward(loss)
    assert torch.isnan(stepper.step()) and stepper.bad_steps.tolist() == [1, 1]


def test_at_the_limit_a_good_step_is_still_taken():
    weight, _, stepper = make(max_bad_steps=2)
    for factor in (float("nan"), float("nan"), 1.0):
        step(weight, stepper, factor)
    assert stepper.bad_steps.tolist() == [0, 2] and not torch.equal(weight, torch.ones(2))


def test_past_the_limit_every_step_is_skipped():
    weight, _, stepper = make(max_bad_steps=2)
    for factor in (float("nan"), float("nan"), float("nan"), 1.0, 1.0):
        step(weight, stepper, factor)
    assert stepper.bad_steps.tolist() == [5, 5] and torch.equal(weight, torch.ones(2))


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_bounds_the_norm(scaled):
    weight, _, stepper = make(scaled, grad_clip=1.0)
    seen = []
    stepper.optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.norm().item()))
    assert step(weight, stepper, 100.0).item() == pytest.approx(100 * 2**0.5, rel=1e-6)
    assert step(weight, stepper, 0.1).item() == pytest.approx(0.1 * 2**0.5, rel=1e-6)
    assert seen == pytest.approx([1.0, 0.1 * 2**0.5], rel=1e-4)  # torch divides by norm + 1e-6


def test_state_comes_back():
    weight, _, stepper = make(scaled=True)
    for factor in (1.0, float("nan"), 1.0):
        step(weight, stepper, factor)
    other = make(scaled=True)[2]
    other.load_state_dict(stepper.state_dict())
    assert other.state_dict() == stepper.state_dict() and other.scaler.get_scale() == 512
    assert other.scaler.state_dict()["_growth_tracker"] == 1
    assert other.report(3) == ""  # the run that was resumed has told of its bad steps


def test_each_bad_step_is_reported_once():
    weight, _, stepper = make()
    for factor in (float("nan"), 1.0):
        step(weight, stepper, factor)
    assert stepper.report(2) == "1 steps up to step 2 had NaN or Inf losses or gradients and were skipped (1 in all)"
    assert stepper.report(2) == ""


def test_optimizer_is_adamw_of_the_config_over_the_weights_that_are_trained():
    net = torch.nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    optimizer = make_optimizer(net, TrainConfig(lr=0.5, betas=(0.8, 0.7), weight_decay=0.25))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and group["params"] == [net.weight]
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (0.5, (0.8, 0.7), 0.25, True)
