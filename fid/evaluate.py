"""Evaluator: images in, the table's numbers out; on one process or many, in a script or inside training."""

import json
import os
import platform
from pathlib import Path

import numpy as np
import torch

from fid import metrics, statistics
from fid.embeddings import PUBLISHED_SHA256_PREFIX, make_embedding
from fid.metrics import METRICS, TABLE
from fid.sources import Source, holds, random_positions
from fid.statistics import FeatureStream
from utils import distributed
from utils.cli import UserError
from utils.files import told, write_whole

PUBLISHED_COUNT = 50_000        # samples behind a published number
REFERENCE_IMAGES = 10_000       # reference images whose features precision, recall and KID look at, as in ADM's batches
ADM_CONVERSION = "floor((x + 1) * 127.5)"
NO_IMAGES = "needs reference images and {} holds statistics only (no arr_0); give an ADM batch or an image set"


class Reference:
    """What samples are compared with: stored statistics (an ADM batch, an EDM npz, our own file), an image set, or both.

    reference: path of either, or an array (N, H, W, 3) uint8.
    """

    def __init__(self, reference):
        is_path = isinstance(reference, (str, os.PathLike))
        self.name = str(reference) if is_path else "array"
        # gaussians: {tap: (mu, sigma)}; settings: how stored ones were made, maybe empty; both None where nothing is stored
        self.gaussians, self.settings = statistics.load_statistics(reference) if self.name.endswith(".npz") else (None, None)
        self.stored = self.gaussians is not None
        self.images = Source(reference) if not self.stored or holds(reference, "arr_0") else None
        self.num_images = self.settings.get("num_images") if self.stored else len(self.images)  # None if the file does not say
        self.pool = ()           # features (M, d) of reference images
        self.positions = None    # which images of the set those are, (M,)
        self.embedding = None    # whose features they are

    def prepare(self, embedding, keep, batch_size, seed):
        """Compute what is not stored, once: statistics of all images, and with `keep` the features of up to REFERENCE_IMAGES.

        Every process has to call.
        """
        if self.embedding not in (None, embedding):
            raise UserError(f"{self.name}: this Reference already holds features of {self.embedding.name}; "
                            "open another one for another embedding")
        self.embedding = embedding
        if self.gaussians is not None and (len(self.pool) or not keep):
            return
        kept = np.zeros(len(self.images), dtype=bool)
        if keep:
            self.positions = random_positions(len(self.images), min(REFERENCE_IMAGES, len(self.images)), seed)
            kept[self.positions] = True
        stream = FeatureStream(embedding)
        stream.add_source(self.images, batch_size, "reference", kept, self.positions if self.stored else None)
        self.pool = stream.pool()
        if not self.stored:
            self.gaussians = stream.gaussians()


class Evaluator:
    """Takes generated images batch by batch and gives the numbers.

    reference: see Reference; one Reference can serve several evaluators.
    metrics: names in METRICS, as a tuple or "fid,sfid"; None computes those of TABLE that the reference and the embedding can serve.
    embedding: name (see fid.embeddings.make_embedding) or an embedding; weights: its weights, None the default place.
    num_images: how many images will come, checked at the end; None accepts any number.
    interval: also a confidence interval and the extrapolation of FID.
    keep_features: hold on to features for save_neighbours, whatever the metrics.
    conversion: how floats became uint8, for the record.
    Draws no global random numbers and leaves torch's settings alone. Raises UserError before any work.
    """

    def __init__(self, reference, metrics=None, embedding="inception", weights=None, num_images=None, interval=False,
                 keep_features=False, batch_size=64, seed=0, conversion=ADM_CONVERSION):
        self.reference = reference if isinstance(reference, Reference) else Reference(reference)
        self.embedding = make_embedding(embedding, weights) if isinstance(embedding, str) else embedding
        self.metrics, self.skipped = choose_metrics(metrics, self.embedding.name, self.reference)
        check_counts(self.metrics, interval, num_images, self.reference)
        if self.reference.stored:
            check_stored(self.reference, self.embedding)
        self.num_images, self.interval, self.batch_size, self.seed = num_images, interval, batch_size, seed
        self.conversion = conversion
        chosen = [METRICS[name] for name in self.metrics]
        self.keeps_reference = keep_features or any(metric.images for metric in chosen)
        self.keeps_samples = keep_features or interval or any(not metric.tap for metric in chosen)
        self.reset()

    @classmethod
    def from_config(cls, config):
        """An Evaluator from the `eval` section of a config (utils.schema.EvalConfig)."""
        if not config.ref_path:
            raise UserError("eval.ref_path is empty; give reference statistics (.npz) or reference images")
        return cls(config.ref_path, config.metrics, config.embedding, config.weights, config.num_images)

    def reset(self):
        """Forget the samples, to evaluate another model against the same reference."""
        self.stream = FeatureStream(self.embedding)

    def add(self, images, batch_index):
        """images: (B, H, W, 3) uint8, numpy or torch; batch_index: its place among the global batches; rank k mod W adds batch k."""
        self.stream.add(images, batch_index, self.keeps_samples)

    def add_all(self, source):
        """Add all images of a fid.sources.Source, each process its share."""
        self.stream.add_source(source, self.batch_size, "samples", self.keeps_samples)

    def result(self):
        """{"numbers": name -> float, "settings": ..., "warnings": [...], "skipped": metric -> why}, the same on every process.

        Every process has to call. With `interval` also "interval".
        """
        count = self.stream.count()
        if self.num_images not in (None, count):
            raise ValueError(f"num_images={self.num_images} were announced, {count} came; a batch was left out or doubled")
        check_counts(self.metrics, self.interval, count, self.reference)
        self.reference.prepare(self.embedding, self.keeps_reference, self.batch_size, self.seed)
        self.gaussians, self.pool = self.stream.gaussians(), self.stream.pool()
        return distributed.broadcast_object(self._compute(count) if distributed.is_main() else None)

    def _compute(self, count):
        numbers, self.warnings = {}, count_warnings(self.embedding, count, self.reference)
        for metric in (METRICS[name] for name in self.metrics):
            found, title = metric.compute(self), metric.name(self.embedding.name)
            numbers |= {title + suffix: number for suffix, number in found.items()} if isinstance(found, dict) else {title: found}
        reference = self.reference
        settings = {
            "num_images": count, "image_size": self.stream.image_size, "conversion": self.conversion, **embedding_settings(self.embedding),
            "batch_size": max(num for _, num in self.stream.counts), "seed": self.seed, "metrics": list(self.metrics),
            "is_split": metrics.IS_SPLIT, "neighbours": metrics.NEIGHBOURS, "covariance_ddof": 1,
            "kid_subsets": metrics.KID_SUBSETS, "kid_subset_size": metrics.KID_SUBSET_SIZE,
            "reference": {"name": reference.name, "statistics": "stored" if reference.stored else "computed from its images",
                          "num_images": reference.num_images, "images_compared": len(reference.pool)},
        }
        result = {"numbers": numbers, "settings": settings, "warnings": self.warnings, "skipped": self.skipped}
        if self.interval:
            result["interval"] = {"of": METRICS["fid"].name(self.embedding.name), "level": 0.95,
                                  **metrics.distance_interval(reference.gaussians["pool"], self.pool, seed=self.seed)}
        return result


def embedding_settings(embedding):
    """What has to be known of an embedding, and of the software, to repeat its features."""
    return {"embedding": embedding.name, "dim": embedding.dims["pool"], **embedding.settings, "arithmetic": "float32, no TF32",
            "device": embedding.device.type, "software": f"python {platform.python_version()}, torch {torch.__version__}, "
                                                         f"numpy {np.__version__}"}


def choose_metrics(wanted, embedding_name, reference):
    """(metrics to compute, {metric: why not}). Raises UserError if a metric was asked for by name and cannot be had."""
    if isinstance(wanted, str):
        wanted = [name.strip() for name in wanted.split(",") if name.strip()]
    obstacles = {}
    for name, metric in METRICS.items():
        if embedding_name != "inception" and not metric.other:
            obstacles[name] = f"is defined on the inception embedding only, not on {embedding_name}"
        elif metric.images and reference.images is None:
            obstacles[name] = NO_IMAGES.format(reference.name)
        elif metric.tap == "spatial" and reference.stored and "spatial" not in reference.gaussians:
            obstacles[name] = (f"needs mu_s and sigma_s, which {reference.name} lacks (an EDM reference serves FID only); "
                               "give an ADM batch or make a file with `python -m fid ref`")
    if not wanted:
        return tuple(name for name in TABLE if name not in obstacles), {name: obstacles[name] for name in TABLE if name in obstacles}
    for name in wanted:
        if name not in METRICS:
            raise UserError(f"metrics: {name!r} is unknown, wanted some of {', '.join(METRICS)}")
        if name in obstacles:
            raise UserError(f"metrics: {name} {obstacles[name]}")
    return tuple(wanted), {}


def check_counts(wanted, interval, num_images, reference):
    """Raise UserError if there are too few samples (num_images, None if unknown) or reference images to compute anything."""
    for name in wanted:
        metric, counts = METRICS[name], {"samples": num_images}
        if metric.images or metric.tap and not reference.stored:
            counts[f"reference images in {reference.name}"] = len(reference.images)
        for what, count in counts.items():
            if count is not None and count < metric.least:
                raise UserError(f"{name}: {count} {what}, wanted at least {metric.least} (and thousands for a number to be believed)")
    if interval and num_images is not None and num_images < 2 * metrics.GROUPS:
        raise UserError(f"interval: {num_images} samples, wanted at least {2 * metrics.GROUPS}")


def check_stored(reference, embedding):
    """Raise UserError if stored statistics are not of this embedding's features."""
    made_with = reference.settings.get("embedding", "inception")  # ADM's and EDM's files do not say
    if made_with != embedding.name:
        raise UserError(f"{reference.name}: its statistics are of the {made_with} embedding, the samples' are of "
                        f"{embedding.name}; make a reference with `python -m fid ref --embedding {embedding.name}`")
    dims = {tap: len(mu) for tap, (mu, _) in reference.gaussians.items()}
    if not dims.items() <= embedding.dims.items():
        raise UserError(f"{reference.name}: its statistics have these numbers of features: {dims}, {embedding.name} has {embedding.dims}")
    theirs, ours = reference.settings.get("weights_sha256"), embedding.settings.get("weights_sha256")
    if theirs not in (None, ours):
        raise UserError(f"{reference.name}: made with weights sha256 {theirs[:8]}..., the samples are seen with {ours[:8]}...; "
                        "use one weights file for both")


def count_warnings(embedding, count, reference):
    """What a reader of the numbers should know about how many images are behind them, and which weights."""
    dim, published = embedding.dims["pool"], PUBLISHED_COUNT
    references = reference.num_images or published  # a file that does not say how many is one of the published ones
    few = (f"{{}} are too few for {dim} features: the covariance is singular and {METRICS['fid'].name(embedding.name)} far too high; "
           f"use at least {dim + 1}, and compare only equal numbers of samples")
    table = [(count <= dim, few.format(f"{count} samples")), (references <= dim, few.format(f"{references} reference images"))]
    if embedding.name == "inception":
        sha256 = embedding.settings["weights_sha256"][:8]
        table += [
            (dim < count < published, f"{count} samples: published numbers use {published}, and fewer samples give a higher FID; "
             "compare only equal numbers of samples (--interval also estimates the limit of many)"),
            (dim < references < published, f"the reference statistics come from {references} images ({reference.name}), not from a "
             "whole training set: published ImageNet FIDs use the mu and sigma stored in ADM's or EDM's file"),
            (sha256 != PUBLISHED_SHA256_PREFIX, f"the Inception weights (sha256 {sha256}...) are not the published ones "
             f"({PUBLISHED_SHA256_PREFIX}...): these numbers compare with no table")]
    return [warning for applies, warning in table if applies]


def format_result(result):
    """The numbers, interval and warnings as text for people, one item a line."""
    width = max(map(len, result["numbers"]))
    lines = [f"{name:>{width}}  {value:.6g}" for name, value in result["numbers"].items()]
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
        with told(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with write_whole(path) as temporary:
                temporary.write_text(json.dumps(result, indent=2) + "\n")
    distributed.barrier()


def save_neighbours(path, source, evaluator, num_samples=8, num_neighbours=5):
    """Save a grid of the samples of `source` nearest to real images: on each row one, then its nearest real images.

    evaluator: with keep_features, and its result computed.
    """
    from utils.images import save_grid
    reference = evaluator.reference
    rows, indices, ratios = metrics.closest_pairs(evaluator.pool, reference.pool, num_samples, num_neighbours)
    images = [np.concatenate([source.read([row]), reference.images.read(reference.positions[near])]) for row, near in zip(rows, indices)]
    with told(path), write_whole(path) as temporary:
        save_grid(temporary, np.concatenate(images), labels=[f"{ratio:.2f}" for ratio in ratios], columns=1 + indices.shape[1],
                  column_labels=["sample"] + ["real"] * indices.shape[1],
                  title="Nearest real images (0 = copied, about 1 = as new as real images)")


def check_neighbours(source, reference):
    """Raise UserError if a picture of both cannot be made."""
    if reference.images is None:
        raise UserError("--neighbours " + NO_IMAGES.format(reference.name))
    if source.size != reference.images.size:
        raise UserError(f"--neighbours shows both side by side, but samples are {source.size} and reference images "
                        f"{reference.images.size} pixels; give reference images of the samples' size")
