import pytest
import torch
from diffusers import AutoencoderKL

from models import load_autoencoder, sample_moments
from scripts.train_demo_vae import ROOT, VAE_CONFIG, fold_normalisation, latent_statistics, psnr, reconstruct, to_input
from dataset.idx import load_fashion_mnist


@pytest.fixture(scope="module")
def grey():
    """200 held-out images (200, 32, 32) uint8."""
    return torch.from_numpy(load_fashion_mnist(ROOT / "assets" / "fashion-mnist", "test")[0][:200])


def test_psnr_of_a_known_error():
    reference = torch.zeros(2, 3, 4, 4)
    images = torch.stack([reference[0] + 0.2, reference[1] - 0.02])  # range 2: 20 log10(2 / 0.2) and 20 log10(2 / 0.02)
    torch.testing.assert_close(psnr(images, reference), torch.tensor([20.0, 40.0]), atol=1e-4, rtol=0)


def test_folding_centres_and_scales_the_latents_and_leaves_the_pictures(grey):
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE_CONFIG).eval().requires_grad_(False)
    images = to_input(grey[:20])
    before = vae.encode(images).latent_dist
    rebuilt = vae.decode(before.mean).sample
    mean, std = latent_statistics(vae, grey)
    fold_normalisation(vae, mean, std)
    after = vae.encode(images).latent_dist
    torch.testing.assert_close(vae.decode(after.mean).sample, rebuilt, atol=1e-5, rtol=1e-4)
    # the posterior's width relative to the latents' is unchanged: logvar moved by 2 ln a
    gain = (0.5 / (0.18215 * std)).float()[:, None, None]
    torch.testing.assert_close(after.std, before.std * gain, atol=1e-5, rtol=1e-4)
    mean, std = latent_statistics(vae, grey)  # the same draws again: only float32 rounding is left
    torch.testing.assert_close(0.18215 * mean, torch.zeros(4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(0.18215 * std, torch.full((4,), 0.5).double(), atol=1e-4, rtol=0)


def test_the_committed_autoencoder_is_small_sharp_and_normalised(grey):
    folder = ROOT / "assets" / "demo-vae"
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 3_000_000
    autoencoder = load_autoencoder(folder)
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 648_375
    assert (autoencoder.latent_channels, autoencoder.downsample) == (4, 4)
    assert (autoencoder.scale, autoencoder.shift) == (0.18215, 0.0)
    # 30.2 dB on all 10,000; the mean of 200 scatters by some tenths
    assert psnr(reconstruct(autoencoder, grey), to_input(grey)).mean() > 29.6
    moments = autoencoder.encode_moments(to_input(grey))
    latents = sample_moments(moments, torch.Generator().manual_seed(0)).transpose(0, 1).flatten(1)
    # statistics of 200 images scatter by some hundredths around those of the training set, 0 and 0.5
    assert latents.mean(1).abs().max() < 0.08
    assert (latents.std(1) - 0.5).abs().max() < 0.05
