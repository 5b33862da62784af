"""Train the demo's small autoencoder on the 60,000 Fashion-MNIST training images and write assets/demo-vae.

The result is an ordinary diffusers AutoencoderKL folder (fp16). Centring and scaling are folded into its first and last
1x1 convolutions, so that 0.18215 * z, the convention of every autoencoder here, has mean 0 and std 0.5 per channel
(0.5 is EDM's sigma_data). The test images are used for the reported figures only.
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SCALE = 0.18215          # the scaling factor of latent diffusion
SIGMA_DATA = 0.5         # wanted std of SCALE * z

VAE_CONFIG = dict(
    in_channels=3, out_channels=3, sample_size=32, latent_channels=4,
    block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    scaling_factor=SCALE,
)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with the four Fashion-MNIST files (train-* and t10k-*)")
    parser.add_argument("--out", default=str(ROOT / "assets" / "demo-vae"), help="folder to write (default %(default)s)")
    parser.add_argument("--preview", help="PNG to write: test images above their reconstructions")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate, warmed up, then a cosine to 0")
    parser.add_argument("--kl_weight", type=float, default=1e-4, help="times the mean KL per latent value, in nats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast (faster where the processor has it)")
    return parser.parse_args()


def to_input(grey):
    """grey (B, 32, 32) uint8 -> (B, 3, 32, 32) float32 in [-1, 1]."""
    return (grey.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def reconstruction_loss(vae, images, kl_weight, generator):
    """Mean squared error + 0.2 mean absolute error + kl_weight * mean KL per latent value (scalar)."""
    import torch

    posterior = vae.encode(images).latent_dist
    error = vae.decode(posterior.sample(generator)).sample - images
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.square().mean() + 0.2 * torch.abs(error).mean() + kl_weight * kl


def train(vae, grey, args):
    """Fit vae in place to grey (N, 32, 32) uint8, shuffled anew in each epoch."""
    import torch
    from utils.logging import Progress

    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, cycle_momentum=False,
                                                   pct_start=min(0.5, 100 / args.steps))
    generator = torch.Generator(args.device).manual_seed(args.seed)
    batches_per_epoch = len(grey) // args.batch_size
    with Progress(args.steps, "training the autoencoder", unit="step") as progress:
        for step in range(args.steps):
            if step % batches_per_epoch == 0:
                order = torch.randperm(len(grey), generator=generator, device=args.device)
            start = step % batches_per_epoch * args.batch_size
            batch = to_input(grey[order[start:start + args.batch_size]])
            with torch.autocast(grey.device.type, torch.bfloat16, enabled=args.bf16):
                loss = reconstruction_loss(vae, batch, args.kl_weight, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                note = f"loss {loss.item():.4f}"
            progress.update(1, note)


def latent_statistics(vae, grey, batch_size=500):
    """Per-channel mean and std of sampled, unscaled latents of grey (N, 32, 32) uint8; two float64 arrays (C,)."""
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
    import torch

    gain = (SIGMA_DATA / (SCALE * std)).to(vae.quant_conv.weight)
    mean = mean.to(gain)
    channels = len(gain)
    with torch.no_grad():
        weight, bias = vae.quant_conv.weight, vae.quant_conv.bias   # rows: means, then log-variances
        weight[:channels] *= gain[:, None, None, None]
        bias[:channels] = gain * (bias[:channels] - mean)
        bias[channels:] += 2 * torch.log(gain)
        weight, bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
        bias += weight[:, :, 0, 0] @ mean
        weight /= gain[None, :, None, None]


def reconstruct(autoencoder, grey, batch_size=500):
    """Decode the posterior means of grey (N, 32, 32) uint8; returns float32 (N, 3, 32, 32) clipped to [-1, 1]."""
    import torch

    outputs = []
    for batch in grey.split(batch_size):
        mean = autoencoder.encode_moments(to_input(batch)).chunk(2, dim=1)[0]
        outputs.append(autoencoder.decode(autoencoder.scale * (mean - autoencoder.shift)).clamp(-1, 1))
    return torch.cat(outputs)


def psnr(images, reference):
    """Peak signal-to-noise ratio of each of images (B, C, H, W) in [-1, 1], in dB; returns (B,)."""
    return 10 * (4 / (images - reference).square().mean((1, 2, 3))).log10()


def report(folder, train_grey, test_grey, preview):
    """Say the quality of the folder as written: held-out PSNR and the statistics of the scaled latents."""
    import torch
    from models.autoencoder import load_autoencoder
    from utils.logging import say

    autoencoder = load_autoencoder(folder, device=test_grey.device)
    reference = to_input(test_grey)
    output = reconstruct(autoencoder, test_grey)
    pooled = 10 * math.log10(4 / (output - reference).square().mean().item())
    say(f"held-out PSNR: {psnr(output, reference).mean():.2f} dB, mean over the images; {pooled:.2f} dB from their mean squared error")
    for name, grey in (("training", train_grey[:10_000]), ("held-out", test_grey)):
        mean, std = latent_statistics(autoencoder.vae, grey)
        say(f"{name} latents, scaled: mean {(SCALE * mean).tolist()}, std {(SCALE * std).tolist()}")
    if preview:
        save_preview(preview, reference[:12], output[:12])


def save_preview(path, images, reconstructions):
    """One PNG, two rows: images and reconstructions, both (N, 3, 32, 32) in [-1, 1]."""
    import torch
    from utils.images import save_grid, to_uint8

    save_grid(path, to_uint8(torch.cat([images, reconstructions])), labels=["test image", "rebuilt"], columns=len(images))


def main():
    args = parse_args()
    import torch
    from diffusers import AutoencoderKL
    from dataset.idx import load_fashion_mnist
    from utils.logging import say

    train_grey, test_grey = (torch.from_numpy(load_fashion_mnist(args.data, split)[0]).to(args.device)
                             for split in ("train", "test"))
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**VAE_CONFIG).to(args.device)
    say(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(train_grey):,} training images, {args.steps} steps")
    train(vae, train_grey, args)
    fold_normalisation(vae, *latent_statistics(vae, train_grey[:10_000]))
    vae.half().save_pretrained(args.out)
    report(args.out, train_grey, test_grey, args.preview)


if __name__ == "__main__":
    from utils.cli import run

    run(main)
