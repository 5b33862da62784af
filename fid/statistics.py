"""Features of one image set: collected over batches and processes, their mean and covariance, and the files that hold these."""

import numpy as np
import torch
from torch.nn import functional as F

from dataset.base import open_npz, read_npz
from fid.sources import batches
from utils import distributed
from utils.cli import UserError
from utils.files import told, write_whole
from utils.logging import Progress

SETTINGS = ("embedding", "weights_sha256", "resize", "conversion", "num_images", "software")
SUFFIX_OF = {"pool": "", "spatial": "_s"}  # of the keys in ADM's files


class RunningStatistics:
    """Float64 sums of features (B, d) over batches and processes; the mean and the covariance (ddof 1) at the end."""

    def __init__(self, dim, device="cpu"):
        self.products = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)

    def add(self, features):
        ones_first = F.pad(features.double(), (1, 0), value=1)  # so that their products hold the count and the sums, too
        self.products.addmm_(ones_first.T, ones_first)

    def gaussian(self):
        """(mu (d,), sigma (d, d)) float64 of all processes' features; every process has to call."""
        products = distributed.all_reduce_sum(self.products.clone())
        count, mu = products[0, 0], products[0, 1:] / products[0, 0]
        sigma = (products[1:, 1:] - count * torch.outer(mu, mu)) / (count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


class FeatureStream:
    """Features of one image set, collected batch by batch. Batches are numbered 0, 1, 2, ... over all processes."""

    def __init__(self, embedding):
        self.embedding = embedding
        self.running = {tap: RunningStatistics(dim, embedding.device) for tap, dim in embedding.dims.items()}
        self.kept = {}         # batch_index -> pooled features (n, d)
        self.counts = []       # (batch_index, images in it)
        self.image_size = None

    def add(self, images, batch_index, keep):
        """images: (B, H, W, 3) uint8; keep: the images whose pooled features are kept, bool (B,) or one for all."""
        taps = self.embedding.taps(images)
        if not taps["pool"].isfinite().all():
            raise UserError(f"{self.embedding.name}: features of batch {batch_index} hold NaN or infinity; its weights are damaged, "
                            "get them anew")
        self.image_size = list(images.shape[1:3])
        self.counts.append((batch_index, len(images)))
        for tap, features in taps.items():
            self.running[tap].add(features)
        self.kept[batch_index] = taps["pool"][torch.as_tensor(keep).expand(len(images))]

    def add_source(self, source, batch_size, what, keep, positions=None):
        """Add this process's share of an image set, with progress under the name `what`.

        keep: bool (N,) over the set, or one for all. positions: of the images to add, ascending (M,); None adds all.
        """
        positions = np.arange(len(source)) if positions is None else positions
        with Progress(len(positions), what, "images") as progress:
            for index, rows, images in batches(source, batch_size, positions):
                self.add(images, index, np.broadcast_to(keep, len(source))[rows])
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
        """{tap: (mu, sigma)} over all processes."""
        return {tap: running.gaussian() for tap, running in self.running.items()}

    def pool(self):
        """The kept features (N, d) in the order of the batches, on every process."""
        parts = distributed.all_gather_object({index: rows.cpu() for index, rows in self.kept.items()})
        kept = {index: rows for part in parts for index, rows in part.items()}
        return torch.cat([kept[index] for index in sorted(kept)]).to(self.embedding.device)


def load_statistics(path):
    """Read an ADM batch, an EDM reference or our own file.

    Returns ({"pool": (mu, sigma) and, if the file serves sFID, "spatial": likewise}, settings, which may be empty); (None, None) if
    the file holds no mu.
    """
    with open_npz(path) as file:
        if "mu" not in file or "sigma" not in file:
            return None, None
        gaussians = {tap: _read_gaussian(path, file, f"mu{suffix}", f"sigma{suffix}") for tap, suffix in SUFFIX_OF.items()
                     if f"mu{suffix}" in file and f"sigma{suffix}" in file}
        return gaussians, {key: read_npz(path, file, key).tolist() for key in SETTINGS if key in file}


def _read_gaussian(path, file, mu_key, sigma_key):
    mu, sigma = (read_npz(path, file, key) for key in (mu_key, sigma_key))
    floats = mu.dtype.kind == sigma.dtype.kind == "f" and np.isfinite(mu).all() and np.isfinite(sigma).all()
    if not floats or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: {mu_key} is {mu.dtype} {mu.shape} and {sigma_key} {sigma.dtype} {sigma.shape}, wanted floats (d,) "
                        "and (d, d) without NaN and infinity; make the file anew with `python -m fid ref`")
    return mu.astype(np.float64), sigma.astype(np.float64)


def save_statistics(path, gaussians, settings, images=None):
    """Write ADM's keys (mu, sigma, mu_s, sigma_s and, if images (N, H, W, 3) uint8 are given, arr_0) plus the settings."""
    arrays = {key: np.array(settings[key]) for key in SETTINGS if settings.get(key) is not None}
    for tap, (mu, sigma) in gaussians.items():
        arrays |= {f"mu{SUFFIX_OF[tap]}": mu, f"sigma{SUFFIX_OF[tap]}": sigma}
    if images is not None:
        arrays["arr_0"] = images
    with told(path), write_whole(path) as temporary, open(temporary, "wb") as file:  # given a name, numpy would append .npz to it
        np.savez(file, **arrays)
