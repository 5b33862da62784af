"""Train MaskDiT on stored latents.

    python3 train_latent.py --config configs/train/maskdit-latent-imagenet.yaml --num_process_per_node 8
"""

import functools

from training.run import train
from utils.cli import UserError, run


def open_dataset(config):
    from dataset.formats import open_latents

    data = config.data
    dataset = open_latents(data.root, data.xflip, config.model.num_classes, data.scale, data.shift)
    model = config.model
    wanted = (2 * model.in_channels, model.in_size, model.in_size)
    if dataset.sample_shape != wanted:
        raise UserError(f"data.root={config.data.root} holds moments of shape {dataset.sample_shape}, but "
                        f"model.in_channels={model.in_channels} and model.in_size={model.in_size} want {wanted}")
    return dataset


def make_encode(config, dataset, device):
    """Stored moments (B, 2C, H, W) -> latents (B, C, H, W), drawn anew at every visit; and the description of these latents."""
    from models import sample_moments

    return functools.partial(sample_moments, scale=dataset.scale, shift=dataset.shift), dataset.description


def main():
    return train(__doc__.splitlines()[0], "assets/imagenet_256_latent_lmdb", open_dataset, make_encode)


if __name__ == "__main__":
    run(main)
