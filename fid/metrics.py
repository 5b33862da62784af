"""The numbers, from features and statistics alone: Frechet distance, Inception Score, precision, recall, KID.

Everything is computed in float64; features come in as float32.
"""

import numpy as np
import torch

from utils.cli import UserError

IS_SPLIT = 5000
ROWS = 1024      # rows per block of a distance matrix
COLUMNS = 8192   # columns per block: 64 MiB of float64 distances at a time
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2) of two Gaussians.

    mu: (d,), sigma: (d, d) symmetric, numpy or torch. Exact for singular covariances: no eps on a diagonal, no complex numbers.
    Returns a float. Raises ValueError where shapes differ or a number is not finite. Source: Dowson and Landau 1982.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    _check_gaussians(mu1, sigma1, mu2, sigma2)
    return frechet_to_root(mu1, covariance_root(sigma1), mu2, sigma2)


def frechet_to_root(mu1, root1, mu2, sigma2):
    """frechet_distance where the first covariance comes as its root (see covariance_root), to be used many times."""
    mixed = np.linalg.eigvalsh(root1.T @ sigma2 @ root1)  # the eigenvalues of sigma1 sigma2
    cross = np.sqrt(mixed[mixed > _rank_cut(mixed)]).sum()
    return float(((mu1 - mu2) ** 2).sum() + (root1 ** 2).sum() + np.trace(sigma2) - 2 * cross)


def covariance_root(sigma):
    """R (d, rank) with R R^T = sigma; directions below the rank cut are left out."""
    values = np.linalg.eigvalsh(sigma)
    if values[0] > 100 * _rank_cut(values):  # full rank: Cholesky's root serves as well and costs a tenth
        return np.linalg.cholesky(sigma)
    values, vectors = np.linalg.eigh(sigma)
    kept = values > _rank_cut(values)
    return vectors[:, kept] * np.sqrt(values[kept])


def _rank_cut(values):
    """Eigenvalues at or below this are rounding noise."""
    return max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps if len(values) else 0.0


def _check_gaussians(mu1, sigma1, mu2, sigma2):
    d = len(mu1)
    for name, array, shape in (("mu1", mu1, (d,)), ("mu2", mu2, (d,)), ("sigma1", sigma1, (d, d)), ("sigma2", sigma2, (d, d))):
        if array.shape != shape:
            raise UserError(f"frechet_distance: {name} is {array.shape}, wanted {shape}; both sides need the same features")
        if not np.isfinite(array).all():
            raise UserError(f"frechet_distance: {name} holds NaN or infinity; a covariance needs at least 2 images")


def inception_score(pool, weights, split_size=IS_SPLIT):
    """Inception Score of pooled features in file order, as the ADM evaluator defines it (no bias, splits of 5000).

    pool: (N, 2048). weights: fc.weight (1008, 2048), or what FeatureExtractor takes (a path or a state dict).
    Returns the mean over splits as a float. Source: Salimans et al. 2016 (arXiv 1606.03498).
    """
    return float(np.mean(split_scores(class_log_probabilities(pool, weights), split_size)))


def class_log_probabilities(pool, weights):
    """(N, 1008) float64 log-softmax of pool @ fc.weight^T, without the bias. Arguments as inception_score."""
    if not isinstance(weights, (np.ndarray, torch.Tensor)):
        from fid.inception import load_weights
        weights = load_weights(weights)[0]["fc.weight"]
    pool = torch.as_tensor(pool)
    matrix = torch.as_tensor(weights).to(pool.device).double().T
    return torch.cat([torch.log_softmax(rows.double() @ matrix, 1) for rows in pool.split(COLUMNS)])


def split_scores(log_probabilities, split_size=IS_SPLIT):
    """Scores exp(mean KL(p(y|x) || p(y))) of consecutive splits; a short last split counts as one."""
    scores = []
    for logs in log_probabilities.split(split_size):
        p = logs.exp()
        divergence = p * (logs - p.mean(0).log())
        divergence = torch.where(p > 0, divergence, 0)  # 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp().item())
    return scores


def precision_recall(reference_pool, sample_pool, k=3):
    """Improved precision and recall of samples against a reference set.

    reference_pool (M, d), sample_pool (N, d): features, numpy or torch. A manifold is the union of balls around the set's
    points that reach to each one's k-th nearest neighbour (itself excluded); precision is the share of samples in the
    reference's manifold, recall the share of reference points in the samples'. Distances are squared and computed in
    float64, so that float32 features decide alone. Returns two floats. Raises ValueError for sets of at most k points.
    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991).
    """
    reference, samples = torch.as_tensor(reference_pool), torch.as_tensor(sample_pool)
    for name, features in (("reference", reference), ("samples", samples)):
        if features.ndim != 2 or len(features) <= k:
            raise UserError(f"precision_recall: {name} features are {tuple(features.shape)}, wanted (N, d) with N > k = {k}")
    reference_radii, sample_radii = neighbour_radii(reference, k), neighbour_radii(samples, k)
    in_reference = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    in_samples = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for row, column, distances in distance_blocks(reference, samples):
        in_reference[column] |= (distances <= reference_radii[row, None]).any(0)
        in_samples[row] |= (distances <= sample_radii[column]).any(1)
    return in_reference.double().mean().item(), in_samples.double().mean().item()


def neighbour_radii(features, k):
    """Squared distance (N,) float64 from each point to its k-th nearest other point."""
    nearest = torch.full((len(features), k + 1), torch.inf, dtype=torch.float64, device=features.device)
    for row, column, distances in distance_blocks(features, features):
        best = torch.cat([nearest[row], distances], 1)
        nearest[row] = best.topk(k + 1, largest=False).values
    return nearest[:, k]  # the nearest of all is the point itself, at distance 0


def nearest_neighbours(queries, features, k):
    """Distances (Q, k) and indices (Q, k) of each query's k nearest features, nearest first."""
    k = min(k, len(features))
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=queries.device)
    index = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
    for row, column, distances in distance_blocks(queries, features):
        places = torch.arange(column.start, column.start + distances.shape[1], device=queries.device)
        joined = torch.cat([best[row], distances], 1)
        best[row], chosen = joined.topk(k, largest=False)
        index[row] = torch.cat([index[row], places.expand(len(distances), -1)], 1).gather(1, chosen)
    return best.sqrt(), index


def distance_blocks(a, b):
    """Yield (rows of a, rows of b, squared distances between them) as (slice, slice, float64 matrix), block by block."""
    for start in range(0, len(a), ROWS):
        row = slice(start, min(start + ROWS, len(a)))
        left = a[row].double()
        left_norm = left.square().sum(1)[:, None]
        for begin in range(0, len(b), COLUMNS):
            column = slice(begin, min(begin + COLUMNS, len(b)))
            right = b[column].double()
            scale = left_norm + right.square().sum(1)
            distances = torch.addmm(scale, left, right.T, alpha=-2)
            # What rounding leaves of equal points is 0, so that duplicates lie inside a ball of radius 0.
            yield row, column, torch.where(distances > 64 * torch.finfo(torch.float64).eps * scale, distances, 0)


def kernel_distance(a, b):
    """Unbiased squared MMD of two feature sets (n, d), (m, d) under the cubic kernel (x.y / d + 1)^3; a float."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_off_diagonal(matrix):
        n = len(matrix)
        return (matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1))

    return (mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean()).item()


def kid(reference_pool, sample_pool, num_subsets=KID_SUBSETS, subset_size=KID_SUBSET_SIZE, seed=0):
    """Kernel Inception Distance: mean and standard deviation of kernel_distance over random subsets.

    The subset size is lowered to the smaller set's size; where it is all of both sets, every subset is the same and the
    deviation 0. Source: Binkowski et al. 2018 (arXiv 1801.01401).
    """
    reference, samples = torch.as_tensor(reference_pool), torch.as_tensor(sample_pool)
    size = min(subset_size, len(reference), len(samples))
    if size < 2:
        raise UserError(f"kid: {len(reference)} reference and {len(samples)} sample features, wanted at least 2 of each")
    rng = np.random.default_rng(seed)
    values = [kernel_distance(reference[rng.choice(len(reference), size, replace=False)],
                              samples[rng.choice(len(samples), size, replace=False)]) for _ in range(num_subsets)]
    return float(np.mean(values)), float(np.std(values))


def mean_and_covariance(features):
    """Mean (d,) and covariance (d, d) with ddof 1 of features (N, d), numpy float64."""
    features = torch.as_tensor(features).double()
    centred = features - features.mean(0)
    return features.mean(0).cpu().numpy(), (centred.T @ centred / (len(features) - 1)).cpu().numpy()
