"""From seeds to images: per-seed noise and class, guided sampling, decoding.

An image depends on its seed alone: everything it draws comes from its own generator, on the CPU, in the order latent noise,
class (when none is asked for), churn noise. Batch size and process count change only the order of sums inside matrix
products.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

import models
from models import ablation_sampler, edm_sampler, guided, load_autoencoder
from utils import distributed
from utils.cli import UserError
from utils.images import save_grid, to_uint8
from utils.precision import autocast


class SeedStreams:
    """One random generator per image seed (`seed % 2^32`), on the CPU, so that every device sees the same numbers."""

    def __init__(self, seeds, device="cpu"):
        self.generators = [torch.Generator().manual_seed(int(seed) % 2**32) for seed in seeds]
        self.device = device

    def randn(self, shape):
        """Unit normal (B, *shape) float32, one draw per seed."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def randint(self, high):
        """(B,) int64 in [0, high), one draw per seed."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self.generators]).to(self.device)

    def randn_like(self, x):
        """Unit normal like x (B, ...), in x's dtype: what samplers ask for."""
        drawn = torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in self.generators])
        return drawn.to(x.device)


def _split(seeds, batch_size):
    return [seeds[i:i + batch_size] for i in range(0, len(seeds), batch_size)]


class Batch(NamedTuple):
    """One batch of samples. latents (B, C, H, W) float32; images (B, 8H, 8W, 3) uint8 NHWC, or None; class_labels (B,) or None."""

    index: int
    seeds: list
    class_labels: torch.Tensor | None
    latents: torch.Tensor
    images: np.ndarray | None


def build_model(model_config, train=None):
    """The network of a ModelConfig, with fresh weights; train: a TrainConfig, to be trained as that says."""
    arguments = dict(vars(model_config))
    options = arguments.pop("options")
    checkpointing = train is not None and train.activation_checkpointing
    return models.build_model(**arguments, activation_checkpointing=checkpointing, **options)


def build_sampler(config):
    """SampleConfig -> sampler(model, noise, class_labels, randn_like=...) with every option bound."""
    churn = {"S_churn": config.S_churn, "S_min": config.S_min, "S_max": config.S_max, "S_noise": config.S_noise}
    sigmas = {key: getattr(config, key) for key in ("sigma_min", "sigma_max") if getattr(config, key) is not None}
    options = {"num_steps": config.num_steps, "rho": config.rho, **sigmas, **churn}
    choices = {key: getattr(config, key) for key in ("solver", "discretization", "schedule", "scaling") if getattr(config, key) is not None}
    options |= config.options
    if (config.sampler or ("ablation" if choices else "edm")) == "edm":
        return lambda *args, **kwargs: edm_sampler(*args, **options, **kwargs)
    return lambda *args, **kwargs: ablation_sampler(*args, **options, **choices, **kwargs)


def draw_inputs(seeds, net, device, class_idx=()):
    """What each seed fixes: its streams, latent noise (B, C, H, W) and class labels (B,) (None for an unconditional net).

    class_idx: the classes asked for; seed s gets class_idx[s % len(class_idx)]. Empty: each seed draws its own class.
    """
    streams = SeedStreams(seeds, device)
    noise = streams.randn((net.in_channels, net.in_size, net.in_size))
    if not net.num_classes:
        return streams, noise, None
    if class_idx:
        return streams, noise, torch.tensor([class_idx[seed % len(class_idx)] for seed in seeds], device=device)
    return streams, noise, streams.randint(net.num_classes)


@torch.no_grad()
def sample_latents(net, seeds, config, device, class_idx=(), progress=None):
    """Sample the latents of some seeds as one batch: (latents (B, C, H, W) float32, class_labels (B,) or None)."""
    streams, noise, class_labels = draw_inputs(seeds, net, device, class_idx)
    model = guided(net, config.cfg_scale, config.cfg_interval)
    with autocast(config.amp, device):
        latents = build_sampler(config)(model, noise, class_labels, randn_like=streams.randn_like, progress=progress)
    return latents.float(), class_labels


def batches_of(seeds, batch_size):
    """The fixed global batches of a list of seeds, and which of them are this process's: [(index, seeds), ...]."""
    return [(k, batch) for k, batch in enumerate(_split(seeds, batch_size)) if k % distributed.world_size() == distributed.rank()]


def generate(net, decode, seeds, config, device, class_idx=(), progress=None, done=None):
    """Yield this process's `Batch`es of the seeds, in order; those of which done(seeds) is true are passed over.

    net: EDMPrecond in eval mode. decode: latents (B, C, h, w) -> images (B, H, W, 3) uint8; None leaves images None.
    config: SampleConfig. progress: called with 1 after every sampler step.
    """
    for index, batch in batches_of(seeds, config.batchsize):
        if done is not None and done(batch):
            continue
        latents, class_labels = sample_latents(net, batch, config, device, class_idx, progress)
        images = decode(latents) if decode is not None else None
        yield Batch(index, batch, class_labels, latents, images)


def image_decoder(vae_config, in_channels, device):
    """decode(latents (B, C, h, w) scaled) -> images (B, H, W, 3) uint8 numpy, by the autoencoder of a VAEConfig.

    in_channels: those of the network. Raises FileNotFoundError or ValueError if the autoencoder cannot be loaded or has others.
    """
    autoencoder = load_autoencoder(vae_config.path, device)
    if autoencoder.latent_channels != in_channels:
        raise UserError(f"vae.path={vae_config.path} decodes {autoencoder.latent_channels} latent channels, the model makes "
                        f"{in_channels}; give the autoencoder that its latents were made with")
    autoencoder.decode_batch = vae_config.batchsize

    def decode(latents):
        with autocast(vae_config.amp, device):
            images = autoencoder.decode(latents.to(device))
        return np.asarray(to_uint8(images).cpu())

    return decode


def draw_grid(net, decode, config, device, path, class_names=None):
    """Save a picture of samples of seeds 0, 1, ... at `path`, one class per row; returns it as (H, W, 3) uint8.

    config: Config; log.num_grid_images says how many. Models of up to 16 classes show all, others evenly spaced ones.
    """
    count, num_classes = config.log.num_grid_images, net.num_classes
    rows = num_classes if 0 < num_classes <= 16 else math.isqrt(count)
    columns = max(1, count // rows)
    classes = [num_classes * row // rows for row in range(rows)]
    labels = [name_of_class(c, class_names) for c in classes] if num_classes else None
    class_idx = [c for c in classes for _ in range(columns)] if num_classes else ()
    latents = [sample_latents(net, batch, config.sample, device, class_idx)[0]
               for batch in _split(list(range(rows * columns)), config.sample.batchsize)]
    images = np.concatenate([decode(part) for part in latents])
    return save_grid(path, images, labels=labels, columns=columns)


def draw_class_rows(path, images, class_labels, class_names=None, columns=8):
    """Save a picture with one row per class: the first `columns` images (N, H, W, 3) uint8 of each, white where there are fewer."""
    classes = sorted(set(class_labels))
    rows = np.full((len(classes), columns, *images.shape[1:]), 255, np.uint8)
    for row, index in zip(rows, classes):
        chosen = images[[label == index for label in class_labels]][:columns]
        row[:len(chosen)] = chosen
    save_grid(path, rows.reshape(-1, *images.shape[1:]), labels=[name_of_class(index, class_names) for index in classes],
              columns=columns)


def grid_scale(images):
    """How many times small images (N, H, W, 3) are enlarged in a picture, so that they can be seen."""
    return max(1, 64 // images.shape[1])


def name_of_class(index, class_names=None):
    return class_names[index] if class_names else f"class {index}"


def latents_to_uint8(latents):
    """A rough look at latents without an autoencoder: the first three channels, +-2 over the grey scale. (B, H, W, 3) uint8."""
    channels = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1].expand(-1, 3, -1, -1)
    return np.asarray(to_uint8((channels / 2).clamp(-1, 1).cpu()))
