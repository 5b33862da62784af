"""A picture of samples beside the real images nearest to them in feature space, to see memorisation."""

import numpy as np

from fid import metrics
from utils.cli import UserError


def closest_pairs(sample_pool, reference_pool, num_samples=8, num_neighbours=5):
    """The samples that lie closest to a real image for how far real images lie apart there, the suspicious ones first.

    Returns sample indices (S,), reference indices (S, K) nearest first, and (S,) ratios: the sample's distance to its nearest
    real image over that image's distance to the next real one. A copy has ratio 0; samples as new as real ones have about 1.
    """
    distances, indices = metrics.nearest_neighbours(sample_pool, reference_pool, num_neighbours)
    apart = metrics.neighbour_radii(reference_pool, 1).sqrt()[indices[:, 0]]
    ratios = distances[:, 0] / apart.clamp(min=1e-12)
    rows = ratios.argsort(stable=True)[:num_samples]
    return rows.cpu().numpy(), indices[rows].cpu().numpy(), ratios[rows].cpu().numpy()


def save_neighbours(path, samples, sample_pool, reference, num_samples=8, num_neighbours=5):
    """Save a grid: on each row one sample, then its nearest real images.

    samples: image source; sample_pool (N, d): its features; reference: a prepared fid.evaluate.Reference with features.
    Raises ValueError if samples and reference images differ in size.
    """
    from utils.images import save_grid
    rows, indices, ratios = closest_pairs(sample_pool, reference.pool, num_samples, num_neighbours)
    images = [np.concatenate([samples.read(np.array([row])), reference.images.read(reference.positions[near])])
              for row, near in zip(rows, indices)]
    save_grid(path, np.concatenate(images), labels=[f"{ratio:.2f}" for ratio in ratios], columns=1 + indices.shape[1],
              column_labels=["sample"] + ["real"] * indices.shape[1],
              title="Nearest real images (0 = copied, about 1 = as new as real images)")


def check_same_size(samples, reference):
    """Raise ValueError if a picture of both cannot be made."""
    if reference.images is None:
        raise UserError(f"--neighbours needs reference images and {reference.name} holds statistics only (no arr_0); "
                        "give an ADM batch or an image set")
    first, second = (source.read(np.array([0])).shape[1:3] for source in (samples, reference.images))
    if first != second:
        raise UserError(f"--neighbours shows both side by side, but samples are {first} and reference images {second}; "
                        "give reference images of the samples' size")
