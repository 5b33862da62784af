"""Samples per second of the data loader beside the published way, on the same synthetic latents.

    python -m benchmarks.loader --json benchmarks/results/loader.json

Published way: LMDB, one float32 sample at a time, one-hot float labels, collated by DataLoader. Ours: `dataset.stream`, batched reads
of memory-mapped shards, integer labels. The arms take turns, epoch by epoch, so that whatever else the machine does hits them
alike. "In process" arms are timed in processor time, which other programs disturb little; arms with a worker by the wall clock.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.common import print_table, scaled, write_json
from utils.cli import run

SHAPE, NUM_CLASSES, BATCH = (8, 32, 32), 1000, 128
NEEDED = {"XL/2": 1175, "S/2": 6000}  # samples/s that one H100 can train on: roofline of XL/2, best case of S/2


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each arm")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    return parser.parse_args()


def write_sets(folder, samples):
    """The same random moments as an LMDB and as stored latents in both types; returns their paths by arm."""
    import lmdb
    import numpy as np

    from dataset.store import LatentWriter, Plan

    rng = np.random.default_rng(0)
    moments = rng.standard_normal((samples, *SHAPE), np.float32)
    labels = rng.integers(0, NUM_CLASSES, samples)
    environment = lmdb.open(str(folder / "lmdb"), map_size=2 * moments.nbytes + (1 << 26))
    with environment.begin(write=True) as transaction:
        for i in range(samples):
            transaction.put(f"z-{i}".encode(), moments[i].tobytes())
            transaction.put(f"y-{i}".encode(), str(labels[i]).encode())
        transaction.put(b"length", str(samples).encode())
    environment.close()
    shutil.copytree(folder / "lmdb", folder / "lmdb2")  # a process may open an LMDB only once, and both arms do
    for dtype in ("float16", "float32"):
        writer = LatentWriter(folder / dtype, Plan(samples, SHAPE, dtype, False, NUM_CLASSES, (), 0.18215, 0.0, ""))
        for shard in writer.pending():
            part = writer.plan.shard_range(shard)
            writer.write(shard, moments[part.start:part.stop], labels[part.start:part.stop])
        writer.finish()


class PublishedWay:
    """A map-style data set as the published code's: one LMDB key per call, label as a one-hot float vector."""

    def __init__(self, path):
        import lmdb
        self.transaction = lmdb.open(str(path), readonly=True, lock=False, readahead=False).begin()

    def __getitem__(self, index):
        import numpy as np
        moments = np.frombuffer(self.transaction.get(f"z-{index}".encode()), np.float32).reshape(SHAPE).copy()
        one_hot = np.zeros(NUM_CLASSES, np.float32)
        one_hot[int(self.transaction.get(f"y-{index}".encode()))] = 1
        return moments, one_hot


class BatchedReads:
    """Our data set for DataLoader workers: an index is a whole batch."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, indices):
        import torch
        return tuple(map(torch.from_numpy, self.dataset.read(indices)))


def published(dataset, samples, num_workers):
    from torch.utils.data import DataLoader

    return DataLoader(dataset, BATCH, sampler=_order(samples), num_workers=num_workers, drop_last=True)


def _order(samples):
    from dataset.stream import stream_indices
    return stream_indices(samples, 0, 0, samples).tolist()


def ours_in_process(path, samples):
    import torch

    from dataset.formats import open_latents
    from dataset.stream import stream_indices

    dataset = open_latents(path)
    for start in range(0, samples - BATCH + 1, BATCH):
        yield tuple(map(torch.from_numpy, dataset.read(stream_indices(samples, 0, start, BATCH))))


def ours_thread(path, samples):
    from dataset.formats import open_latents
    from dataset.stream import BatchStream

    with BatchStream(open_latents(path), BATCH, seed=0, num_workers=1) as stream:
        for _ in range(samples // BATCH):
            yield next(stream)


def ours_worker_process(path, samples):
    from torch.utils.data import DataLoader

    from dataset.formats import open_latents

    order = _order(samples)
    batches = [order[start:start + BATCH] for start in range(0, samples - BATCH + 1, BATCH)]
    return DataLoader(BatchedReads(open_latents(path)), batch_size=None, sampler=batches, num_workers=1)


def arms(folder, samples):
    """{name: () -> iterable of an epoch's batches}."""
    dataset = PublishedWay(folder / "lmdb")
    made = {"published, in process": lambda: published(dataset, samples, 0),
            "published, one worker process": lambda: published(dataset, samples, 1)}
    for dtype in ("float16", "float32"):
        path = folder / dtype
        made[f"ours {dtype}, in process"] = lambda path=path: ours_in_process(path, samples)
        made[f"ours {dtype}, one thread"] = lambda path=path: ours_thread(path, samples)
        made[f"ours {dtype}, one worker process"] = lambda path=path: ours_worker_process(path, samples)
    made["ours reading the LMDB, in process"] = lambda: ours_in_process(folder / "lmdb2", samples)
    return made


def rate(batches, clock):
    """Samples per second from the first batch on (starting a worker process is not counted)."""
    count, begun = 0, None
    for samples, _ in batches:
        if begun is None:
            begun = clock()
        else:
            count += len(samples)
    return count / (clock() - begun)


def measure(folder, samples, rounds):
    """{arm: {median, lowest, highest}} samples per second; the first round warms the page cache and is not counted."""
    made = arms(folder, samples)
    rates = {name: [] for name in made}
    for round_number in range(rounds + 1):
        for name, make in made.items():
            found = rate(make(), time.process_time if name.endswith("in process") else time.perf_counter)
            if round_number:
                rates[name].append(found)
        print(f"round {round_number} of {rounds}", flush=True)
    return {name: {"median": round(statistics.median(found)), "lowest": round(min(found)), "highest": round(max(found))}
            for name, found in rates.items()}


def judge(results):
    """The bars of the loader: ratios to the published way, and what one H100 needs against four workers."""
    def ratio(ours, theirs):
        return round(results[ours]["median"] / results[theirs]["median"], 2)
    ratios = {f"{ours} / {theirs}": ratio(ours, theirs) for dtype in ("float16", "float32") for ours, theirs in (
        (f"ours {dtype}, in process", "published, in process"),
        (f"ours {dtype}, one worker process", "published, one worker process"),
        (f"ours {dtype}, one thread", "published, one worker process"))}
    four = 4 * results["ours float16, one worker process"]["median"]
    needs = {f"four worker processes (arithmetic: {four}/s) / need of an H100, {model} ({need}/s)": round(four / need, 1)
             for model, need in NEEDED.items()}
    return ratios | needs


def main():
    args = parse_arguments()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_sets(Path(folder), args.samples)
        results = measure(Path(folder), args.samples, args.rounds)
    report = {"samples": args.samples, "shape": SHAPE, "batch": BATCH, "rounds": args.rounds, "samples_per_second": results,
              "judgement": judge(results)}
    print_table([{"arm": name, "1000 samples/s": scaled(found, 1e-3)} for name, found in results.items()], ("arm", "1000 samples/s"))
    print(json.dumps(report["judgement"], indent=1))
    write_json(args.json, torch.device("cpu"), **report)


if __name__ == "__main__":
    run(main)
