"""Mean and covariance of features, streamed in float64, and the files that hold them."""

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from utils import distributed
from utils.cli import UserError


class RunningStatistics:
    """Float64 sums of features (B, d) over batches and processes; the mean and the covariance (ddof 1) at the end."""

    def __init__(self, dim, device="cpu"):
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features):
        features = features.to(self.total.device, torch.float64)
        self.count += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)

    def merged(self, name):
        """The Gaussian of all processes' features; every process has to call. Raises ValueError with fewer than 2 images."""
        count = distributed.all_reduce_sum(torch.tensor([self.count], dtype=torch.float64, device=self.total.device)).item()
        total = distributed.all_reduce_sum(self.total.clone())
        outer = distributed.all_reduce_sum(self.outer.clone())
        if count < 2:
            raise UserError(f"{name}: {count:.0f} images, a covariance needs at least 2 (and an FID thousands)")
        mu = total / count
        sigma = (outer - count * torch.outer(mu, mu)) / (count - 1)
        return Gaussian(mu.cpu().numpy(), sigma.cpu().numpy(), int(count))


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """mu (d,), sigma (d, d) float64; num_images is None where the file does not say."""
    mu: np.ndarray
    sigma: np.ndarray
    num_images: int | None = None


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a statistics file holds: features' Gaussian, sFID's Gaussian or None, how they were made (settings, may be empty)."""
    pool: Gaussian
    spatial: Gaussian | None
    settings: dict


SETTINGS = ("embedding", "weights_sha256", "resize", "conversion", "num_images", "software")


DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError)  # what a file that is cut or changed can raise


def open_npz(path):
    """np.load of an .npz that never unpickles. Raises FileNotFoundError or ValueError."""
    try:
        file = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except DAMAGE as error:
        raise UserError(f"{path}: not a readable .npz ({error}); was the download cut short?") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: a single array, wanted an .npz; save it with np.savez(path, arr_0=images)")
    return file


def read_array(path, file, key):
    """One array of an open .npz. Raises ValueError if it is damaged, or holds objects that would have to be unpickled."""
    try:
        return file[key]
    except DAMAGE as error:
        raise UserError(f"{path}: {key} is damaged or not a plain number array ({error}); get or make the file anew") from None


def load_statistics(path):
    """Read mu, sigma (and mu_s, sigma_s) of an ADM batch, an EDM reference or our own file; None if it holds no mu."""
    with open_npz(path) as file:
        if "mu" not in file or "sigma" not in file:
            return None
        settings = {key: read_array(path, file, key).item() for key in SETTINGS if key in file}
        pool = _gaussian(path, file, "mu", "sigma", settings.get("num_images"))
        spatial = None
        if "mu_s" in file and "sigma_s" in file:
            spatial = _gaussian(path, file, "mu_s", "sigma_s", settings.get("num_images"))
    return Stored(pool, spatial, settings)


def _gaussian(path, file, mu_key, sigma_key, num_images):
    mu, sigma = (read_array(path, file, key) for key in (mu_key, sigma_key))
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise UserError(f"{path}: {mu_key} is {mu.dtype} and {sigma_key} {sigma.dtype}, wanted float32 or float64")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: {mu_key} {mu.shape} and {sigma_key} {sigma.shape}, wanted (d,) and (d, d)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: {mu_key} or {sigma_key} holds NaN or infinity; make the file anew with `python -m fid ref`")
    return Gaussian(mu, sigma, num_images)


def save_statistics(path, stored, images=None):
    """Write ADM's keys (mu, sigma, mu_s, sigma_s and, if images (N, H, W, 3) uint8 are given, arr_0) plus the settings."""
    arrays = {"mu": stored.pool.mu, "sigma": stored.pool.sigma}
    if stored.spatial is not None:
        arrays |= {"mu_s": stored.spatial.mu, "sigma_s": stored.spatial.sigma}
    if images is not None:
        arrays["arr_0"] = images
    arrays |= {key: np.array(stored.settings[key]) for key in SETTINGS if stored.settings.get(key) is not None}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:  # a file object, or numpy would append .npz to another suffix
        np.savez(file, **arrays)
