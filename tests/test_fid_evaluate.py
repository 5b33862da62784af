"""fid.evaluate: the numbers of a whole evaluation, the settings that travel with them, and what users are told."""

import json
import pickle

import numpy as np
import pytest
import torch
from fid_helpers import TinyInception, measure, random_images

from fid import evaluate, metrics, statistics
from fid.evaluate import Evaluator
from utils.cli import UserError

SAMPLES = random_images(60, 8, 8, seed=1).numpy()
REAL = random_images(50, 8, 8, seed=2).numpy()


def gaussian_of(features):
    return features.double().mean(0).numpy(), np.cov(features.double().numpy(), rowvar=False)


def write_adm_batch(path, images, num_images=None, **settings):
    """Statistics and images of an ADM batch, as TinyInception sees them."""
    pool, spatial = TinyInception().taps(images).values()
    settings |= {"num_images": num_images} if num_images else {}
    statistics.save_statistics(path, {"pool": gaussian_of(pool), "spatial": gaussian_of(spatial)}, settings, images)
    return path


def measured(**options):
    return measure(SAMPLES, REAL, **{"embedding": TinyInception(), "batch_size": 16} | options)


def test_numbers_equal_their_definitions_on_all_features():
    result = measured(metrics=tuple(metrics.METRICS))
    (pool, spatial), (real_pool, real_spatial) = (TinyInception().taps(images).values() for images in (SAMPLES, REAL))
    wanted = {
        "FID": metrics.frechet_distance(*gaussian_of(real_pool), *gaussian_of(pool)),
        "sFID": metrics.frechet_distance(*gaussian_of(real_spatial), *gaussian_of(spatial)),
        "IS": metrics.inception_score(pool, TinyInception().class_weight),
        "precision": metrics.coverage(pool, real_pool), "recall": metrics.coverage(real_pool, pool),
        **dict(zip(("KID", "KID_std"), metrics.kid(real_pool, pool))),
    }
    assert result["numbers"] == pytest.approx(wanted, rel=1e-6)  # features of other batch sizes differ in the last bit
    assert result["numbers"]["FID"] > 0.01


def test_an_image_set_against_itself_scores_zero_and_one():
    numbers = measure(REAL, REAL, embedding=TinyInception(), batch_size=16)["numbers"]
    assert numbers["FID"] == pytest.approx(0, abs=1e-9) and numbers["sFID"] == pytest.approx(0, abs=1e-9)
    assert numbers["precision"] == numbers["recall"] == 1


def test_adm_batch_uses_stored_statistics_for_fid_and_its_images_for_precision(tmp_path):
    path = tmp_path / "adm.npz"
    write_adm_batch(path, REAL)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["arr_0"] = SAMPLES  # other images than those behind mu and sigma, as in ADM's files
    np.savez(path, **arrays)
    numbers = measure(SAMPLES, path, embedding=TinyInception(), batch_size=16)["numbers"]
    assert numbers["FID"] == pytest.approx(measured()["numbers"]["FID"], rel=1e-6)
    assert numbers["precision"] == 1


def test_order_in_which_batches_come_does_not_matter():
    def numbers(order):
        evaluator = Evaluator(REAL, embedding=TinyInception())
        for index in order:
            evaluator.add(SAMPLES[index * 20:index * 20 + 20], index)
        return evaluator.result()["numbers"]
    assert numbers([2, 0, 1]) == pytest.approx(numbers([0, 1, 2]), rel=1e-12)


def test_settings_travel_with_the_numbers_as_json():
    settings = json.loads(json.dumps(measured()))["settings"]
    assert settings["num_images"] == 60 and settings["image_size"] == [8, 8] and settings["resize"] == "tf1-bilinear-299"
    assert settings["is_split"] == 5000 and settings["neighbours"] == 3 and settings["covariance_ddof"] == 1
    assert settings["weights_sha256"].startswith("6726825d") and settings["conversion"] == "as stored"
    assert settings["reference"] == {"name": "array", "statistics": "computed from its images", "num_images": 50, "images_compared": 50}
    assert f"torch {torch.__version__}" in settings["software"]


def test_evaluation_draws_no_global_random_numbers():
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    measured(metrics=tuple(metrics.METRICS), interval=True)
    assert torch.equal(torch.get_rng_state(), before[0]) and pickle.dumps(np.random.get_state()) == before[1]


def test_reset_forgets_the_samples_and_keeps_the_reference():
    evaluator = Evaluator(REAL, embedding=TinyInception())
    evaluator.add(REAL, 0)
    evaluator.result()
    evaluator.reset()
    evaluator.add(SAMPLES, 0)
    assert evaluator.result()["numbers"] == pytest.approx(measured()["numbers"], rel=1e-6)


def test_precision_looks_at_a_seeded_choice_of_a_large_reference(monkeypatch):
    monkeypatch.setattr(evaluate, "REFERENCE_IMAGES", 20)
    evaluator = Evaluator(REAL, embedding=TinyInception(), batch_size=16)
    evaluator.add(SAMPLES, 0)
    result = evaluator.result()
    chosen = evaluator.reference.positions
    pool = TinyInception()(REAL[chosen])
    assert len(chosen) == 20 and result["settings"]["reference"]["images_compared"] == 20
    assert result["numbers"]["precision"] == metrics.coverage(TinyInception()(SAMPLES), pool)
    assert result["numbers"]["FID"] == pytest.approx(measured()["numbers"]["FID"], rel=1e-6)  # statistics are of all


def test_interval_comes_with_the_extrapolation():
    result = measured(metrics=("fid",), interval=True)
    found = result["interval"]
    assert found["low"] < result["numbers"]["FID"] < found["high"] and found["of"] == "FID"
    assert found["extrapolated"] < result["numbers"]["FID"]  # few samples score too high
    assert "95 % interval" in evaluate.format_result(result)


def test_other_embeddings_are_called_fd_and_never_fid():
    result = measure(SAMPLES, REAL, embedding="pixels")
    assert set(result["numbers"]) == {"FD-pixels", "precision-pixels", "recall-pixels"}
    assert "FID" not in evaluate.format_result({**result, "skipped": {}})
    assert result["settings"]["embedding"] == "pixels" and set(result["skipped"]) == {"sfid", "is"}


def test_config_section_makes_an_evaluator(tmp_path):
    from utils.schema import EvalConfig
    np.savez(tmp_path / "real.npz", arr_0=REAL)
    evaluator = Evaluator.from_config(EvalConfig(ref_path=str(tmp_path / "real.npz"), metrics="fid, precision",
                                                 embedding="pixels", num_images=60))
    assert evaluator.metrics == ("fid", "precision") and evaluator.num_images == 60


# --- what users are told -------------------------------------------------------------------------------------------

def warnings_of(result):
    return "\n".join(result["warnings"])


def test_too_few_samples_are_told():
    result = measure(SAMPLES[:8], REAL, embedding=TinyInception())  # 8 features need 9
    assert "8 samples are too few for 8 features: the covariance is singular" in warnings_of(result)
    assert "60 samples: published numbers use 50000" in warnings_of(measured())


def test_class_sorted_samples_are_told(monkeypatch):
    monkeypatch.setattr(metrics, "IS_SPLIT", 20)
    classes = np.arange(60) // 10
    grey = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3))
    images = (grey[classes] + np.random.default_rng(1).integers(-3, 4, (60, 8, 8, 3))).clip(0, 255).astype(np.uint8)
    order = np.random.default_rng(2).permutation(60)
    by_class, mixed = (measure(samples, REAL, embedding=TinyInception()) for samples in (images, images[order]))
    assert "sorted by class" in warnings_of(by_class) and "sorted by class" not in warnings_of(mixed)
    assert by_class["numbers"]["IS"] < 0.9 * mixed["numbers"]["IS"]  # the number itself stays that of the file order


def test_reference_images_used_as_fid_statistics_are_told(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=REAL)
    result = measure(SAMPLES, tmp_path / "images.npz", embedding=TinyInception())
    assert "reference statistics come from 50 images" in warnings_of(result)
    own = measure(SAMPLES, write_adm_batch(tmp_path / "own.npz", REAL, num_images=50), embedding=TinyInception())
    assert "reference statistics come from 50 images" in warnings_of(own)  # of `python -m fid ref`: the file says how many
    stored = measure(SAMPLES, write_adm_batch(tmp_path / "adm.npz", REAL), embedding=TinyInception())
    assert "reference statistics" not in warnings_of(stored)


def test_other_weights_are_told():
    assert "are not the published ones" in warnings_of(measured(embedding=TinyInception(sha256="ab" * 32)))
    assert "are not the published ones" not in warnings_of(measured())


def test_missing_sfid_statistics_are_told(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(8), sigma=np.eye(8))
    result = measure(SAMPLES, tmp_path / "edm.npz", embedding=TinyInception())
    assert set(result["numbers"]) == {"FID", "IS"}
    assert "needs mu_s and sigma_s" in result["skipped"]["sfid"] and "statistics only" in result["skipped"]["recall"]
    assert "not computed: sfid needs mu_s" in evaluate.format_result(result)
    with pytest.raises(ValueError, match="sfid needs mu_s and sigma_s, which .*edm.npz lacks"):
        Evaluator(tmp_path / "edm.npz", metrics=("sfid",), embedding=TinyInception())


def test_unknown_metrics_and_embeddings_are_told():
    with pytest.raises(ValueError, match="'fidd' is unknown, wanted some of fid, sfid"):
        Evaluator(REAL, metrics=("fidd",), embedding=TinyInception())
    with pytest.raises(ValueError, match="sfid is defined on the inception embedding only"):
        Evaluator(REAL, metrics=("sfid",), embedding="pixels")
    with pytest.raises(ValueError, match="'resnet0' is unknown; wanted inception, pixels, classifier or a timm model"):
        Evaluator(REAL, metrics=("fid",), embedding="resnet0")


def test_statistics_of_other_features_are_told(tmp_path):
    path = write_adm_batch(tmp_path / "ref.npz", REAL)
    with pytest.raises(ValueError, match="statistics are of the inception embedding, the samples' are of pixels"):
        Evaluator(path, metrics=("fid",), embedding="pixels")
    write_adm_batch(path, REAL, embedding="inception", weights_sha256="ab" * 32)
    with pytest.raises(ValueError, match="made with weights sha256 abababab..., the samples are seen with 6726825d"):
        Evaluator(path, metrics=("fid",), embedding=TinyInception())
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="'pool': 5}, inception has {'pool': 8"):
        Evaluator(path, metrics=("fid",), embedding=TinyInception())


def test_features_that_are_not_finite_are_told():
    """From damaged weights; without the check every number would be NaN, or that of another set."""
    embedding = TinyInception()
    embedding.projection[3, 2] = np.nan
    evaluator = Evaluator(REAL, metrics=("fid",), embedding=embedding)
    with pytest.raises(UserError, match="inception: features of batch 4 hold NaN or infinity; its weights are damaged"):
        evaluator.add(SAMPLES, 4)


def test_float_images_are_told():
    """NaN cannot be hidden in uint8: who converts has to look for it first."""
    with pytest.raises(UserError, match=r"got float32 .60, 8, 8, 3., wanted uint8"):
        Evaluator(REAL, metrics=("fid",), embedding=TinyInception()).add(SAMPLES.astype(np.float32), 0)


def test_a_metric_is_added_by_one_line(monkeypatch):
    monkeypatch.setitem(metrics.METRICS, "shift", metrics.Metric(
        lambda evaluator: {"": float(abs(evaluator.pool.mean() - evaluator.reference.pool.mean())), "_count": len(evaluator.pool)},
        "Shift", "shift", images=True))
    numbers = measured(metrics="fid, shift")["numbers"]
    pools = [TinyInception()(images).mean() for images in (SAMPLES, REAL)]
    assert numbers["Shift"] == pytest.approx(float(abs(pools[0] - pools[1])), rel=1e-5) and numbers["Shift_count"] == 60
    assert set(measure(SAMPLES, REAL, metrics="shift", embedding="pixels")["numbers"]) == {"shift-pixels", "shift-pixels_count"}


def test_doubled_missing_and_miscounted_batches_are_told():
    evaluator = Evaluator(REAL, metrics=("fid",), embedding=TinyInception(), num_images=9)
    evaluator.add(SAMPLES[:4], 0)
    with pytest.raises(ValueError, match="num_images=9 were announced, 4 came"):
        evaluator.result()
    evaluator.add(SAMPLES[:5], 2)
    with pytest.raises(ValueError, match=r"batches \[0, 2\] over all processes, wanted each of 0, 1, 2"):
        evaluator.result()
    evaluator.reset()
    for _ in range(2):
        evaluator.add(SAMPLES[:4], 0)
    with pytest.raises(ValueError, match=r"batches \[0, 0\] over all processes, wanted each of 0, 1, 2"):
        evaluator.result()
