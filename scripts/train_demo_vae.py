"""Train the demo's small autoencoder on the 60,000 Fashion-MNIST training images and write assets/demo-vae.

    OMP_NUM_THREADS=1 python scripts/train_demo_vae.py --data FOLDER

The result is an ordinary diffusers AutoencoderKL folder (fp16). Centring and scaling are folded into its first and last
1x1 convolutions, so that 0.18215 * z, the convention of every autoencoder here, has mean 0 and std 0.5 per channel
(0.5 is EDM's sigma_data). The test images are used for the reported figures only. About 20 minutes on one core.
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import run

STEPS, BATCH, PEAK_LR = 5000, 32, 2e-3
KL_WEIGHT = 1e-4         # times the mean KL per latent value, in nats
SCALE = 0.18215          # the scaling factor of latent diffusion
SIGMA_DATA = 0.5         # wanted std of SCALE * z
VAE_CONFIG = dict(
    in_channels=3, out_channels=3, sample_size=32, latent_channels=4,
    block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    scaling_factor=SCALE,
)


def parse_arguments(description, dest):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="where the four Fashion-MNIST files are (train-* and t10k-*)")
    parser.add_argument("--dest", default=ROOT / "assets" / dest, type=Path, help="folder to write (default: %(default)s)")
    return parser.parse_args()


def fit(net, num_images, loss_of, steps, batch, peak_lr, weight_decay, grad_clip=math.inf, **schedule):
    """Train `net` in place by AdamW, in bfloat16 where the processor has it; every epoch has an order of its own.

    loss_of(rows): the loss (a scalar) of the images of these indices. schedule: options of OneCycleLR.
    """
    import torch
    from utils.distributed import device
    from utils.logging import Progress
    from utils.precision import autocast, native_bf16

    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=weight_decay)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, steps, **schedule)
    with Progress(steps, "training", "step") as progress:
        for step in range(steps):
            place = step % (num_images // batch)
            if place == 0:
                epoch = torch.randperm(num_images).split(batch)
            with autocast("bf16" if native_bf16(device()) else "no", device()):
                loss = loss_of(epoch[place])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip)
            optimizer.step()
            rates.step()
            if step % 50 == 0:
                note = f"loss {loss.item():.4f}"
            progress.update(1, note)


def to_input(grey):
    """grey (B, 32, 32) uint8 -> (B, 3, 32, 32) float32 in [-1, 1]."""
    return (grey.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def reconstruction_loss(vae, images):
    """Mean squared error + 0.2 mean absolute error + KL_WEIGHT * mean KL per latent value (scalar)."""
    posterior = vae.encode(images).latent_dist
    error = vae.decode(posterior.sample()).sample - images
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.square().mean() + 0.2 * error.abs().mean() + KL_WEIGHT * kl


def latent_statistics(vae, grey, batch_size=500):
    """Per-channel mean and std of sampled, unscaled latents of grey (N, 32, 32) uint8; two float64 tensors (C,)."""
    import torch

    generator = torch.Generator(grey.device).manual_seed(0)
    with torch.no_grad():
        z = torch.cat([vae.encode(to_input(batch)).latent_dist.sample(generator) for batch in grey.split(batch_size)])
    z = z.double().transpose(0, 1).flatten(1)                       # (C, N*h*w)
    return z.mean(1), z.std(1)


def fold_normalisation(vae, mean, std):
    """Change vae in place so that its new z is a * (z - mean), with a = SIGMA_DATA / (SCALE * std), per channel.

    The log-variance grows by 2 ln a; the decoder's first 1x1 convolution undoes both: z = z_new / a + mean.
    """
    vae.requires_grad_(False)
    gain = (SIGMA_DATA / (SCALE * std)).to(vae.quant_conv.weight)
    mean = mean.to(gain)
    channels = len(gain)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias  # rows: means, then log-variances
    weight[:channels] *= gain[:, None, None, None]
    bias[:channels] = gain * (bias[:channels] - mean)
    bias[channels:] += 2 * gain.log()
    weight, bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
    bias += weight[:, :, 0, 0] @ mean
    weight /= gain[None, :, None, None]


def reconstruct(autoencoder, grey, batch_size=500):
    """Decode the posterior means of grey (N, 32, 32) uint8; returns float32 (N, 3, 32, 32) clipped to [-1, 1]."""
    import torch

    means = (autoencoder.encode_moments(to_input(batch)).chunk(2, dim=1)[0] for batch in grey.split(batch_size))
    return torch.cat([autoencoder.decode(autoencoder.scale * (mean - autoencoder.shift)).clamp(-1, 1) for mean in means])


def psnr(images, reference):
    """Peak signal-to-noise ratio of each of images (B, C, H, W) in [-1, 1], in dB; returns (B,)."""
    return 10 * (4 / (images - reference).square().mean((1, 2, 3))).log10()


def report(folder, grey):
    """Say the quality of the folder as written, on held-out images: PSNR, statistics of the latents; draw its reconstructions.png."""
    import torch
    from models import load_autoencoder
    from utils.images import save_grid, to_uint8
    from utils.logging import say

    autoencoder, images = load_autoencoder(folder, grey.device), to_input(grey)
    rebuilt = reconstruct(autoencoder, grey)
    mean, std = latent_statistics(autoencoder.vae, grey)
    say(f"PSNR {psnr(rebuilt, images).mean():.2f} dB, mean over the images; latents, scaled: mean {(SCALE * mean).tolist()}, "
        f"std {(SCALE * std).tolist()}")
    save_grid(folder / "reconstructions.png", to_uint8(torch.cat([images[:12], rebuilt[:12]])), labels=["test image", "rebuilt"])


def main():
    args = parse_arguments(__doc__, "demo-vae")
    import torch
    from diffusers import AutoencoderKL
    from dataset.idx import load_fashion_mnist
    from utils.distributed import device

    train_grey, test_grey = (torch.from_numpy(load_fashion_mnist(args.data, split)[0]).to(device()) for split in ("train", "test"))
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE_CONFIG).to(device())
    fit(vae, len(train_grey), lambda rows: reconstruction_loss(vae, to_input(train_grey[rows])), STEPS, BATCH, PEAK_LR,
        weight_decay=1e-4, grad_clip=1.0, cycle_momentum=False, pct_start=0.02)
    fold_normalisation(vae, *latent_statistics(vae, train_grey[:10_000]))
    vae.half().save_pretrained(args.dest)
    report(args.dest, test_grey)


if __name__ == "__main__":
    run(main)
