"""Samples per second of the data loader beside the published way, on the same synthetic latents.

    python -m benchmarks.loader --json benchmarks/results/loader.json

The published way is LMDB, one float32 sample at a time, one-hot float labels, collated by DataLoader. Ours is dataset.stream: batched
reads of memory-mapped shards in one thread, as training does by default, and integer labels; batches go to the GPU if there is one. The
arms take turns, epoch by epoch.
"""

import itertools
import tempfile
import time
from pathlib import Path

from benchmarks.common import make_parser, report, spread, start, write_random_latents
from utils.cli import run

SHAPE, NUM_CLASSES, BATCH = (8, 32, 32), 1000, 128


def parse_arguments(argv=None):
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--samples", type=int, default=20_000, help="of the set, all of which an epoch reads (default: %(default)s)")
    return parser.parse_args(argv)


def write_sets(folder, samples):
    """The same random moments as LMDB and as stored latents of both types, in folders of these names."""
    import lmdb

    for dtype in ("float16", "float32"):
        moments, labels = write_random_latents(folder / dtype, samples, SHAPE, dtype, NUM_CLASSES)
    with lmdb.open(str(folder / "lmdb"), map_size=2 * moments.nbytes + (1 << 26)) as environment:
        with environment.begin(write=True) as transaction:
            for i in range(samples):
                transaction.put(f"z-{i}".encode(), moments[i].tobytes())
                transaction.put(f"y-{i}".encode(), str(labels[i]).encode())


class PublishedWay:
    """A map-style data set as the published code's: one LMDB key per call, the label as a one-hot float vector."""

    def __init__(self, path):
        import lmdb

        self.transaction = lmdb.open(str(path), readonly=True, lock=False, readahead=False).begin()

    def __getitem__(self, index):
        import numpy as np

        moments = np.frombuffer(self.transaction.get(f"z-{index}".encode()), np.float32).reshape(SHAPE).copy()
        one_hot = np.zeros(NUM_CLASSES, np.float32)
        one_hot[int(self.transaction.get(f"y-{index}".encode()))] = 1
        return moments, one_hot


def make_arms(folder, samples, device):
    """{name: function that gives an iterator over an epoch's batches}."""
    from torch.utils.data import DataLoader

    from dataset.formats import open_latents
    from dataset.stream import BatchStream, stream_indices

    def ours(dtype):
        with BatchStream(open_latents(folder / dtype), BATCH, seed=0, device=device) as stream:
            yield from itertools.islice(stream, samples // BATCH)

    published, order = PublishedWay(folder / "lmdb"), stream_indices(samples, 0, 0, samples).tolist()
    return {"published, in process": lambda: iter(DataLoader(published, BATCH, sampler=order)),
            "published, one worker": lambda: iter(DataLoader(published, BATCH, sampler=order, num_workers=1)),
            "ours, float16": lambda: ours("float16"), "ours, float32": lambda: ours("float32")}


def rate(batches):
    """Samples per second after the first batch, so that starting a worker is not counted."""
    next(batches)
    begun = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    return count / (time.perf_counter() - begun)


def main():
    args = parse_arguments()
    device = start(args)
    with tempfile.TemporaryDirectory() as folder:
        write_sets(Path(folder), args.samples)
        arms = make_arms(Path(folder), args.samples, device)
        rates = {name: [] for name in arms}
        for _ in range(args.warmup + args.rounds):  # the first round fills the page cache
            for name, make in arms.items():
                rates[name].append(rate(make()))
    rows = [{"arm": name, "1000 samples/s": spread(found[args.warmup:], 1e-3)} for name, found in rates.items()]
    report(args, device, rows, ("arm", "1000 samples/s"), samples=args.samples, shape=SHAPE, batch=BATCH)


if __name__ == "__main__":
    run(main)
