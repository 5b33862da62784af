"""Evaluator: images in, the table's numbers out; on one process or many, in a script or inside training."""

import json
import os
import platform
from pathlib import Path

import numpy as np
import torch

from fid import interval, metrics, statistics
from fid.embeddings import make_embedding
from fid.inception import PUBLISHED_SHA256_PREFIX, check_images
from fid.sources import batches, has_images, open_source
from fid.statistics import RunningStatistics
from utils import distributed
from utils.cli import UserError
from utils.logging import Progress

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")
TABLE = METRICS[:5]             # what is computed if nothing is asked for
NEEDS_INCEPTION = ("sfid", "is")
NEEDS_IMAGES = ("precision", "recall", "kid")
NEIGHBOURS = 3                  # k of precision and recall
PUBLISHED_COUNT = 50_000        # samples behind a published number
REFERENCE_IMAGES = 10_000       # reference images that precision, recall and KID look at, as in ADM's batches
SORTED_RATIO = 1.1              # Inception Score of shuffled over file-order splits from which the order has spoiled it
ADM_CONVERSION = "floor((x + 1) * 127.5)"


class FeatureStream:
    """Features of one image set, collected batch by batch on every process."""

    def __init__(self, embedding, spatial=False):
        self.embedding = embedding
        self.running = {"pool": RunningStatistics(embedding.dim, embedding.device)}
        if spatial:
            self.running["spatial"] = RunningStatistics(embedding.spatial_dim, embedding.device)
        self.kept = {}         # batch_index -> features (n, d)
        self.counts = {}       # batch_index -> images in it
        self.image_size = None

    def add(self, images, batch_index, keep):
        """images: (B, H, W, 3) uint8; keep: bool (B,), whose features to hold on to (None: nobody's)."""
        check_images(images)
        self._check_batch(tuple(images.shape[1:3]), batch_index)
        if "spatial" in self.running:
            features, spatial = self.embedding.both_taps(images)
            self.running["spatial"].add(spatial)
        else:
            features = self.embedding(images)
        self.running["pool"].add(features)
        self.counts[batch_index] = len(features)
        if keep is not None:
            self.kept[batch_index] = features[torch.as_tensor(keep, device=features.device)]

    def _check_batch(self, size, batch_index):
        if self.image_size not in (None, size):
            raise UserError(f"images: mixed sizes, {self.image_size} before and {size} in batch {batch_index}; "
                            "crop and resize all images to one size first")
        if batch_index in self.counts:
            raise UserError(f"batch_index {batch_index} was given twice; number the global batches 0, 1, 2, ...")
        self.image_size = size

    def total_counts(self):
        """batch_index -> number of images, over all processes. Raises ValueError if a batch is doubled or missing."""
        parts = distributed.all_gather_object((self.counts, self.image_size))
        given = sorted(index for counts, _ in parts for index in counts)
        if given != list(range(len(given))):
            raise UserError(f"batches {given[:20]} over all processes, wanted each of 0, 1, 2, ... once; "
                            "give batch k to rank k mod the number of processes")
        sizes = {size for _, size in parts} - {None}
        if len(sizes) > 1:
            raise UserError(f"images: mixed sizes {sorted(sizes)} over the processes; crop and resize all to one size first")
        return {index: count for counts, _ in parts for index, count in counts.items()}

    def statistics(self, name):
        """tap -> Gaussian over all processes."""
        return {tap: running.merged(name) for tap, running in self.running.items()}

    def pool(self):
        """The kept features (N, d) in the order of the batches, on every process."""
        parts = distributed.all_gather_object({index: len(rows) for index, rows in self.kept.items()})
        lengths = {index: length for part in parts for index, length in part.items()}
        ends = dict(zip(sorted(lengths), np.cumsum([lengths[index] for index in sorted(lengths)]).tolist()))
        pool = torch.zeros(sum(lengths.values()), self.embedding.dim, device=self.embedding.device)
        for index, rows in self.kept.items():
            pool[ends[index] - len(rows):ends[index]] = rows
        return distributed.all_reduce_sum(pool)  # every row is nonzero on one process only: exact


class Reference:
    """What samples are compared with: stored statistics (an ADM batch, an EDM npz, our own file), an image set, or both.

    reference: path of either, or an array (N, H, W, 3) uint8.
    """

    def __init__(self, reference):
        is_path = isinstance(reference, (str, os.PathLike))
        self.name = str(reference) if is_path else "array"
        self.stored = statistics.load_statistics(reference) if self.name.endswith(".npz") else None
        self.images = open_source(reference) if self.stored is None or has_images(reference) else None
        self.statistics = None   # tap -> Gaussian
        self.pool = None         # features (M, d) of reference images
        self.positions = None    # which images of the set those are, (M,)
        self.embedding = None    # whose features they are

    def prepare(self, embedding, spatial, keep, batch_size, seed):
        """Compute what is not stored, once: statistics of all images, and with `keep` the features of up to REFERENCE_IMAGES.

        Every process has to call.
        """
        if self.embedding not in (None, embedding):
            raise UserError(f"{self.name}: this Reference already holds features of {self.embedding.name}; "
                            "open another one for another embedding")
        self.embedding = embedding
        if self.stored is not None:
            self.statistics = {"pool": self.stored.pool, "spatial": self.stored.spatial}
        if keep and self.positions is None:
            rng = np.random.default_rng(seed)
            num = min(REFERENCE_IMAGES, len(self.images))
            self.positions = np.sort(rng.choice(len(self.images), num, replace=False))
        if self.statistics is None or (spatial and "spatial" not in self.statistics) or (keep and self.pool is None):
            self._compute(embedding, spatial, keep, batch_size)

    def _compute(self, embedding, spatial, keep, batch_size):
        stream = FeatureStream(embedding, spatial)
        wanted = np.zeros(len(self.images), dtype=bool)
        if keep:
            wanted[self.positions] = True
        everything = self.stored is None
        places = np.arange(len(self.images)) if everything else self.positions
        with Progress(len(places), "reference", "images") as progress:
            for index, images in batches(self.images, batch_size, places):
                rows = places[index * batch_size:(index + 1) * batch_size]
                stream.add(images, index, wanted[rows] if keep else None)
                _advance(progress, len(images))
        if everything:
            self.statistics = stream.statistics(self.name)
        if keep:
            self.pool = stream.pool()


class Evaluator:
    """Takes generated images batch by batch and gives the numbers.

    reference: see Reference; one Reference can serve several evaluators.
    metrics: of METRICS; None computes those of TABLE that the reference and the embedding can serve.
    embedding: name (see fid.embeddings.make_embedding) or an embedding; weights: its weights, None the default place.
    num_images: how many images will come, checked at the end; None accepts any number.
    interval: also a confidence interval and the extrapolation of FID. keep_features: hold on to features for `samples()`.
    conversion: how floats became uint8, for the record.
    Draws no global random numbers and leaves torch's settings alone. Raises ValueError or FileNotFoundError before any work.
    """

    def __init__(self, reference, metrics=None, embedding="inception", weights=None, num_images=None, interval=False,
                 keep_features=False, batch_size=64, seed=0, conversion=ADM_CONVERSION, device=None):
        self.reference = reference if isinstance(reference, Reference) else Reference(reference)
        name = embedding if isinstance(embedding, str) else embedding.name
        self.metrics, self.skipped = choose_metrics(metrics, name, self.reference)
        check_counts(self.metrics, interval, num_images, self.reference)
        self.embedding = make_embedding(embedding, weights, device) if isinstance(embedding, str) else embedding
        check_stored(self.reference, self.embedding)
        self.num_images, self.interval, self.batch_size, self.seed = num_images, interval, batch_size, seed
        self.conversion = conversion
        self.keeps_reference = keep_features or any(metric in NEEDS_IMAGES for metric in self.metrics)
        self.keeps_samples = self.keeps_reference or interval or "is" in self.metrics
        self.reset()

    @classmethod
    def from_config(cls, config):
        """An Evaluator from the `eval` section of a config (utils.config.EvalConfig)."""
        if not config.ref_path:
            raise UserError("eval.ref_path is empty; give reference statistics (.npz) or reference images")
        return cls(config.ref_path, parse_metrics(config.metrics), config.embedding, config.weights, config.num_images)

    def reset(self):
        """Forget the samples, to evaluate another model against the same reference."""
        self.stream = FeatureStream(self.embedding, "sfid" in self.metrics)

    def add(self, images, batch_index):
        """images: (B, H, W, 3) uint8, numpy or torch; batch_index: its place among the global batches.

        Each process adds its own batches, batch k on rank k mod W.
        """
        self.stream.add(images, batch_index, np.ones(len(images), dtype=bool) if self.keeps_samples else None)

    def samples(self):
        """Features (N, d) of the samples in file order, on every process; every process has to call."""
        return self.stream.pool()

    def result(self):
        """{"numbers": name -> float, "settings": ..., "warnings": [...], "skipped": metric -> why}, the same on every process.

        Every process has to call. With `interval` also "interval".
        """
        count = sum(self.stream.total_counts().values())
        if self.num_images not in (None, count):
            raise UserError(f"num_images={self.num_images} were announced, {count} came; a batch was left out or doubled")
        sfid = "sfid" in self.metrics
        self.reference.prepare(self.embedding, sfid, self.keeps_reference, self.batch_size, self.seed)
        gaussians = self.stream.statistics("images")
        pool = self.stream.pool() if self.keeps_samples else None
        return distributed.broadcast_object(self._compute(gaussians, pool, count) if distributed.is_main() else None)

    def _compute(self, gaussians, pool, count):
        numbers, warnings = {}, count_warnings(self.embedding, count, self.reference)
        names = display_names(self.embedding.name)
        for metric, tap in (("fid", "pool"), ("sfid", "spatial")):
            if metric in self.metrics:
                numbers[names[metric]] = self._distance(gaussians, tap)
        if "is" in self.metrics:
            numbers[names["is"]], warning = self._inception_score(pool)
            warnings += warning
        if "precision" in self.metrics or "recall" in self.metrics:
            both = dict(zip(("precision", "recall"), metrics.precision_recall(self.reference.pool, pool, NEIGHBOURS)))
            numbers |= {names[metric]: both[metric] for metric in both if metric in self.metrics}
        if "kid" in self.metrics:
            numbers[names["kid"]], numbers[names["kid"] + "_std"] = metrics.kid(self.reference.pool, pool, seed=self.seed)
        result = {"numbers": numbers, "settings": self._settings(count), "warnings": warnings, "skipped": self.skipped}
        if self.interval:
            result["interval"] = self._interval(pool, names["fid"])
        return result

    def _distance(self, gaussians, tap):
        reference = self.reference.statistics[tap]
        return metrics.frechet_distance(reference.mu, reference.sigma, gaussians[tap].mu, gaussians[tap].sigma)

    def _inception_score(self, pool):
        """The score in file order, and a warning (a list of none or one) if that order is what makes it low."""
        logs = metrics.class_log_probabilities(pool, self.embedding.class_weight)
        score = float(np.mean(metrics.split_scores(logs, metrics.IS_SPLIT)))
        if len(logs) <= metrics.IS_SPLIT:
            return score, []
        order = torch.as_tensor(np.random.default_rng(self.seed).permutation(len(logs)), device=logs.device)
        shuffled = float(np.mean(metrics.split_scores(logs[order], metrics.IS_SPLIT)))
        if shuffled < SORTED_RATIO * score:
            return score, []
        return score, [f"IS is {score:.4g} in file order and {shuffled:.4g} shuffled: the samples look sorted by class, which "
                       f"ruins it, because it is computed on splits of {metrics.IS_SPLIT}; mix the classes (generate.py does "
                       "when it draws a class per seed)"]

    def _interval(self, pool, name):
        gaussian = self.reference.statistics["pool"]
        low, high, error = interval.jackknife_interval((gaussian.mu, gaussian.sigma), pool, seed=self.seed)
        limit = interval.extrapolated_distance((gaussian.mu, gaussian.sigma), pool, seed=self.seed)
        return {"of": name, "level": 0.95, "low": low, "high": high, "standard_error": error, "extrapolated": limit}

    def _settings(self, count):
        reference = self.reference
        return {
            "num_images": count, "image_size": list(self.stream.image_size), "conversion": self.conversion,
            **embedding_settings(self.embedding), "batch_size": self.stream.counts[0], "seed": self.seed,
            "metrics": list(self.metrics), "is_split": metrics.IS_SPLIT, "neighbours": NEIGHBOURS, "covariance_ddof": 1,
            "kid_subsets": metrics.KID_SUBSETS, "kid_subset_size": metrics.KID_SUBSET_SIZE,
            "reference": {
                "name": reference.name, "statistics": "computed from its images" if reference.stored is None else "stored",
                "num_images": reference.statistics["pool"].num_images,
                "images_compared": len(reference.pool) if reference.pool is not None else 0,
            },
        }


def embedding_settings(embedding):
    """What has to be known of an embedding, and of the software, to repeat its features."""
    return {"embedding": embedding.name, "dim": embedding.dim, **embedding.settings, "arithmetic": "float32, no TF32",
            "device": embedding.device.type, "software": f"python {platform.python_version()}, torch {torch.__version__}, "
                                                         f"numpy {np.__version__}"}


def display_names(embedding_name):
    """metric -> the name its number goes by; only Inception's Frechet distance is called FID."""
    if embedding_name == "inception":
        return {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall", "kid": "KID"}
    return {"fid": f"FD-{embedding_name}", "kid": f"KD-{embedding_name}",
            "precision": f"precision-{embedding_name}", "recall": f"recall-{embedding_name}"}


def parse_metrics(text):
    """"fid, sfid" -> ("fid", "sfid"); empty or None -> None, which takes what the reference can serve."""
    return tuple(name.strip() for name in text.split(",")) if text else None


def choose_metrics(wanted, embedding_name, reference):
    """(metrics to compute, {metric: why not}). Raises ValueError if a metric was asked for by name and cannot be had."""
    obstacles = {}
    if embedding_name != "inception":
        obstacles |= {metric: f"is defined on the inception embedding only, not on {embedding_name}" for metric in NEEDS_INCEPTION}
    if reference.images is None:
        obstacles |= {metric: f"needs reference images and {reference.name} holds statistics only (no arr_0); "
                              "give an ADM batch or an image set" for metric in NEEDS_IMAGES}
    if reference.stored is not None and reference.stored.spatial is None:
        obstacles.setdefault("sfid", f"needs mu_s and sigma_s, which {reference.name} lacks (an EDM reference serves FID "
                                     "only); give an ADM batch or make a file with `python -m fid ref`")
    if wanted is None:
        return tuple(metric for metric in TABLE if metric not in obstacles), {m: obstacles[m] for m in TABLE if m in obstacles}
    for metric in wanted:
        if metric not in METRICS:
            raise UserError(f"metrics: {metric!r} is unknown, wanted some of {', '.join(METRICS)}")
        if metric in obstacles:
            raise UserError(f"metrics: {metric} {obstacles[metric]}")
    return tuple(wanted), {}


def check_counts(metrics, interval_wanted, num_images, reference):
    """Raise ValueError if there are too few samples (num_images, None if unknown) or reference images to compute anything."""
    needs = {metric: 2 for metric in metrics} | {metric: NEIGHBOURS + 1 for metric in ("precision", "recall") if metric in metrics}
    compared = len(reference.images) if reference.images is not None else None
    for metric, least in needs.items():
        from_images = metric in NEEDS_IMAGES or metric in ("fid", "sfid") and reference.stored is None
        for what, count in (("samples", num_images), (f"reference images in {reference.name}", compared if from_images else None)):
            if count is not None and count < least:
                raise UserError(f"{metric}: {count} {what}, wanted at least {least} (and thousands for a number that can be believed)")
    if interval_wanted and num_images is not None and num_images < 2 * interval.GROUPS:
        raise UserError(f"interval: {num_images} samples, wanted at least {2 * interval.GROUPS}")


def check_stored(reference, embedding):
    """Raise ValueError if stored statistics are not of this embedding's features."""
    if reference.stored is None:
        return
    settings = reference.stored.settings
    made_with = settings.get("embedding", "inception")  # ADM's and EDM's files do not say
    if made_with != embedding.name:
        raise UserError(f"{reference.name}: its statistics are of the {made_with} embedding, the samples' are of "
                        f"{embedding.name}; make a reference with `python -m fid ref --embedding {embedding.name}`")
    for gaussian, dim in ((reference.stored.pool, embedding.dim), (reference.stored.spatial, getattr(embedding, "spatial_dim", 0))):
        if gaussian is not None and len(gaussian.mu) != dim:
            raise UserError(f"{reference.name}: statistics of {len(gaussian.mu)} features, {embedding.name} has {dim}")
    theirs, ours = settings.get("weights_sha256"), embedding.settings.get("weights_sha256")
    if theirs is not None and theirs != ours:
        raise UserError(f"{reference.name}: made with weights sha256 {theirs[:8]}..., the samples are seen with {ours[:8]}...; "
                        "use one weights file for both")


def count_warnings(embedding, count, reference):
    """What a reader of the numbers should know about how many images are behind them, and which weights."""
    warnings = []
    name = display_names(embedding.name)["fid"]
    gaussian = reference.statistics["pool"]
    for what, number in (("samples", count), ("reference images", gaussian.num_images)):
        if number is not None and number < embedding.dim + 1:
            warnings.append(f"{number} {what} are too few for {embedding.dim} features: the covariance is singular and {name} far "
                            f"too high; use at least {embedding.dim + 1}, and compare only equal numbers of samples")
    if embedding.name != "inception":
        return warnings
    if embedding.dim < count < PUBLISHED_COUNT:
        warnings.append(f"{count} samples: published numbers use {PUBLISHED_COUNT}, and fewer samples give a higher FID; "
                        "compare only equal numbers of samples (--interval also estimates the limit of many)")
    if gaussian.num_images is not None and embedding.dim < gaussian.num_images < PUBLISHED_COUNT:
        warnings.append(f"the reference statistics come from {gaussian.num_images} images ({reference.name}), not from a whole "
                        "training set: published ImageNet FIDs use the mu and sigma stored in ADM's or EDM's file")
    if not embedding.settings["weights_sha256"].startswith(PUBLISHED_SHA256_PREFIX):
        warnings.append(f"the Inception weights (sha256 {embedding.settings['weights_sha256'][:8]}...) are not the published "
                        f"ones ({PUBLISHED_SHA256_PREFIX}...): these numbers compare with no table")
    return warnings


def _advance(progress, num_images):
    """All processes have done about as many images as this one; the last round of batches may be incomplete."""
    progress.update(min(num_images * distributed.world_size(), progress.total - progress.done))


def add_all(evaluator, source, what="images"):
    """Give an evaluator all images of a source (this process's share), with progress under the name `what`."""
    with Progress(len(source), what, "images") as progress:
        for index, images in batches(source, evaluator.batch_size):
            evaluator.add(images, index)
            _advance(progress, len(images))


def measure(images, reference, **options):
    """Numbers of an image set against a reference. images: what open_source takes, or a source; options: as Evaluator."""
    source = images if hasattr(images, "read") else open_source(images)
    evaluator = Evaluator(reference, num_images=len(source), conversion="as stored", **options)
    add_all(evaluator, source)
    return evaluator.result()


def make_reference(source, embedding, batch_size=64):
    """Statistics of a whole image set, to be saved with fid.statistics.save_statistics; every process has to call."""
    stream = FeatureStream(embedding, spatial=embedding.name == "inception")
    with Progress(len(source), "reference", "images") as progress:
        for index, images in batches(source, batch_size):
            stream.add(images, index, None)
            _advance(progress, len(images))
    gaussians = stream.statistics(source.name)
    settings = {**embedding_settings(embedding), "conversion": "as stored", "num_images": gaussians["pool"].num_images}
    return statistics.Stored(gaussians["pool"], gaussians.get("spatial"), settings)


def format_result(result):
    """The numbers, interval and warnings as text for people, one item a line."""
    lines = [f"{name:>{max(map(len, result['numbers']))}}  {value:.6g}" for name, value in result["numbers"].items()]
    if "interval" in result:
        found = result["interval"]
        lines.append(f"{found['of']} 95 % interval {found['low']:.6g} .. {found['high']:.6g}; "
                     f"extrapolated to infinitely many samples {found['extrapolated']:.6g}")
    lines += [f"not computed: {metric} {why}" for metric, why in result["skipped"].items()]
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n".join(lines)


def save_result(path, result):
    """Write a result as JSON on rank 0; the others wait until it is there."""
    if distributed.is_main():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
    distributed.barrier()
