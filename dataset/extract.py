"""Encode images with a VAE into stored latents. Threads decode ahead.

What is written depends on the plan alone: image numbers decide shards and batches, whatever was already there and however
many processes share the work.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from utils import distributed
from dataset.images import CorruptImage
from dataset.store import LatentWriter, Plan
from utils.cli import UserError
from utils.logging import Progress, say


def make_plan(images, vae, vae_name, vae_dtype, first, num_images, batch_size, dtype, shard_size):
    """The `Plan` of encoding images first .. first+num_images-1 with the `Autoencoder` vae.

    vae_dtype, dtype: names of the types of the VAE's arithmetic and of the stored moments.
    num_images: None takes all from `first` on. Raises UserError if the range or the resolution does not fit.
    """
    if not 0 <= first < images.num_images:
        raise UserError(f"--first {first}: {images.name} has {images.num_images} images, numbered 0 to {images.num_images - 1}")
    rest = images.num_images - first
    num_images = rest if num_images is None else num_images
    if not 1 <= num_images <= rest:
        raise UserError(f"--num_images {num_images}: from --first {first} on, {images.name} has {rest} images")
    if batch_size < 1:
        raise UserError(f"--batch {batch_size} must be at least 1")
    if images.resolution % vae.downsample:
        raise UserError(f"--resolution {images.resolution} must be a multiple of {vae.downsample}, the VAE's reduction")
    size = images.resolution // vae.downsample
    made_by = {"program": "extract_latent", "images": images.path.name, "images_sha256": images.fingerprint(), "first": first,
               "resolution": images.resolution, "batch": batch_size, "vae_dtype": vae_dtype}
    return Plan(num_images, (2 * vae.latent_channels, size, size), dtype, images.mirrored, images.num_classes,
                tuple(images.class_names), vae.scale, vae.shift, vae_name, shard_size, made_by, vae.digest)


def extract(images, vae, dest, plan, skip_bad=False, num_workers=None):
    """Encode what is still missing of the set at `dest`, each process its share of the shards.

    num_workers: threads that decode images (None: one for each processor core of this process).
    Returns (manifest, [(name, error)] of this process's images that cannot be read). Shards with such images are left out unless
    skip_bad, the others are kept; the manifest is then None on every process.
    """
    if distributed.is_main():
        LatentWriter(dest, plan)  # begins the set; the others find it begun
    distributed.barrier()
    writer = LatentWriter(dest, plan)
    pending = distributed.broadcast_object(writer.pending())
    if len(pending) < plan.num_shards:
        say(f"{dest}: {plan.num_shards - len(pending)} of {plan.num_shards} shards are there already")
    shards, world_size = pending[distributed.rank()::distributed.world_size()], distributed.world_size()
    batches = [batch for shard in shards for batch in _batches(plan, shard)]
    num_workers = num_workers or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    title, bad = f"encoding (1 of {world_size} processes)" if world_size > 1 else "encoding", []
    with ThreadPoolExecutor(num_workers, "decode") as readers, Progress(sum(map(len, batches)), title, "images") as progress:
        decoded = _decode_ahead(images, batches, readers, depth=num_workers + 1)
        for shard in shards:
            content, shard_bad = _encode_shard(decoded, shard, vae, plan, skip_bad, progress)
            bad += shard_bad
            if content:
                writer.write(shard, *content)
    if distributed.any_rank(bool(bad) and not skip_bad):
        return None, bad
    manifest = writer.finish() if distributed.is_main() else None
    return distributed.broadcast_object(manifest), bad


def _batches(plan, shard):
    """The image numbers of a shard, batch by batch."""
    numbers = range(plan.made_by["first"], plan.made_by["first"] + plan.num_images)
    shard_numbers = numbers[shard * plan.shard_size:(shard + 1) * plan.shard_size]
    size = plan.made_by["batch"]
    return [shard_numbers[begin:begin + size] for begin in range(0, len(shard_numbers), size)]


def _decode_ahead(images, batches, readers, depth):
    """Yield `_decode` of each batch in turn while threads work on the next `depth`."""
    batches, pending = iter(batches), deque()
    for batch in batches:
        pending.append(readers.submit(_decode, images, batch))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _decode(images, indices):
    """(pixels (n, 3, R, R) uint8, labels (n,), [(name, error)] of the images left out)."""
    pixels, labels, bad = [], [], []
    for index in indices:
        try:
            pixels.append(images.image(index))
            labels.append(images.labels[index])
        except CorruptImage as error:
            bad.append((images.names[index], str(error)))
    return np.stack(pixels) if pixels else np.empty((0, *images.sample_shape), np.uint8), labels, bad


def _encode_shard(decoded, shard, vae, plan, skip_bad, progress):
    """(what `LatentWriter.write` takes after the shard's number, None if bad images may not be skipped; the bad images)."""
    empty = np.empty((0, *plan.sample_shape), plan.dtype)
    moments, mirrored, labels, bad = [empty], [empty], [], []
    for batch in _batches(plan, shard):
        pixels, batch_labels, batch_bad = next(decoded)
        bad += batch_bad
        labels += batch_labels
        if len(pixels) and (skip_bad or not bad):  # a shard that stays unwritten is only searched for more bad images
            moments.append(_encode(vae, pixels, plan.dtype))
            if plan.mirrored:
                mirrored.append(_encode(vae, pixels[..., ::-1].copy(), plan.dtype))
        progress.update(len(batch))
    if bad and not skip_bad:
        return None, bad
    return (np.concatenate(moments), np.array(labels, np.int64), np.concatenate(mirrored) if plan.mirrored else None,
            [name for name, _ in bad]), bad


def _encode(vae, pixels, dtype):
    """pixels (n, 3, R, R) uint8 -> moments (n, 2C, h, w) in the stored type."""
    weight = next(vae.parameters())
    images = torch.from_numpy(pixels).to(weight.device).to(torch.float32, memory_format=torch.channels_last)
    return vae.encode_moments(images / 127.5 - 1).to(getattr(torch, dtype)).cpu().numpy()
