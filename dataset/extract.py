"""Encode images with a VAE into stored latents. Threads decode ahead, one thread writes behind.

What is written depends on the plan alone: image numbers decide shards and batches, whatever was already there and however
many processes share the work.
"""

import contextlib
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from utils import distributed
from dataset.images import CorruptImage
from dataset.store import LatentWriter, Plan
from utils.cli import UserError
from utils.logging import Progress, say


class Tally:
    """Where the time of one process went, in seconds by name. bad: [(name, error)] of the images that cannot be read."""

    def __init__(self):
        self.seconds = {"waiting for images": 0.0, "VAE": 0.0, "waiting for the disk": 0.0}
        self.num_images = 0
        self.bad = []
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def timed(self, name):
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    def summary(self):
        """'1,000 images in 12s, 83.1 images/s: VAE 97%, ...'"""
        total = max(time.perf_counter() - self.started, 1e-9)
        shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in self.seconds.items())
        return (f"{self.num_images:,} images in {Progress.format_interval(total)}, {self.num_images / total:.4g} images/s "
                f"in this process: {shares}")


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
    Returns (manifest, Tally of this process). Shards with images that cannot be read are left out unless skip_bad, the
    others are kept; the manifest is then None on every process.
    """
    if distributed.is_main():
        LatentWriter(dest, plan)  # begins the set; the others find it begun
    distributed.barrier()
    writer = LatentWriter(dest, plan)
    pending = distributed.broadcast_object(writer.pending())
    if len(pending) < plan.num_shards:
        say(f"{dest}: {plan.num_shards - len(pending)} of {plan.num_shards} shards are there already")
    mine = pending[distributed.rank()::distributed.world_size()]
    tally = Tally()
    _encode_shards(images, vae, writer, mine, skip_bad, num_workers or _num_cores(), tally)
    if distributed.any_rank(bool(tally.bad) and not skip_bad):
        return None, tally
    manifest = writer.finish() if distributed.is_main() else None
    return distributed.broadcast_object(manifest), tally


def _num_cores():
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _encode_shards(images, vae, writer, shards, skip_bad, num_workers, tally):
    plan, world_size = writer.plan, distributed.world_size()
    batches = [batch for shard in shards for batch in _batches(plan, shard)]
    title = f"encoding (1 of {world_size} processes)" if world_size > 1 else "encoding"
    with (ThreadPoolExecutor(num_workers, "decode") as readers, ThreadPoolExecutor(1, "write") as disk,
          Progress(sum(map(len, batches)), title, "images") as progress):
        decoded = _decode_ahead(images, batches, readers, depth=num_workers + 1)
        writing = None
        for shard in shards:
            content = _encode_shard(decoded, shard, vae, plan, skip_bad, tally, progress)
            with tally.timed("waiting for the disk"):
                if writing is not None:
                    writing.result()  # at most one shard waits to be written
            writing = disk.submit(writer.write, shard, *content) if content else None
        with tally.timed("waiting for the disk"):
            if writing is not None:
                writing.result()


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


def _encode_shard(decoded, shard, vae, plan, skip_bad, tally, progress):
    """What `LatentWriter.write` takes after the shard's number, or None if there are bad images that may not be skipped."""
    moments, mirrored, labels, bad = [], [], [], []
    for batch in _batches(plan, shard):
        with tally.timed("waiting for images"):
            pixels, batch_labels, batch_bad = next(decoded)
        bad += batch_bad
        labels += batch_labels
        if len(pixels) and (skip_bad or not bad):  # a shard that stays unwritten is only searched for more bad images
            with tally.timed("VAE"):
                moments.append(_encode(vae, pixels, plan.dtype))
                if plan.mirrored:
                    mirrored.append(_encode(vae, pixels[..., ::-1].copy(), plan.dtype))
        tally.num_images += len(pixels)
        progress.update(len(batch))
    tally.bad += bad
    if bad and not skip_bad:
        return None
    empty = [np.empty((0, *plan.sample_shape), plan.dtype)]
    return (np.concatenate(moments or empty), np.array(labels, np.int64),
            np.concatenate(mirrored or empty) if plan.mirrored else None, [name for name, _ in bad])


def _encode(vae, pixels, dtype):
    """pixels (n, 3, R, R) uint8 -> moments (n, 2C, h, w) in the stored type."""
    weight = next(vae.parameters())
    images = torch.from_numpy(pixels).to(weight.device).to(torch.float32, memory_format=torch.channels_last)
    return vae.encode_moments(images / 127.5 - 1).to(getattr(torch, dtype)).cpu().numpy()
