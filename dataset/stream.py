"""Data for training: which samples come when, and how they reach the device while the last step computes.

The order is a function of (seed, position) alone: position p of the endless stream is sample p mod N of epoch p // N, and
every epoch is its own permutation. Ranks, restarts and a changed batch size only cut the same stream differently.
"""

import functools
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


@functools.lru_cache(maxsize=2)  # a batch reaches into two epochs at most, unless the set is tiny
def _permutation(num_samples, seed, epoch):
    # The raw output of a bit generator never changes between numpy versions; Generator.permutation may.
    order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(num_samples), kind="stable")
    order.flags.writeable = False
    return order


def stream_indices(num_samples, seed, start, count):
    """Sample indices (count,) int64 at the positions start .. start+count-1 of the endless stream."""
    end = start + count
    epochs = range(start // num_samples, -(-end // num_samples))
    parts = [_permutation(num_samples, seed, i)[max(start - i * num_samples, 0):end - i * num_samples] for i in epochs]
    return np.concatenate([np.empty(0, np.int64), *parts])


def read_ahead(pool, function, items, depth):
    """Yield function(item) of each item in turn, while threads of the pool work on the next `depth`."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class BatchStream:
    """Context manager of an endless iterator of (samples, labels) batches on `device`, read ahead in background threads.

    Rank r's batch number k holds the positions start + (k * world_size + r) * batch_size .. + batch_size - 1 of the stream
    of `stream_indices`. Samples keep the type they are stored in; labels are int64.

    num_workers: threads that each prepare whole batches (0 counts as 1); decoding images keeps several busy.
    prefetch: batches that one thread keeps ready; each further thread adds one. 0: a batch is read when it is asked for.
    On a GPU, batches are copied from pinned memory on a stream of their own. A thread's error is raised when its batch is due.
    """

    def __init__(self, dataset, batch_size, seed, rank=0, world_size=1, start=0, device="cpu", num_workers=0, prefetch=2):
        assert batch_size >= 1 and start >= 0 and prefetch >= 0 and 0 <= rank < world_size
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.first, self.stride = start + rank * batch_size, world_size * batch_size
        self.device = torch.device(device)
        self.copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # Threads default to GPU 0: set the device, or each process opens a context there.
        own_gpu = functools.partial(torch.cuda.set_device, self.copy_stream.device) if self.copy_stream is not None else None
        threads = max(1, num_workers)
        self.pool = ThreadPoolExecutor(threads, "data", own_gpu)
        self.depth = prefetch + threads - 1 if prefetch else 0

    def __enter__(self):
        batches = read_ahead(self.pool, self._load, itertools.count(), self.depth)
        return batches if self.copy_stream is None else map(self._wait_for_copy, batches)

    def __exit__(self, *exception):
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, batch):
        """Batch number `batch`: samples and labels, and on a GPU the event of their copy."""
        indices = stream_indices(len(self.dataset), self.seed, self.first + batch * self.stride, self.batch_size)
        samples, labels = map(torch.from_numpy, self.dataset.read(indices))
        if self.copy_stream is None:
            return samples, labels
        with torch.cuda.stream(self.copy_stream):
            samples = samples.pin_memory().to(self.device, non_blocking=True)
            labels = labels.pin_memory().to(self.device, non_blocking=True)
            return samples, labels, self.copy_stream.record_event()

    def _wait_for_copy(self, batch):
        samples, labels, copied = batch
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        samples.record_stream(current)  # allocated on the copy stream: keeps the memory while `current` reads it
        labels.record_stream(current)
        return samples, labels
