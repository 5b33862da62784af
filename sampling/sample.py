"""From seeds to images: noise and class of each seed, guided sampling, decoding, grids.

An image depends on its seed alone: everything it draws comes from its own generator, on the CPU, in this order: latent noise,
class (when none is asked for), churn noise. Batch size and process count change only the order of sums inside matrix products.
"""

import dataclasses
import functools
import inspect
import math
from typing import NamedTuple

import numpy as np
import torch

from models import SAMPLERS, guided, load_autoencoder
from sampling.load import fit_decoder, some_of
from utils import distributed
from utils.cli import UserError
from utils.images import save_grid, to_uint8
from utils.logging import say
from utils.precision import arithmetic
from utils.schema import SampleConfig

CHOICES = ("solver", "discretization", "schedule", "scaling")  # setting one of them chooses the ablation sampler
MOST_ROWS = 16  # classes that a grid shows


# ------------------------------------------------------------------------------------------------ seeds

class SeedStreams:
    """One random generator per image seed (`seed % 2^32`), on the CPU, so that every device sees the same numbers."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(int(seed) % 2**32) for seed in seeds]

    def randn_like(self, x):
        """Unit normal like x (B, ...), one draw per seed: what samplers ask for."""
        return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in self.generators]).to(x.device)

    def randint(self, high):
        """(B,) int64 in [0, high), one draw per seed, on the CPU."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self.generators])


def draw_inputs(seeds, net, device, class_idx=()):
    """What each seed fixes: its streams, latent noise (B, C, H, W) and class labels (B,) (None for a net without classes).

    class_idx: the classes asked for; seed s gets class_idx[s % len(class_idx)]. Empty: each seed draws its own class.
    """
    streams = SeedStreams(seeds)
    noise = streams.randn_like(torch.empty(len(seeds), net.in_channels, net.in_size, net.in_size, device=device))
    if not net.num_classes:
        return streams, noise, None
    asked = torch.tensor([class_idx[seed % len(class_idx)] for seed in seeds]) if class_idx else streams.randint(net.num_classes)
    return streams, noise, asked.to(device)


def classes_of(seeds, net, class_idx=()):
    """The class of each seed, as a list, or None for a net without classes."""
    return [int(draw_inputs([seed], net, "cpu", class_idx)[2]) for seed in seeds] if net.num_classes else None


def batches_of(seeds, batch_size):
    """[(index, seeds), ...]: this process's share of the batches of all seeds, batch k on rank k mod the number of processes."""
    batches = [seeds[i:i + batch_size] for i in range(0, len(seeds), batch_size)]
    return list(enumerate(batches))[distributed.rank()::distributed.world_size()]


# ------------------------------------------------------------------------------------------------ sampling

def build_sampler(config):
    """SampleConfig -> sampler(model, noise, class_labels, randn_like=..., progress=...) with every option bound.

    Raises UserError for a sampler that SAMPLERS lacks, and for an option that is set but that the sampler does not take.
    """
    name = config.sampler or ("ablation" if any(getattr(config, key) is not None for key in CHOICES) else "edm")
    if name not in SAMPLERS:
        raise UserError(f"sample.sampler={name!r} is unknown; wanted one of {', '.join(SAMPLERS)}, or null")
    taken = {sampler: inspect.signature(function).parameters for sampler, function in SAMPLERS.items()}
    known = set().union(*taken.values())
    options = dict(config.options)
    for field in dataclasses.fields(SampleConfig):
        value = getattr(config, field.name)
        if field.name in known and (value != field.default or field.name in taken[name] and value is not None):
            options[field.name] = value
    for key, value in options.items():
        if key not in taken[name]:
            others = [sampler for sampler in SAMPLERS if key in taken[sampler]]
            raise UserError(f"sample.{'options.' * (key in config.options)}{key}={value} is not an option of the sampler {name}, "
                            + (f"but of {' and '.join(others)} (sample.sampler={others[0]})" if others else "nor of any other"))
    return functools.partial(SAMPLERS[name], **options)


def check_sampler(config):
    """Raise UserError, before any work, for a SampleConfig that cannot be sampled with: samplers check their options when called."""
    sampler = build_sampler(config)
    try:
        sampler(lambda x, sigma, class_labels: x, torch.zeros(0, 1, 1, 1), randn_like=torch.zeros_like)
    except ArithmeticError as error:
        raise UserError(f"the sampler's options lead to numbers out of range ({error}); give values nearer to the defaults") from error
    except TypeError as error:
        if not config.options:
            raise
        raise UserError(f"sample.options={config.options}: {error}") from error


@torch.no_grad()
def sample_latents(net, seeds, config, device, class_idx=(), progress=None):
    """Sample the latents of some seeds as one batch: (latents (B, C, H, W) float32, class_labels (B,) or None)."""
    streams, noise, class_labels = draw_inputs(seeds, net, device, class_idx)
    model = guided(net, config.cfg_scale if net.num_classes else 1, config.cfg_interval)
    with arithmetic(device, config.amp, config.tf32):
        latents = build_sampler(config)(model, noise, class_labels, randn_like=streams.randn_like, progress=progress)
    return latents.float(), class_labels


class Batch(NamedTuple):
    """Samples of one batch of seeds. bad_seeds: those whose latents or image have NaN or Inf."""

    index: int
    seeds: list
    class_labels: torch.Tensor | None  # (B,)
    latents: torch.Tensor              # (B, C, H, W) float32
    images: np.ndarray | None          # (B, H, W, 3) uint8
    bad_seeds: list


def generate(net, decode, seeds, config, device, class_idx=(), progress=None):
    """Yield this process's `Batch`es of the seeds, in order.

    net: EDMPrecond in eval mode. decode: see `image_decoder`; None leaves images None. config: SampleConfig.
    progress: called with 1 after every sampler step.
    """
    for index, batch in batches_of(seeds, config.batchsize):
        latents, class_labels = sample_latents(net, batch, config, device, class_idx, progress)
        images, finite = decode(latents) if decode is not None else (None, finite_rows(latents))
        yield Batch(index, batch, class_labels, latents, images, np.array(batch)[~finite].tolist())


def finite_rows(values):
    """(B,) bool numpy: which rows of a tensor (B, ...) have no NaN and no Inf."""
    return values.isfinite().flatten(1).all(dim=1).cpu().numpy()


def image_decoder(vae_config, in_channels, device, latents=None, whose=""):
    """decode(latents (B, C, h, w)) -> (images (B, H, W, 3) uint8, finite (B,) bool), both numpy, by the autoencoder of a VAEConfig.

    in_channels: those of the network. latents, whose: see `fit_decoder`. decode.digest names the autoencoder.
    Raises UserError if it cannot be loaded or does not fit.
    """
    autoencoder = load_autoencoder(vae_config.path, device)
    if autoencoder.latent_channels != in_channels:
        raise UserError(f"vae.path={vae_config.path} decodes {autoencoder.latent_channels} latent channels, the model makes "
                        f"{in_channels}; give the autoencoder that its latents were made with")
    fit_decoder(autoencoder, latents or {}, whose, vae_config.path)
    autoencoder.decode_batch = vae_config.batchsize

    def decode(latents):
        with arithmetic(device, vae_config.amp):
            images = autoencoder.decode(latents.to(device))
        # the image too: half precision overflows in some autoencoders
        return to_uint8(images).cpu().numpy(), finite_rows(images) & finite_rows(latents)

    decode.digest = autoencoder.digest
    return decode


def latents_to_uint8(latents):
    """A rough look at latents without an autoencoder, called like `decode`: the first three channels, +-2 over the grey scale."""
    channels = latents[:, :3] if latents.shape[1] >= 3 else latents[:, :1].expand(-1, 3, -1, -1)
    return to_uint8(channels / 2).cpu().numpy(), finite_rows(latents)


# ------------------------------------------------------------------------------------------------ grids

def draw_grid(net, decode, config, device, path, class_names=None):
    """Save a picture of samples of seeds 0, 1, ... at `path`, one class per row; returns it as (H, W, 3) uint8.

    config: Config; log.num_grid_images says how many. Models with few classes show all of them, others evenly spaced ones.
    """
    count, num_classes = config.log.num_grid_images, net.num_classes
    rows = num_classes if 0 < num_classes <= MOST_ROWS else min(math.isqrt(count), MOST_ROWS)
    columns = max(1, count // rows)
    class_idx = [num_classes * row // rows for row in range(rows) for _ in range(columns)] if num_classes else ()
    seeds, size = list(range(rows * columns)), config.sample.batchsize
    parts = [decode(sample_latents(net, seeds[i:i + size], config.sample, device, class_idx)[0]) for i in range(0, len(seeds), size)]
    images, finite = map(np.concatenate, zip(*parts))
    if not finite.all():
        say(f"WARNING: sample grid: {describe_bad(np.array(seeds)[~finite].tolist(), len(seeds))}")
    return save_by_class(path, images, class_idx, class_names)


def save_by_class(path, images, class_labels, class_names=None):
    """Save images (N, H, W, 3) uint8, a row for each class, all rows of the same length; many classes or none: as they come."""
    class_labels = np.array(class_labels)
    classes, counts = np.unique(class_labels, return_counts=True)
    if not 0 < len(classes) <= MOST_ROWS:
        return save_grid(path, images)
    images = np.concatenate([images[class_labels == index][:counts.min()] for index in classes])
    return save_grid(path, images, labels=[class_name(index, class_names) for index in classes])


def class_name(index, class_names=None):
    return class_names[index] if class_names else f"class {index}"


def describe_bad(seeds, count):
    """Words about the seeds, of `count`, whose images have NaN or Inf."""
    return f"{len(seeds)} of {count} images have NaN or Inf: seeds {some_of([str(seed) for seed in sorted(seeds)], 20)}"
