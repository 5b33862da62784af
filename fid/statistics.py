"""The features of an image set, collected over batches and processes, and the files that hold their mean and covariance."""

import numpy as np
import torch

from dataset.base import open_npz, read_npz
from fid.metrics import mean_and_covariance, products_of
from fid.sources import batches
from utils import distributed
from utils.cli import UserError
from utils.files import told, write_whole
from utils.logging import Progress

SETTINGS = ("embedding", "weights_sha256", "resize", "conversion", "num_images", "software")
SUFFIX_OF = {"pool": "", "spatial": "_s"}  # of the keys in ADM's files


class FeatureStream:
    """Collects the features of one image set. Its batches are numbered 0, 1, 2, ... over all processes."""

    def __init__(self, embedding):
        self.embedding = embedding
        self.products = {tap: torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=embedding.device)
                         for tap, dim in embedding.dims.items()}
        self.kept = {}    # batch_index -> pooled features (n, d)
        self.counts = []  # (batch_index, images in it)
        self.image_size = None

    def add(self, images, batch_index, keep):
        """images: (B, H, W, 3) uint8. keep: whether `pool` will need their features."""
        taps = self.embedding.taps(images)
        if not taps["pool"].isfinite().all():
            raise UserError(f"{self.embedding.name}: features of batch {batch_index} hold NaN or infinity; its weights are damaged, "
                            "get them anew")
        self.image_size = list(images.shape[1:3])
        self.counts.append((batch_index, len(images)))
        for tap, features in taps.items():
            self.products[tap] += products_of(features)
        if keep:
            self.kept[batch_index] = taps["pool"]

    def add_source(self, source, batch_size, what, keep, positions=None):
        """Add this process's share of an image set, with progress under the name `what`. positions: of the images, (M,); None: all."""
        positions = np.arange(len(source)) if positions is None else positions
        with Progress(len(positions), what, "images") as progress:
            for index, images in batches(source, batch_size, positions):
                self.add(images, index, keep)
                progress.update(min(len(images) * distributed.world_size(), progress.total - progress.n))  # all are about as far

    def count(self):
        """Number of images over all processes, each of which has to call. Raises ValueError if a batch is missing."""
        counts = sorted(sum(distributed.all_gather_object(self.counts), []))
        given = [index for index, _ in counts]
        if given != list(range(len(given))):
            raise ValueError(f"batches {given[:20]} over all processes, wanted each of 0, 1, 2, ... once; "
                             "give batch k to rank k mod the number of processes")
        return sum(count for _, count in counts)

    def gaussians(self):
        """{tap: (mu (d,), sigma (d, d))} of all processes' features; every process has to call."""
        return {tap: mean_and_covariance(distributed.all_reduce_sum(products.clone())) for tap, products in self.products.items()}

    def pool(self):
        """The kept features (N, d) in the order of the batches, on every process; () if there are none."""
        parts = distributed.all_gather_object({index: rows.cpu() for index, rows in self.kept.items()})
        kept = {index: rows for part in parts for index, rows in part.items()}
        return torch.cat([kept[index] for index in sorted(kept)]).to(self.embedding.device) if kept else ()


def load_statistics(path):
    """({tap: (mu, sigma)}, settings) of an ADM batch, an EDM reference or our own file; either is empty if the file holds none."""
    with open_npz(path) as file:
        settings = {key: read_npz(path, file, key).tolist() for key in SETTINGS if key in file}
        found = {tap: [read_npz(path, file, f"{name}{suffix}") for name in ("mu", "sigma")]
                 for tap, suffix in SUFFIX_OF.items() if f"mu{suffix}" in file and f"sigma{suffix}" in file}
    for mu, sigma in found.values():
        floats = mu.dtype.kind == sigma.dtype.kind == "f" and np.isfinite(mu).all() and np.isfinite(sigma).all()
        if not floats or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(f"{path}: mu is {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape}, wanted floats (d,) and (d, d) "
                            "without NaN and infinity; make the file anew with `python -m fid ref`")
    return {tap: (mu.astype(np.float64), sigma.astype(np.float64)) for tap, (mu, sigma) in found.items()}, settings


def save_statistics(path, gaussians, settings, images=()):
    """Write ADM's keys and the settings. images (N, H, W, 3) uint8, if there are any, become arr_0."""
    arrays = {key: np.array(settings[key]) for key in SETTINGS if settings.get(key) is not None}
    for tap, (mu, sigma) in gaussians.items():
        arrays |= {f"mu{SUFFIX_OF[tap]}": mu, f"sigma{SUFFIX_OF[tap]}": sigma}
    if len(images):
        arrays["arr_0"] = images
    with told(path), write_whole(path) as temporary, open(temporary, "wb") as file:  # given a name, numpy would append .npz to it
        np.savez(file, **arrays)
