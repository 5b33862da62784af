"""Sets of random moments for the tests of dataset.store, dataset.formats and dataset.convert."""

import numpy as np

from dataset.store import LatentWriter, Plan

NUM_IMAGES, SHAPE, NUM_CLASSES = 11, (8, 3, 3), 3


def random_moments(dtype=np.float32, shape=SHAPE):
    """Moments (11, *shape), mirrored moments, labels (11,)."""
    rng = np.random.default_rng(0)
    moments, mirrored = rng.standard_normal((2, NUM_IMAGES, *shape)).astype(dtype)
    return moments, mirrored, np.array([2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 2])


def make_plan(**changes):
    return Plan(**{"num_images": NUM_IMAGES, "sample_shape": SHAPE, "dtype": "float32", "mirrored": True, "num_classes": NUM_CLASSES,
                   "class_names": ("ant", "bee", "cat"), "scale": 0.25, "shift": 0.5, "vae": "some/vae", "shard_size": 4,
                   "vae_digest": "0123456789abcdef", **changes})


def write_shards(writer, shards=None):
    """Write random moments into these shards (None: all that are missing)."""
    moments, mirrored, labels = random_moments(writer.plan.dtype)
    for shard in writer.pending() if shards is None else shards:
        part = list(writer.plan.shards[shard])
        writer.write(shard, moments[part], labels[part], mirrored[part] if writer.plan.mirrored else None)


def write_set(path, **changes):
    """A complete set in the own format; returns the path."""
    writer = LatentWriter(path, make_plan(**changes))
    write_shards(writer)
    writer.finish()
    return path


def tree(path):
    """{name: bytes} of all files below `path`."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
