"""Train MaskDiT on images, encoded to latents on the fly by a frozen autoencoder.

    python3 train.py --config configs/train/maskdit-imagenet.yaml data.root=PATH --num_process_per_node 8
"""

from training.run import train
from utils.cli import UserError, run


def open_dataset(config):
    from dataset.images import open_images

    return open_images(config.data.root, config.data.resolution, config.data.xflip, config.model.num_classes)


def make_encode(config, dataset, device):
    """Images (B, 3, R, R) uint8 -> latents (B, C, H, W), through the frozen autoencoder; and the description of these latents."""
    import torch

    from models import load_autoencoder, sample_moments
    from utils.precision import autocast

    autoencoder = load_autoencoder(config.vae.path, device)
    side, rest = divmod(config.data.resolution, autoencoder.downsample)
    if rest:
        raise UserError(f"data.resolution={config.data.resolution} must be divisible by {autoencoder.downsample}, the pixels in a latent "
                        f"value of vae.path={config.vae.path}")
    if (autoencoder.latent_channels, side) != (config.model.in_channels, config.model.in_size):
        raise UserError(f"vae.path={config.vae.path} makes {autoencoder.latent_channels} x {side} x {side} latents of "
                        f"data.resolution={config.data.resolution}; set model.in_channels={autoencoder.latent_channels} "
                        f"and model.in_size={side}")

    @torch.no_grad()
    def encode(images, generator):
        with torch.autocast(device.type, enabled=False), autocast(config.vae.amp, device):
            parts = [autoencoder.encode_moments(part.float() / 127.5 - 1) for part in images.split(config.vae.batchsize)]
        return sample_moments(torch.cat(parts), generator, autoencoder.scale, autoencoder.shift)

    return encode, {"scale": autoencoder.scale, "shift": autoencoder.shift, "vae": autoencoder.digest}


def main():
    return train(__doc__.splitlines()[0], "data/imagenet/train", open_dataset, make_encode)


if __name__ == "__main__":
    run(main)
