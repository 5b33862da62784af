"""The metrics as functions of features: Frechet distance and its interval, Inception Score, precision, recall, KID.

METRICS at the end is what `--metrics` offers. To add a metric, write its function and give it a line there.
Features come in as float32; everything is computed in float64.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import rel_entr
from torch.nn import functional as F

IS_SPLIT = 5000
SORTED_RATIO = 1.1  # if shuffling raises the Inception Score by this factor, the images were sorted by class
NEIGHBOURS = 3  # k of precision and recall; each side needs one image more
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
GROUPS, SUBSETS = 20, 15  # of the interval: for its error, and for its extrapolation
BLOCK = 2 ** 23  # numbers in a block of a distance matrix, 64 MiB


def frechet_distance(mu1, sigma1, mu2, sigma2, root1=None):
    """Frechet distance |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2) of two Gaussians, as a float.

    mu: (d,), sigma: (d, d) symmetric, numpy float64. Exact for singular covariances: no eps on a diagonal, no complex numbers.
    root1: covariance_root(sigma1), if it is there already. Source: Dowson and Landau 1982.
    """
    root1 = covariance_root(sigma1) if root1 is None else root1
    mixed = np.linalg.eigvalsh(root1.T @ sigma2 @ root1)  # the eigenvalues of sigma1 sigma2
    cross = np.sqrt(mixed[_above_noise(mixed)]).sum()
    return float(((mu1 - mu2) ** 2).sum() + (root1 ** 2).sum() + np.trace(sigma2) - 2 * cross)


def covariance_root(sigma):
    """R (d, rank) with R R^T = sigma, without the directions that are rounding noise."""
    values, vectors = np.linalg.eigh(sigma)
    kept = _above_noise(values)
    return vectors[:, kept] * np.sqrt(values[kept])


def _above_noise(eigenvalues):
    """(d,) bool: those that are not 0 but for rounding."""
    return eigenvalues > eigenvalues.max(initial=0) * len(eigenvalues) * np.finfo(np.float64).eps


def products_of(features):
    """The count, sums and products of features (n, d) as one float64 matrix (d + 1, d + 1). They add up over batches."""
    ones_first = F.pad(torch.as_tensor(features).double(), (1, 0), value=1)
    return ones_first.T @ ones_first


def mean_and_covariance(products):
    """Mean (d,) and covariance (d, d) with ddof 1, numpy float64, from `products_of` the features."""
    count, mu = products[0, 0], products[0, 1:] / products[0, 0]
    sigma = (products[1:, 1:] - count * torch.outer(mu, mu)) / (count - 1)
    return mu.cpu().numpy(), sigma.cpu().numpy()


def distance_interval(reference, pool, seed=0):
    """How far chance reaches in a Frechet distance, as a dict. reference: (mu, sigma), taken as exact. pool: sample features (N, d).

    low, high, standard_error: 95 % interval for this number of samples. Random groups are left out in turn, and the spread of the
    distances gives the error (delete-a-group jackknife, Kott 2001).
    extrapolated: the distance for infinitely many samples, which is lower. Distances of random subsets are fitted by a straight
    line over 1 / size and followed to 0 (Chong and Forsyth 2020, arXiv 1911.07023).
    """
    from scipy.stats import linregress, t  # takes most of a second to import
    root = covariance_root(reference[1])

    def distance(rows):
        return frechet_distance(*reference, *mean_and_covariance(products_of(pool[rows])), root)

    order = np.random.default_rng(seed).permutation(len(pool))
    group_of = torch.as_tensor(np.argsort(order) % GROUPS, device=pool.device)
    error = float(np.sqrt((GROUPS - 1) * np.var([distance(group_of != group) for group in range(GROUPS)])))
    middle, reach = distance(slice(None)), float(t.ppf(0.975, GROUPS - 1)) * error
    rng = np.random.default_rng(seed)
    sizes = np.linspace(5000 if len(pool) >= 10000 else len(pool) // 2, len(pool), SUBSETS).astype(int)
    line = linregress(1 / sizes, [distance(rng.choice(len(pool), size, replace=False)) for size in sizes])
    return {"low": middle - reach, "high": middle + reach, "standard_error": error, "extrapolated": float(line.intercept)}


def inception_score(pool, weights, split_size=IS_SPLIT):
    """Inception Score as in ADM's evaluator, a float: logits without bias, mean over splits in file order.

    pool: (N, 2048). weights: fc.weight (1008, 2048). A short last split counts like the others.
    Source: Salimans et al. 2016 (arXiv 1606.03498).
    """
    scores = []
    for rows in pool.split(split_size):
        p = torch.softmax(rows.double() @ weights.double().T, 1).cpu().numpy()
        scores.append(np.exp(rel_entr(p, p.mean(0)).sum(1).mean()))
    return float(np.mean(scores))


def coverage(points, manifold, k=NEIGHBOURS):
    """Share of the points (N, d) that lie on the manifold around other points (M, d), M above k; a float.

    The manifold is the union of balls around its points. Each ball reaches to the k-th nearest of the other points.
    coverage(samples, reference) is improved precision, coverage(reference, samples) is improved recall.
    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991).
    """
    radii = nearest_neighbours(manifold, manifold, k + 1)[0][:, k]  # the nearest is the point itself, at distance 0
    return torch.cat([(distances <= radii).any(1) for distances in distance_blocks(points, manifold)]).double().mean().item()


def nearest_neighbours(queries, features, k):
    """Squared distances (Q, k) and indices (Q, k) of each query's k nearest features, nearest first."""
    found = [distances.topk(min(k, len(features)), largest=False) for distances in distance_blocks(queries, features)]
    return torch.cat([block.values for block in found]), torch.cat([block.indices for block in found])


def distance_blocks(a, b):
    """Yield the squared distances between a (N, d) and b (M, d) as float64 matrices (n, M), some rows of a at a time."""
    b = b.double()
    norms = b.square().sum(1)
    for rows in a.split(max(1, BLOCK // len(b))):
        rows = rows.double()
        scale = rows.square().sum(1)[:, None] + norms
        distances = torch.addmm(scale, rows, b.T, alpha=-2)
        # Rounding makes the distance of equal points a little more than 0: back to 0, so that copies lie in a ball of radius 0.
        yield torch.where(distances > 64 * torch.finfo(torch.float64).eps * scale, distances, 0)


def closest_pairs(sample_pool, reference_pool, num_samples=8, num_neighbours=5):
    """The samples that look most like copies of a real image: sample indices (S,), reference indices (S, K), ratios (S,).

    The ratio is a sample's distance to its nearest real image, over that image's distance to the next real one. A copy has 0, and
    a sample that is as new as a real image about 1. The lowest ratio comes first; the reference indices are nearest first.
    """
    distances, indices = nearest_neighbours(sample_pool, reference_pool, num_neighbours)
    apart = nearest_neighbours(reference_pool, reference_pool, 2)[0][indices[:, 0], 1]
    ratios = distances[:, 0].sqrt() / apart.sqrt().clamp(min=1e-12)
    rows = ratios.argsort(stable=True)[:num_samples]
    return rows.cpu().numpy(), indices[rows].cpu().numpy(), ratios[rows].cpu().numpy()


def kernel_distance(a, b):
    """Unbiased squared MMD of two feature sets (n, d), (m, d) under the cubic kernel (x.y / d + 1)^3; a float."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    within_a, within_b, between = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    means = [(kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)) for kernel in (within_a, within_b)]
    return (sum(means) - 2 * between.mean()).item()


def kid(reference, samples, num_subsets=KID_SUBSETS, subset_size=KID_SUBSET_SIZE, seed=0):
    """Kernel Inception Distance of pooled features: mean and standard deviation of kernel_distance over random subsets.

    Subsets are no larger than the smaller set. Source: Binkowski et al. 2018 (arXiv 1801.01401).
    """
    size = min(subset_size, len(reference), len(samples))
    rng = np.random.default_rng(seed)
    values = [kernel_distance(reference[rng.choice(len(reference), size, replace=False)],
                              samples[rng.choice(len(samples), size, replace=False)]) for _ in range(num_subsets)]
    return float(np.mean(values)), float(np.std(values))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of METRICS.

    compute(evaluator): the number, or {suffix of its name: number}. evaluator.gaussians {tap: (mu, sigma)} and evaluator.pool
        (features (N, d) in file order) are of the samples; evaluator.reference has both too. evaluator.seed is for random choices.
    title: its name on Inception's features. other: its name on others, "" if there is none.
    tap: the Gaussians that it compares, "pool" or "spatial"; "" if it looks at evaluator.pool.
    images: it looks at the features of reference images. least: number of images that each side needs.
    """
    compute: Callable
    title: str
    other: str = ""
    tap: str = ""
    images: bool = False
    least: int = 2

    def name(self, embedding):
        """Only the Frechet distance of Inception's features is called FID."""
        return self.title if embedding == "inception" else f"{self.other}-{embedding}"


def _inception_score(evaluator):
    """The score in file order. Warns if that order makes it low."""
    pool = evaluator.pool
    order = torch.as_tensor(np.random.default_rng(evaluator.seed).permutation(len(pool)), device=pool.device)
    score, shuffled = (inception_score(some, evaluator.embedding.class_weight, IS_SPLIT) for some in (pool, pool[order]))
    if shuffled >= SORTED_RATIO * score:
        evaluator.warnings.append(
            f"IS is {score:.4g} in file order and {shuffled:.4g} shuffled: the samples look sorted by class, which makes it low, because "
            f"it is the mean over splits of {IS_SPLIT}; mix the classes (generate.py does when it draws a class per seed)")
    return score


METRICS = {
    "fid": Metric(lambda e: frechet_distance(*e.reference.gaussians["pool"], *e.gaussians["pool"]), "FID", "FD", tap="pool"),
    "sfid": Metric(lambda e: frechet_distance(*e.reference.gaussians["spatial"], *e.gaussians["spatial"]), "sFID", tap="spatial"),
    "is": Metric(_inception_score, "IS"),
    "precision": Metric(lambda e: coverage(e.pool, e.reference.pool), "precision", "precision", images=True, least=NEIGHBOURS + 1),
    "recall": Metric(lambda e: coverage(e.reference.pool, e.pool), "recall", "recall", images=True, least=NEIGHBOURS + 1),
    "kid": Metric(lambda e: dict(zip(("", "_std"), kid(e.reference.pool, e.pool, seed=e.seed))), "KID", "KD", images=True),
}
TABLE = ("fid", "sfid", "is", "precision", "recall")  # computed if nothing is asked for
