"""The numbers, from features and statistics alone: Frechet distance and its interval, Inception Score, precision, recall, KID.

METRICS at the end is what `--metrics` offers. To add a metric, write its function and give it a line there.
Everything is computed in float64; features come in as float32.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import rel_entr

IS_SPLIT = 5000
SORTED_RATIO = 1.1  # Inception Score of shuffled over file-order splits from which the order has spoiled it
NEIGHBOURS = 3      # k of precision and recall; each side needs one image more
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
GROUPS = 20         # of the interval's jackknife
BLOCK = 2 ** 23     # numbers in a block of a distance matrix, 64 MiB


def frechet_distance(mu1, sigma1, mu2, sigma2, root1=None):
    """Frechet distance |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2) of two Gaussians, as a float.

    mu: (d,), sigma: (d, d) symmetric, numpy float64. Exact for singular covariances: no eps on a diagonal, no complex numbers.
    root1: covariance_root(sigma1), for who needs it many times. Source: Dowson and Landau 1982.
    """
    root1 = covariance_root(sigma1) if root1 is None else root1
    mixed = np.linalg.eigvalsh(root1.T @ sigma2 @ root1)  # the eigenvalues of sigma1 sigma2
    cross = np.sqrt(mixed[mixed > _rank_cut(mixed)]).sum()
    return float(((mu1 - mu2) ** 2).sum() + (root1 ** 2).sum() + np.trace(sigma2) - 2 * cross)


def covariance_root(sigma):
    """R (d, rank) with R R^T = sigma; directions below the rank cut are left out."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > _rank_cut(values)
    return vectors[:, kept] * np.sqrt(values[kept])


def _rank_cut(values):
    """Eigenvalues at or below this are rounding noise."""
    return max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps if len(values) else 0.0


def mean_and_covariance(features):
    """Mean (d,) and covariance (d, d) with ddof 1 of features (N, d), numpy float64."""
    features = torch.as_tensor(features).double()
    return features.mean(0).cpu().numpy(), features.T.cov().cpu().numpy()


def distance_interval(reference, pool, groups=GROUPS, sizes=15, seed=0):
    """How sure the Frechet distance is, as a dict. reference: (mu, sigma), which counts as exact; pool: sample features (N, d).

    low, high, standard_error: 95 % interval at this number of samples. Each of `groups` random groups is left out once, and the
    spread of the distances gives the error (delete-a-group jackknife, Kott 2001).
    extrapolated: the distance of infinitely many samples, free of the bias of a finite number: a straight line through the
    distances of random subsets of several sizes over 1/size, followed to 0 (Chong and Forsyth 2020, arXiv 1911.07023).
    """
    from scipy.stats import linregress, t  # takes most of a second to import
    root = covariance_root(reference[1])

    def distance(rows):
        return frechet_distance(*reference, *mean_and_covariance(pool[rows]), root)

    order = np.random.default_rng(seed).permutation(len(pool))
    group_of = torch.as_tensor(np.argsort(order) % groups, device=pool.device)
    error = float(np.sqrt((groups - 1) * np.var([distance(group_of != group) for group in range(groups)])))
    middle, reach = distance(slice(None)), float(t.ppf(0.975, groups - 1)) * error
    rng = np.random.default_rng(seed)
    sizes = np.linspace(5000 if len(pool) >= 10000 else len(pool) // 2, len(pool), sizes).astype(int)
    line = linregress(1 / sizes, [distance(rng.choice(len(pool), size, replace=False)) for size in sizes])
    return {"low": middle - reach, "high": middle + reach, "standard_error": error, "extrapolated": float(line.intercept)}


def inception_score(pool, weights, split_size=IS_SPLIT):
    """Inception Score of pooled features in file order, as the ADM evaluator defines it: no bias, mean over splits of 5000.

    pool: (N, 2048). weights: fc.weight (1008, 2048). A short last split counts as one. Returns a float.
    Source: Salimans et al. 2016 (arXiv 1606.03498).
    """
    pool, scores = torch.as_tensor(pool), []
    matrix = torch.as_tensor(weights).to(pool.device).double().T
    for rows in pool.split(split_size):
        p = torch.softmax(rows.double() @ matrix, 1).cpu().numpy()
        scores.append(np.exp(rel_entr(p, p.mean(0)).sum(1).mean()))
    return float(np.mean(scores))


def coverage(points, manifold, k=NEIGHBOURS):
    """Share of the points (N, d) that lie on a manifold given by the points (M, d), as a float.

    The manifold is the union of balls around its points that reach to each one's k-th nearest neighbour (itself excluded).
    coverage(samples, reference) is improved precision, coverage(reference, samples) is improved recall. Distances are squared
    and computed in float64, so that float32 features decide alone. The manifold needs more than k points.
    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991).
    """
    points, manifold = torch.as_tensor(points), torch.as_tensor(manifold)
    radii = nearest_neighbours(manifold, manifold, k + 1)[0][:, k]  # the nearest of all is the point itself, at distance 0
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
        # What rounding leaves of equal points is 0, so that duplicates lie inside a ball of radius 0.
        yield torch.where(distances > 64 * torch.finfo(torch.float64).eps * scale, distances, 0)


def closest_pairs(sample_pool, reference_pool, num_samples=8, num_neighbours=5):
    """The samples that lie closest to a real image for how far real images lie apart there, the suspicious ones first.

    Returns sample indices (S,), reference indices (S, K) nearest first, and (S,) ratios: the sample's distance to its nearest
    real image over that image's distance to the next real one. A copy has ratio 0; samples as new as real ones have about 1.
    """
    distances, indices = nearest_neighbours(sample_pool, reference_pool, num_neighbours)
    apart = nearest_neighbours(reference_pool, reference_pool, 2)[0][indices[:, 0], 1]
    ratios = distances[:, 0].sqrt() / apart.sqrt().clamp(min=1e-12)
    rows = ratios.argsort(stable=True)[:num_samples]
    return rows.cpu().numpy(), indices[rows].cpu().numpy(), ratios[rows].cpu().numpy()


def kernel_distance(a, b):
    """Unbiased squared MMD of two feature sets (n, d), (m, d) under the cubic kernel (x.y / d + 1)^3; a float."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        matrix = kernel(x, x)
        return (matrix.sum() - matrix.diagonal().sum()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def kid(reference_pool, sample_pool, num_subsets=KID_SUBSETS, subset_size=KID_SUBSET_SIZE, seed=0):
    """Kernel Inception Distance: mean and standard deviation of kernel_distance over random subsets.

    The subset size is lowered to the smaller set's size; where it is all of both sets, every subset is the same and the
    deviation 0. Source: Binkowski et al. 2018 (arXiv 1801.01401).
    """
    reference, samples = torch.as_tensor(reference_pool), torch.as_tensor(sample_pool)
    size = min(subset_size, len(reference), len(samples))
    rng = np.random.default_rng(seed)
    values = [kernel_distance(reference[rng.choice(len(reference), size, replace=False)],
                              samples[rng.choice(len(samples), size, replace=False)]) for _ in range(num_subsets)]
    return float(np.mean(values)), float(np.std(values))


@dataclasses.dataclass(frozen=True)
class Metric:
    """compute(evaluator) gives the number, or {suffix of its name: number}; it may append to evaluator.warnings.

    The evaluator and its `reference` have gaussians {tap: (mu, sigma)} and pool, features (N, d) in file order; `seed` is for choices.
    title: its name on Inception features. other: its name on other features, followed by theirs; "" if it is defined on Inception only.
    tap: the Gaussians that it compares, "pool" or "spatial"; "" if it looks at the pool of the samples.
    images: it looks at the pool of the reference, which takes images. least: images that each side needs.
    """
    compute: Callable
    title: str
    other: str = ""
    tap: str = ""
    images: bool = False
    least: int = 2

    def name(self, embedding):
        """Only Inception's Frechet distance is called FID."""
        return self.title if embedding == "inception" else f"{self.other}-{embedding}"


def _inception_score(evaluator):
    """The score in file order, with a warning if that order is what makes it low."""
    pool = evaluator.pool
    order = torch.as_tensor(np.random.default_rng(evaluator.seed).permutation(len(pool)), device=pool.device)
    score, shuffled = (inception_score(some, evaluator.embedding.class_weight, IS_SPLIT) for some in (pool, pool[order]))
    if shuffled >= SORTED_RATIO * score:
        evaluator.warnings.append(
            f"IS is {score:.4g} in file order and {shuffled:.4g} shuffled: the samples look sorted by class, which ruins it, because "
            f"it is computed on splits of {IS_SPLIT}; mix the classes (generate.py does when it draws a class per seed)")
    return score


METRICS = {
    "fid": Metric(lambda e: frechet_distance(*e.reference.gaussians["pool"], *e.gaussians["pool"]), "FID", "FD", tap="pool"),
    "sfid": Metric(lambda e: frechet_distance(*e.reference.gaussians["spatial"], *e.gaussians["spatial"]), "sFID", tap="spatial"),
    "is": Metric(_inception_score, "IS"),
    "precision": Metric(lambda e: coverage(e.pool, e.reference.pool), "precision", "precision", images=True, least=NEIGHBOURS + 1),
    "recall": Metric(lambda e: coverage(e.reference.pool, e.pool), "recall", "recall", images=True, least=NEIGHBOURS + 1),
    "kid": Metric(lambda e: dict(zip(("", "_std"), kid(e.reference.pool, e.pool, seed=e.seed))), "KID", "KD", images=True),
}
TABLE = ("fid", "sfid", "is", "precision", "recall")  # what is computed if nothing is asked for
