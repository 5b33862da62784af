"""How far a Frechet distance can be trusted: an interval from subsets, and its extrapolation to infinitely many images."""

import numpy as np
import torch

from fid import metrics
from utils.cli import UserError

GROUPS = 20
STUDENT_T_95 = {5: 2.776, 10: 2.262, 20: 2.093, 40: 2.023}  # two-sided 95 % quantiles, by number of groups


def jackknife_interval(reference, pool, groups=GROUPS, seed=0):
    """95 % interval of the Frechet distance at this number of samples, over which samples were drawn.

    reference: (mu, sigma). pool: sample features (N, d). The samples are dealt into `groups` random groups, each is left
    out once, and the spread of the distances gives the standard error. The reference counts as exact.
    Returns (low, high, standard error). Source: delete-a-group jackknife, Kott 2001.
    """
    if len(pool) < 2 * groups:
        raise UserError(f"interval: {len(pool)} samples, wanted at least {2 * groups}")
    mu, root = reference[0], metrics.covariance_root(reference[1])
    order = np.random.default_rng(seed).permutation(len(pool))
    group_of = torch.as_tensor(np.argsort(order) % groups, device=pool.device)
    left_out = np.array([metrics.frechet_to_root(mu, root, *metrics.mean_and_covariance(pool[group_of != g]))
                         for g in range(groups)])
    error = float(np.sqrt((groups - 1) / groups * ((left_out - left_out.mean()) ** 2).sum()))
    distance = metrics.frechet_to_root(mu, root, *metrics.mean_and_covariance(pool))
    reach = STUDENT_T_95[groups] * error
    return distance - reach, distance + reach, error


def extrapolated_distance(reference, pool, points=15, seed=0):
    """The Frechet distance that infinitely many samples would have, free of the bias of a finite number.

    The distance is computed on random subsets of `points` sizes and a straight line in 1/size is drawn to 1/size = 0.
    Arguments as jackknife_interval. Source: Chong and Forsyth 2020 (arXiv 1911.07023).
    """
    smallest = 5000 if len(pool) >= 10000 else len(pool) // 2
    if smallest < 2:
        raise UserError(f"interval: {len(pool)} samples, wanted at least 4")
    mu, root = reference[0], metrics.covariance_root(reference[1])
    rng = np.random.default_rng(seed)
    sizes = np.linspace(smallest, len(pool), points).astype(int)
    distances = [metrics.frechet_to_root(mu, root, *metrics.mean_and_covariance(
        pool[rng.choice(len(pool), size, replace=False)])) for size in sizes]
    slope, intercept = np.polyfit(1 / sizes, distances, 1)
    return float(intercept)
