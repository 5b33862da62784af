"""Learning rate and mask ratio against hand-worked numbers."""

import pytest

from utils.config import MASK_SCHEDULES, TrainConfig
from training.schedules import learning_rate, mask_ratio


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
