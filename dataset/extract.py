"""Encode images with a VAE into stored latents.

What is written depends on the plan alone, whatever was already there and however many processes share the work.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from utils import distributed
from dataset.images import CorruptImage
from dataset.store import LatentWriter, Plan
from dataset.stream import read_ahead
from utils.cli import UserError
from utils.logging import Progress, say


def make_plan(images, vae, vae_name, vae_dtype, first, num_images, batch_size, dtype, shard_size):
    """The `Plan` of encoding num_images (None: all) images from number `first` on with the `Autoencoder` vae.

    vae_dtype, dtype: names of the types of the VAE's arithmetic and of the stored moments.
    """
    wish = f"--first {first}" if num_images is None else f"--first {first} --num_images {num_images}"
    num_images = images.num_images - first if num_images is None else num_images
    if not 0 <= first < first + num_images <= images.num_images:
        raise UserError(f"{wish}: {images.name} has {images.num_images} images, numbered 0 to {images.num_images - 1}")
    if batch_size < 1:
        raise UserError(f"--batch {batch_size} must be at least 1")
    if images.resolution % vae.downsample:
        raise UserError(f"--resolution {images.resolution} must be a multiple of {vae.downsample}, the VAE's reduction")
    size = images.resolution // vae.downsample
    made_by = {"program": "extract_latent", "images": images.path.name, "images_sha256": images.fingerprint(), "first": first,
               "resolution": images.resolution, "batch": batch_size, "vae_dtype": vae_dtype}
    return Plan(num_images, (2 * vae.latent_channels, size, size), dtype, images.mirrored, images.num_classes, images.class_names,
                vae.scale, vae.shift, vae_name, shard_size, made_by, vae.digest)


def extract(images, vae, dest, plan, skip_bad=False, num_workers=None):
    """Encode what is still missing of the set at `dest`, each process its share of the shards.

    num_workers: threads that decode images ahead (None: one for each processor core of this process).
    Returns (manifest, [(name, error)] of this process's images that cannot be read). Unless skip_bad, shards with such images
    stay unwritten and the manifest is then None on every process.
    """
    if distributed.is_main():
        LatentWriter(dest, plan)  # begins the set; the others find it begun
    distributed.barrier()
    writer = LatentWriter(dest, plan)
    pending = distributed.broadcast_object(writer.pending())
    if len(pending) < len(plan.shards):
        say(f"{dest}: {len(plan.shards) - len(pending)} of {len(plan.shards)} shards are there already")
    world_size = distributed.world_size()
    batches = {shard: _batches(plan, shard) for shard in pending[distributed.rank()::world_size]}
    mine = [batch for shard in batches for batch in batches[shard]]
    num_workers = num_workers or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    title, bad = f"encoding (1 of {world_size} processes)" if world_size > 1 else "encoding", []
    with ThreadPoolExecutor(num_workers, "decode") as pool, Progress(sum(map(len, mine)), title, "images") as progress:
        decoded = read_ahead(pool, functools.partial(_decode, images), mine, num_workers + 1)
        for shard in batches:
            parts, shard_bad = [], []
            for batch in batches[shard]:
                pixels, labels, batch_bad = next(decoded)
                shard_bad += batch_bad
                if skip_bad or not shard_bad:  # a shard that stays unwritten is only searched for more bad images
                    turned = [pixels, pixels[..., ::-1]] if plan.mirrored else [pixels]
                    parts.append([labels, *(_encode(vae, each, plan) for each in turned)])
                progress.update(len(batch))
            bad += shard_bad
            if skip_bad or not shard_bad:
                labels, moments, *mirrored = map(np.concatenate, zip(*parts))
                writer.write(shard, moments, labels, *mirrored, skipped=[name for name, _ in shard_bad])
    if any(distributed.all_gather_object(bool(bad) and not skip_bad)):
        return None, bad
    manifest = writer.finish() if distributed.is_main() else None
    return distributed.broadcast_object(manifest), bad


def _batches(plan, shard):
    """The image numbers of a shard, batch by batch."""
    first, size, images = plan.made_by["first"], plan.made_by["batch"], plan.shards[shard]
    return [range(first + begin, first + min(begin + size, images.stop)) for begin in images[::size]]


def _decode(images, indices):
    """(pixels (n, 3, R, R) uint8, labels (n,), [(name, error)] of the images left out)."""
    pixels, kept, bad = [], [], []
    for index in indices:
        try:
            pixels.append(images.image(index))
            kept.append(index)
        except CorruptImage as error:
            bad.append((images.names[index], str(error)))
    return np.array(pixels, np.uint8).reshape(-1, *images.sample_shape), images.read_labels(kept), bad


def _encode(vae, pixels, plan):
    """pixels (n, 3, R, R) uint8 -> moments (n, 2C, h, w) in the stored type."""
    if not len(pixels):
        return np.empty((0, *plan.sample_shape), plan.dtype)
    weight = next(vae.parameters())
    images = torch.from_numpy(np.ascontiguousarray(pixels)).to(weight.device).to(torch.float32, memory_format=torch.channels_last)
    return vae.encode_moments(images / 127.5 - 1).to(getattr(torch, plan.dtype)).cpu().numpy()
