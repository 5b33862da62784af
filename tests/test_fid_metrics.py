"""fid.metrics against closed forms, hand-worked numbers and slow versions."""

import numpy as np
import pytest
import scipy.linalg
import torch

from fid import metrics


def gaussian_of(features):
    return metrics.mean_and_covariance(metrics.products_of(features))


def random_covariance(d, rank, seed):
    x = np.random.default_rng(seed).standard_normal((rank + 1, d))
    return np.cov(x, rowvar=False)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    mu1, mu2, s1, s2 = rng.standard_normal(7), rng.standard_normal(7), rng.random(7), rng.random(7)
    wanted = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    assert metrics.frechet_distance(mu1, np.diag(s1), mu2, np.diag(s2)) == pytest.approx(wanted, rel=1e-12)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    mu1, mu2, sigma1, sigma2 = np.zeros(30), np.full(30, 0.1), random_covariance(30, 100, 0), random_covariance(30, 100, 1)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    wanted = 0.3 + np.trace(sigma1 + sigma2 - 2 * root)
    assert metrics.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("rank1, rank2", [(5, 30), (30, 5), (5, 5), (12, 9)])
def test_frechet_distance_is_exact_for_singular_covariances(rank1, rank2):
    # the nuclear norm of A^T B gives tr (S1 S2)^1/2 for S1 = A A^T, S2 = B B^T without any matrix root
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((20, rank1)), rng.standard_normal((20, rank2))
    wanted = (a ** 2).sum() + (b ** 2).sum() - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    found = metrics.frechet_distance(np.zeros(20), a @ a.T, np.zeros(20), b @ b.T)
    assert found == pytest.approx(wanted, rel=1e-10)  # rounding of the products a a^T is amplified by the root


def test_frechet_distance_of_a_set_with_itself_is_zero():
    sigma = random_covariance(40, 10, 0)
    assert abs(metrics.frechet_distance(np.ones(40), sigma, np.ones(40), sigma)) < 1e-9 * np.trace(sigma)


def test_streaming_statistics_equal_numpy_in_float64():
    features = torch.randn(57, 11, generator=torch.Generator().manual_seed(0)) + 3
    mu, sigma = metrics.mean_and_covariance(sum(metrics.products_of(batch) for batch in features.split(10)))
    wanted = features.double().numpy()
    np.testing.assert_allclose(mu, wanted.mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(wanted, rowvar=False), atol=1e-13)  # float32 sums would be off by 1e-6


def test_inception_score_follows_its_definition_by_hand():
    # two images of certain class 0 and 1: p(y) = (1/2, 1/2), every KL is ln 2, the score is 2; then one split of score 1
    pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    weights = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    assert metrics.inception_score(pool, weights) > 1.8
    assert metrics.inception_score(pool, weights, split_size=2) == pytest.approx((2 + 1) / 2)  # the short last split counts as one


def test_inception_score_agrees_with_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    pool, weights = torch.randn(23, 8, generator=generator), torch.randn(6, 8, generator=generator)
    scores = []
    for rows in (pool[:10], pool[10:20], pool[20:]):
        logits = rows.double().numpy() @ weights.double().numpy().T
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        scores.append(np.exp(np.mean([sum(pi * np.log(pi / qi) for pi, qi in zip(row, p.mean(0))) for row in p])))
    assert metrics.inception_score(pool, weights, 10) == pytest.approx(np.mean(scores), rel=1e-12)


def precision_recall(reference, samples, k=3):
    samples, reference = map(torch.as_tensor, (samples, reference))
    return metrics.coverage(samples, reference, k), metrics.coverage(reference, samples, k)


def slow_precision_recall(reference, samples, k):
    def radii(x):
        return [sorted(((x[i] - x[j]) ** 2).sum() for j in range(len(x)) if j != i)[k - 1] for i in range(len(x))]

    def covered(points, centres, centre_radii):
        return np.mean([any(((p - c) ** 2).sum() <= r for c, r in zip(centres, centre_radii)) for p in points])

    return covered(samples, reference, radii(reference)), covered(reference, samples, radii(samples))


def test_precision_recall_by_hand():
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # radii^2 for k = 1: all 1, the union is [-1, 4]
    samples = torch.tensor([[-1.0], [4.0], [4.5], [10.0]])  # -1 and 4 lie on the border, which counts as inside
    # sample radii for k = 1: 5, 0.5, 0.5, 5.5, so that only 4.5 and its like leave out 0..3: [-6, 4] holds them all
    assert precision_recall(reference, samples, k=1) == (0.5, 1.0)


def test_precision_recall_agrees_with_a_slow_loop(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 100)  # several blocks of 2 or 3 rows
    rng = np.random.default_rng(0)
    reference, samples = rng.standard_normal((31, 4)).astype(np.float32), 0.8 * rng.standard_normal((43, 4)).astype(np.float32)
    wanted = slow_precision_recall(reference.astype(np.float64), samples.astype(np.float64), 3)
    assert 0.2 < wanted[0] < 1 and 0.2 < wanted[1] < 1
    assert precision_recall(reference, samples, k=3) == wanted


def test_precision_recall_counts_duplicates_with_radius_zero():
    point = torch.full((1, 50), 0.1)
    others = torch.arange(4.0)[:, None].expand(4, 50) + 5
    reference = torch.cat([point.expand(4, 50)])           # four copies: every radius is 0
    precision, recall = precision_recall(reference, torch.cat([point, others]), k=3)
    assert precision == pytest.approx(1 / 5)
    assert recall == 1.0


def test_nearest_neighbours_agree_with_a_sort(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 70)  # 4 queries, then 2
    generator = torch.Generator().manual_seed(0)
    queries, features = torch.randn(6, 3, generator=generator), torch.randn(17, 3, generator=generator)
    distances, indices = metrics.nearest_neighbours(queries, features, 4)
    wanted = torch.cdist(queries.double(), features.double())
    assert torch.equal(indices, wanted.argsort(1)[:, :4])
    assert torch.allclose(distances, wanted.sort(1).values[:, :4] ** 2, atol=1e-12)


def test_kernel_distance_agrees_with_a_slow_loop():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 3)), rng.standard_normal((4, 3)) + 0.5

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    within_a = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert metrics.kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)


def test_kid_is_unbiased_around_zero_for_equal_distributions():
    rng = np.random.default_rng(0)
    reference, same, shifted = rng.standard_normal((400, 4)), rng.standard_normal((400, 4)), rng.standard_normal((400, 4)) + 1
    mean, spread = metrics.kid(reference, same, num_subsets=40, subset_size=100)
    assert abs(mean) < 4 * spread / np.sqrt(40) + 0.02  # subsets of one draw of 400: its own error is about 0.01
    assert metrics.kid(reference, shifted, num_subsets=40, subset_size=100)[0] > 1
    assert metrics.kid(reference, same, seed=1) == metrics.kid(reference, same, seed=1)


def test_interval_holds_the_mean_distance_as_often_as_it_says():
    # 40 experiments of 200 samples in 3 dimensions; a 95 % interval may miss about 2, more than 8 happens once in 1e5
    reference = (np.zeros(3), np.eye(3))
    rng = np.random.default_rng(0)
    draws = [torch.from_numpy(rng.standard_normal((200, 3)) * [1, 1.3, 0.8] + [0.3, 0, 0]) for _ in range(240)]
    distances = [metrics.frechet_distance(*reference, *gaussian_of(draw)) for draw in draws]
    found = [metrics.distance_interval(reference, draw) for draw in draws[:40]]
    held = sum(one["low"] <= np.mean(distances) <= one["high"] for one in found)
    assert 32 <= held
    assert np.mean([one["standard_error"] for one in found]) == pytest.approx(np.std(distances), rel=0.25)


def test_interval_reaches_as_far_as_students_t_says():
    pool = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    found = metrics.distance_interval((np.zeros(2), np.eye(2)), pool)
    # the two-sided 95 % quantile for 20 groups, from a printed table
    assert (found["high"] - found["low"]) / 2 == pytest.approx(2.093 * found["standard_error"], rel=1e-4)


def test_extrapolation_removes_most_of_the_bias():
    # identity against itself in 20 dimensions: the true distance is 0, the bias at 400 samples is about 0.4
    reference = (np.zeros(20), np.eye(20))
    rng = np.random.default_rng(0)
    plain, extrapolated = [], []
    for _ in range(10):
        pool = torch.from_numpy(rng.standard_normal((400, 20)))
        plain.append(metrics.frechet_distance(*reference, *gaussian_of(pool)))
        extrapolated.append(metrics.distance_interval(reference, pool)["extrapolated"])
    assert np.mean(plain) > 0.2
    assert abs(np.mean(extrapolated)) < 0.15 * np.mean(plain)


def test_all_numbers_equal_torch_fidelity():
    fidelity = {name: pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("fid", "isc", "prc", "kid")}
    generator = torch.Generator().manual_seed(0)
    samples, reference = torch.randn(90, 12, generator=generator), 1.2 * torch.randn(80, 12, generator=generator)
    weights = torch.randn(10, 12, generator=generator)
    gaussians = [gaussian_of(features) for features in (reference, samples)]
    theirs = fidelity["fid"].fid_statistics_to_metric(*({"mu": mu, "sigma": sigma} for mu, sigma in gaussians), verbose=False)
    assert metrics.frechet_distance(*gaussians[0], *gaussians[1]) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    theirs = fidelity["isc"].isc_features_to_metric(samples @ weights.T, splits=1, shuffle=False)
    assert metrics.inception_score(samples, weights) == pytest.approx(theirs["inception_score_mean"], rel=1e-5)  # its logits are float32
    theirs = fidelity["prc"].prc_features_to_metric(samples, reference, verbose=False)  # generated first
    assert precision_recall(reference, samples) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    theirs = fidelity["kid"].kid_features_to_metric(samples, reference, kid_subsets=1, kid_subset_size=80, verbose=False)
    ours = metrics.kid(reference, samples[np.random.RandomState(2020).choice(90, 80, replace=False)], num_subsets=1)
    assert ours[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)  # its kernel is float32
