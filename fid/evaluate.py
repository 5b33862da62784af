"""Evaluator: images in, numbers out; on one process or many, in a script or inside training."""

import json
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fid import metrics
from fid.embeddings import PUBLISHED_SHA256_PREFIX, make_embedding
from fid.metrics import METRICS, TABLE
from fid.sources import Source, holds, random_positions
from fid.statistics import FeatureStream, load_statistics
from utils import distributed
from utils.cli import UserError
from utils.files import told, write_whole

PUBLISHED_COUNT = 50_000   # samples behind a published number
REFERENCE_IMAGES = 10_000  # most reference images that precision, recall and KID look at, as in ADM's batches
NO_IMAGES = "needs reference images and {} holds statistics only (no arr_0); give an ADM batch or an image set"


class Reference:
    """What samples are compared with: stored statistics (an ADM batch, an EDM npz, our own file), an image set, or both.

    reference: path of either, or an array (N, H, W, 3) uint8.
    """

    def __init__(self, reference):
        self.name = "array" if hasattr(reference, "shape") else str(reference)
        self.gaussians, self.settings = load_statistics(reference) if self.name.endswith(".npz") else ({}, {})
        self.stored = "pool" in self.gaussians
        self.images = Source(reference) if not self.stored or holds(reference, "arr_0") else None
        self.num_images = self.settings.get("num_images") if self.stored else len(self.images)  # None if the file does not say
        self.pool, self.positions = (), None  # features (M, d) of some of the images, and which ones those are (M,)

    def use(self, embedding):
        """Compare this embedding's features. Raises UserError if stored statistics are of others."""
        self.embedding = embedding
        if not self.stored:
            return
        name, ours = self.embedding.name, self.embedding.settings.get("weights_sha256")
        made_with, theirs = self.settings.get("embedding", "inception"), self.settings.get("weights_sha256", ours)  # ADM and EDM do not say
        if made_with != name:
            raise UserError(f"{self.name}: its statistics are of the {made_with} embedding, the samples' are of {name}; "
                            f"make a reference with `python -m fid ref --embedding {name}`")
        dims = {tap: len(mu) for tap, (mu, _) in self.gaussians.items()}
        if not dims.items() <= self.embedding.dims.items():
            raise UserError(f"{self.name}: its statistics have these numbers of features: {dims}, {name} has {self.embedding.dims}")
        if theirs != ours:
            raise UserError(f"{self.name}: made with weights sha256 {theirs[:8]}..., the samples are seen with {ours[:8]}...; "
                            "use one weights file for both")

    def prepare(self, keep, batch_size, seed):
        """Compute what is not stored: statistics of all images, and with `keep` the features of up to REFERENCE_IMAGES. Collective."""
        if "pool" in self.gaussians and (len(self.pool) or not keep):
            return
        every = np.arange(len(self.images))
        self.positions = random_positions(len(every), min(REFERENCE_IMAGES, len(every)), seed) if keep else every[:0]
        others = every[:0] if self.stored else np.setdiff1d(every, self.positions)
        stream = FeatureStream(self.embedding)
        for positions, kept in ((self.positions, True), (others, False)):
            if len(positions):
                stream.add_source(self.images, batch_size, "reference", kept, positions)
        self.pool = stream.pool()
        if not self.stored:
            self.gaussians = stream.gaussians()


class Evaluator:
    """Takes generated images batch by batch and gives the numbers.

    reference: see Reference. interval: also give a confidence interval and the extrapolation of FID.
    metrics: names in METRICS, as a tuple or "fid,sfid"; None: those of TABLE that the reference and the embedding can serve.
    embedding: its name (see fid.embeddings.make_embedding), or the embedding itself. weights: its weights; None: the usual place.
    num_images: how many images will come, checked at the end; None: any number.
    keep_features: keep those that save_neighbours needs. conversion: how floats became uint8, for the settings.
    Draws no global random numbers and leaves torch's settings alone. Raises UserError before any work.
    """

    def __init__(self, reference, metrics=None, embedding="inception", weights=None, num_images=None, interval=False,
                 keep_features=False, batch_size=64, seed=0, conversion="floor((x + 1) * 127.5)"):
        self.reference = Reference(reference)  # opened before the embedding: a missing file is told at once
        self.embedding = make_embedding(embedding, weights) if isinstance(embedding, str) else embedding
        self.reference.use(self.embedding)
        self.metrics, self.skipped = choose_metrics(metrics, self.embedding.name, self.reference)
        check_counts(self.metrics, interval, num_images, self.reference)
        if keep_features and self.reference.images is None:
            raise UserError("--neighbours " + NO_IMAGES.format(self.reference.name))
        self.num_images, self.interval, self.conversion = num_images, interval, conversion
        self.batch_size, self.seed = batch_size, seed
        chosen = [METRICS[name] for name in self.metrics]
        self.keeps_reference = keep_features or any(metric.images for metric in chosen)
        self.keeps_samples = keep_features or interval or any(not metric.tap for metric in chosen)
        self.reset()

    @classmethod
    def from_config(cls, config):
        """An Evaluator from the `eval` section of a config (utils.schema.EvalConfig)."""
        return cls(config.ref_path, config.metrics, config.embedding, config.weights, config.num_images)

    def reset(self):
        """Forget the samples, to evaluate others against the same reference."""
        self.stream = FeatureStream(self.embedding)

    def add(self, images, batch_index):
        """images: (B, H, W, 3) uint8, numpy or torch. batch_index: the number of this batch; rank k mod W adds batch k."""
        self.stream.add(images, batch_index, self.keeps_samples)

    def add_all(self, source):
        """Add all images of a fid.sources.Source, each process its share."""
        self.stream.add_source(source, self.batch_size, "samples", self.keeps_samples)

    def result(self):
        """{"numbers": name -> float, "settings": ..., "warnings": [...], "skipped": metric -> why}; with `interval` also "interval".

        Every process has to call, and gets the same.
        """
        count = self.stream.count()
        if self.num_images not in (None, count):
            raise ValueError(f"num_images={self.num_images} were announced, {count} came; a batch was left out or doubled")
        check_counts(self.metrics, self.interval, count, self.reference)
        self.reference.prepare(self.keeps_reference, self.batch_size, self.seed)
        self.gaussians, self.pool = self.stream.gaussians(), self.stream.pool()
        return distributed.broadcast_object(self._compute(count) if distributed.is_main() else None)

    def _compute(self, count):
        embedding, reference = self.embedding, self.reference
        numbers, self.warnings = {}, count_warnings(embedding, count, reference)
        for metric in (METRICS[name] for name in self.metrics):
            found, title = metric.compute(self), metric.name(embedding.name)
            numbers |= {title + suffix: number for suffix, number in found.items()} if isinstance(found, dict) else {title: found}
        settings = {
            "num_images": count, "image_size": self.stream.image_size, "conversion": self.conversion, **embedding_settings(embedding),
            "batch_size": max(num for _, num in self.stream.counts), "seed": self.seed, "metrics": list(self.metrics),
            "is_split": metrics.IS_SPLIT, "neighbours": metrics.NEIGHBOURS, "covariance_ddof": 1,
            "kid_subsets": metrics.KID_SUBSETS, "kid_subset_size": metrics.KID_SUBSET_SIZE,
            "reference": {"name": reference.name, "statistics": "stored" if reference.stored else "computed from its images",
                          "num_images": reference.num_images, "images_compared": len(reference.pool)},
        }
        result = {"numbers": numbers, "settings": settings, "warnings": self.warnings, "skipped": self.skipped}
        if self.interval:
            result["interval"] = {"of": METRICS["fid"].name(embedding.name), "level": 0.95,
                                  **metrics.distance_interval(reference.gaussians["pool"], self.pool, self.seed)}
        return result


def embedding_settings(embedding):
    """What one must know of an embedding, and of the software, to repeat its features."""
    return {"embedding": embedding.name, "dim": embedding.dims["pool"], **embedding.settings, "arithmetic": "float32, no TF32",
            "device": embedding.device.type, "software": f"python {platform.python_version()}, torch {torch.__version__}, "
                                                         f"numpy {np.__version__}"}


def choose_metrics(wanted, embedding_name, reference):
    """(metrics to compute, {metric: why not}). Raises UserError for a metric that is asked for by name and cannot be computed."""
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
    """Raise UserError if these metrics need more samples (num_images, None if unknown) or reference images."""
    for name in wanted:
        metric, counts = METRICS[name], {"samples": num_images}
        if metric.images or metric.tap and not reference.stored:
            counts[f"reference images in {reference.name}"] = len(reference.images)
        for what, count in counts.items():
            if count is not None and count < metric.least:
                raise UserError(f"{name}: {count} {what}, wanted at least {metric.least} (and thousands for a number to be believed)")
    if interval and num_images is not None and num_images < 2 * metrics.GROUPS:
        raise UserError(f"interval: {num_images} samples, wanted at least {2 * metrics.GROUPS}")


def count_warnings(embedding, count, reference):
    """Warnings about too few images, and about other Inception weights than the published ones."""
    dim, fid = embedding.dims["pool"], METRICS["fid"].name(embedding.name)
    references = reference.num_images or PUBLISHED_COUNT  # published files do not say how many
    warnings = [f"{number} {what} are too few for {dim} features: the covariance is singular and {fid} far too high; "
                f"use at least {dim + 1}, and compare only equal numbers of samples"
                for number, what in ((count, "samples"), (references, "reference images")) if number <= dim]
    if embedding.name != "inception":
        return warnings
    if dim < count < PUBLISHED_COUNT:
        warnings.append(f"{count} samples: published numbers use {PUBLISHED_COUNT}, and fewer samples give a higher FID; compare only "
                        "equal numbers of samples (--interval also estimates the limit of many)")
    if dim < references < PUBLISHED_COUNT:
        warnings.append(f"the reference statistics come from {references} images ({reference.name}), not from a whole training set: "
                        "published ImageNet FIDs use the mu and sigma stored in ADM's or EDM's file")
    sha256 = embedding.settings["weights_sha256"][:8]
    if sha256 != PUBLISHED_SHA256_PREFIX:
        warnings.append(f"the Inception weights (sha256 {sha256}...) are not the published ones ({PUBLISHED_SHA256_PREFIX}...): "
                        "compare these numbers with no published table")
    return warnings


def format_result(result):
    """A result as text, one item a line."""
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
    """Draw the samples that look most like copies, each with its nearest real images. evaluator: has measured `source`, keep_features."""
    from utils.images import save_grid
    reference = evaluator.reference
    samples, neighbours, ratios = metrics.closest_pairs(evaluator.pool, reference.pool, num_samples, num_neighbours)
    rows = [[*source.read([sample]), *reference.images.read(reference.positions[near])] for sample, near in zip(samples, neighbours)]
    pictures = [np.asarray(Image.fromarray(picture).resize(source.size)) for row in rows for picture in row]
    with told(path), write_whole(path) as temporary:
        save_grid(temporary, np.stack(pictures), labels=[f"{ratio:.2f}" for ratio in ratios],
                  title="Samples (first column) and their nearest real images (0 = copied, about 1 = as new as real images)")
