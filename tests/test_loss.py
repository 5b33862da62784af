import pytest
import torch

from models import EDMLoss, EDMPrecond, LossDraws, TokenMask, build_model, drop_labels, random_mask
from models.edm import normalize_patches
from utils.cli import UserError

LOSS = EDMLoss(patch_size=2)


def net(x, sigma, class_labels=None, mask=None):
    """A denoiser by formula, so that the loss is the only thing under test."""
    return torch.tanh(x) / (1 + sigma.reshape(-1, 1, 1, 1))


@pytest.fixture
def latents():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def loss_by_patch_loop(latents, draws, patch_size=2, sigma_data=0.5):
    """(denoising, mae) of every sample, patch by patch and value by value in Python."""
    rows = []
    for b in range(len(latents)):
        sigma = draws.sigma[b].item()
        noised = latents[b] + sigma * draws.noise[b]
        denoised = torch.tanh(noised) / (1 + sigma)
        kept, removed = [], []
        for token, is_removed in enumerate(draws.mask.mask[b].tolist()):
            top, left = token // 4 * patch_size, token % 4 * patch_size
            clean, seen, made = (image[:, top:top + patch_size, left:left + patch_size].flatten().double()
                                 for image in (latents[b], noised, denoised))
            if is_removed:
                mean = seen.sum() / 12
                variance = ((seen - mean) ** 2).sum() / 11
                removed.append((((made - (seen - mean) / (variance + 1e-6) ** 0.5) ** 2).sum() / 12).item())
            else:
                weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
                kept.append((weight * ((made - clean) ** 2).sum() / 12).item())
        rows.append((sum(kept) / len(kept), sum(removed) / len(removed)))
    return torch.tensor(rows)


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.9])
def test_masked_loss_equals_a_loop_over_patches(latents, mask_ratio):
    draws = LOSS.draw(latents, mask_ratio, torch.Generator().manual_seed(3))
    expected = loss_by_patch_loop(latents, draws)
    losses = LOSS(net, latents, draws=draws)
    assert list(losses) == ["denoising", "mae"]
    torch.testing.assert_close(torch.stack(list(losses.values()), dim=1), expected, rtol=1e-5, atol=1e-5)  # float32 against float64


def test_weights_are_those_of_the_sum_that_is_trained():
    assert EDMLoss(mae_loss_coef=0.3).weights == {"denoising": 1.0, "mae": 0.3}


def test_unmasked_loss_is_the_weighted_error_of_the_whole_image(latents):
    draws = LOSS.draw(latents, 0.0)
    sigma = draws.sigma.reshape(-1, 1, 1, 1)
    error = (net(latents + sigma * draws.noise, sigma) - latents).square().mean(dim=(1, 2, 3))
    weight = (draws.sigma**2 + 0.25) / (draws.sigma * 0.5) ** 2
    losses = LOSS(net, latents, draws=draws)
    torch.testing.assert_close(losses["denoising"], weight * error)
    assert losses["mae"].tolist() == [0.0] * 5


@pytest.mark.parametrize("mask_ratio", [0.0, 1e-30])
def test_nothing_removed_is_no_nan(latents, mask_ratio):
    """A cosine schedule ends at a ratio that is above 0 but removes no patch; a mask may also remove none."""
    draws = LOSS.draw(latents, mask_ratio)
    assert draws.mask is None
    for mask in (None, random_mask(5, 16, mask_ratio)):
        latents.requires_grad_()
        losses = LOSS(net, latents, draws=draws._replace(mask=mask))
        (gradient,) = torch.autograd.grad(losses["mae"].sum() + losses["denoising"].sum(), latents)
        assert losses["mae"].tolist() == [0.0] * 5
        assert losses["denoising"].isfinite().all() and gradient.isfinite().all()


def test_draws_come_from_the_generator_in_one_order(latents):
    state = torch.get_rng_state()
    draws = LOSS.draw(latents, 0.5, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(draws.sigma, (torch.randn(5, generator=generator) * 1.2 - 1.2).exp())
    assert torch.equal(draws.noise, torch.randn(5, 3, 8, 8, generator=generator))
    assert torch.equal(draws.mask.ids_shuffle, random_mask(5, 16, 0.5, generator).ids_shuffle)
    assert torch.equal(torch.get_rng_state(), state)


def test_sigma_is_log_normal():
    log_sigma = LOSS.draw(torch.zeros(20000, 1, 2, 2), 0.0, torch.Generator().manual_seed(0)).sigma.log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.05)  # five standard errors are 0.042
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.04)


def test_joined_batches_have_the_losses_of_their_halves(latents):
    """What lets the loss of several ranks be checked against one process."""
    draws = LOSS.draw(latents, 0.5)
    halves = []
    for rows in (slice(0, 2), slice(2, 5)):
        mask = TokenMask(draws.mask.ids_shuffle[rows], draws.mask.num_keep)
        halves.append(LOSS(net, latents[rows], draws=LossDraws(draws.sigma[rows], draws.noise[rows], mask)))
    for name, losses in LOSS(net, latents, draws=draws).items():
        torch.testing.assert_close(torch.cat([half[name] for half in halves]), losses)


def test_losses_are_float32_also_under_autocast_and_train_the_network(latents):
    model = build_model("DiT-S/4", in_size=8, in_channels=3, num_classes=7, depth=1, width=24, num_heads=3, decoder_depth=1, decoder_width=16)
    with torch.autocast("cpu", torch.bfloat16):
        losses = EDMLoss(patch_size=4)(model, latents, torch.tensor([0, 1, 2, 7, 7]), mask_ratio=0.5)
    for loss in losses.values():
        assert loss.shape == (5,) and loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss.mean(), model.model.final_layer.linear.weight, retain_graph=True)
        assert gradient.any()


def test_the_weight_makes_every_noise_level_count_alike():
    """What a network sees and makes has unit variance, so a fresh one (output 0) has the loss 1 at every sigma (EDM, eq. 8)."""
    class Zero(torch.nn.Module):
        in_size, in_channels, patch_size, num_tokens, num_classes = 64, 3, 2, 1024, 0

        def forward(self, x, c_noise, class_labels, mask):
            return torch.zeros_like(x)

    generator = torch.Generator().manual_seed(5)
    latents = 0.5 * torch.randn(5, 3, 64, 64, generator=generator)
    draws = LossDraws(torch.tensor([0.01, 0.1, 0.5, 3.0, 80.0]), torch.randn(5, 3, 64, 64, generator=generator), None)
    losses = LOSS(EDMPrecond(Zero()), latents, draws=draws)["denoising"]
    torch.testing.assert_close(losses, torch.ones(5), rtol=0, atol=0.06)  # 12,288 values: standard error of the variance 0.013


def test_nearly_flat_patches_are_normalised_by_hand():
    """Values 0 and 0.002: mean 0.001, variance 2e-6, to which 1e-6 is added before the root."""
    target = 0.001 / 3e-6**0.5
    torch.testing.assert_close(normalize_patches(torch.tensor([[[0.0, 0.002], [5.0, 5.0]]])),
                               torch.tensor([[[-target, target], [0.0, 0.0]]]), rtol=1e-4, atol=0)


def test_patches_of_one_value_cannot_be_reconstructed():
    with pytest.raises(UserError, match="one value"):
        EDMLoss(patch_size=1)(net, torch.zeros(2, 1, 4, 4), mask_ratio=0.5)


def test_dropped_labels_become_unconditional():
    labels = torch.arange(10).repeat(1000)
    generator = torch.Generator().manual_seed(0)
    dropped = drop_labels(labels, 10, 0.1, generator)
    changed = dropped != labels
    assert (dropped[changed] == 10).all()
    assert changed.float().mean().item() == pytest.approx(0.1, abs=0.015)  # five standard errors of 10,000 draws
    assert torch.equal(drop_labels(labels, 10, 0.0), labels)
    assert (drop_labels(labels, 10, 1.0) == 10).all()
