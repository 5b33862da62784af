"""Data for training: which samples come when, and how they reach the device while the last step computes.

The order is a function of (seed, position) alone: position p of the endless stream is sample p mod N of epoch p // N, and
every epoch is its own permutation. Ranks, restarts and a changed batch size only cut the same stream differently.
"""

import functools
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from utils.cli import UserError


@functools.lru_cache(maxsize=2)  # a batch reaches into two epochs at most, unless the set is tiny
def _permutation(num_samples, seed, epoch):
    # The raw output of a bit generator never changes between numpy versions; Generator.permutation may.
    order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(num_samples), kind="stable")
    order.flags.writeable = False
    return order


def stream_indices(num_samples, seed, start, count):
    """Sample indices (count,) int64 at the positions start .. start+count-1 of the endless stream."""
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: an empty set has no stream")
    parts, position = [], start
    while position < start + count:
        epoch, offset = divmod(position, num_samples)
        order = _permutation(num_samples, seed, epoch)[offset:offset + start + count - position]
        parts.append(order)
        position += len(order)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


class BatchStream:
    """Endless iterator of (samples, labels) batches on `device`, read ahead in background threads.

    Rank r's batch number k holds the positions start + (k * world_size + r) * batch_size .. + batch_size - 1 of the stream
    of `stream_indices`. Samples keep the type they are stored in; labels are int64.

    num_workers: threads that each prepare whole batches (0 counts as 1); decoding images keeps several busy.
    prefetch: batches that one thread keeps ready ahead of the one in use; each further thread adds one. 0: a batch is read when it
        is asked for.
    On a GPU, batches are copied from pinned memory on a stream of their own. An error in a thread is raised when its batch is
    asked for. Use it as a context manager, or call `close`.
    """

    def __init__(self, dataset, batch_size, seed, rank=0, world_size=1, start=0, device="cpu", num_workers=0, prefetch=2):
        if batch_size < 1 or not 0 <= rank < world_size or start < 0 or prefetch < 0:
            raise ValueError(f"batch_size={batch_size} must be at least 1, start={start} and prefetch={prefetch} at least 0, "
                             f"rank={rank} within world_size={world_size}")
        if not len(dataset):
            raise UserError(f"{dataset.name} holds no samples")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.first, self.stride = start + rank * batch_size, world_size * batch_size
        self.device = torch.device(device)
        self.copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        num_threads = max(1, num_workers)
        self.depth = prefetch + num_threads - 1 if prefetch else 0
        self.next_batch = 0
        self.pending = deque()
        # Threads default to GPU 0: set the device, or each process opens a context there.
        own_gpu = {"initializer": torch.cuda.set_device, "initargs": (self.copy_stream.device,)} if self.copy_stream is not None else {}
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="data", **own_gpu)

    def __iter__(self):
        return self

    def __next__(self):
        if self.pool is None:
            raise ValueError("this BatchStream is closed")
        while len(self.pending) <= self.depth:
            self.pending.append(self.pool.submit(self._load, self.next_batch))
            self.next_batch += 1
        samples, labels, copied = self.pending.popleft().result()
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            samples.record_stream(current)  # allocated on the copy stream: keeps the memory while `current` reads it
            labels.record_stream(current)
        return samples, labels

    def close(self):
        """Stop reading ahead. Waits for batches that are being read."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pending.clear()
            self.pool = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _load(self, batch):
        """Batch number `batch` as (samples, labels, event of the copy or None)."""
        indices = stream_indices(len(self.dataset), self.seed, self.first + batch * self.stride, self.batch_size)
        samples, labels = map(torch.from_numpy, self.dataset.read(indices))
        if self.copy_stream is None:
            return samples, labels, None
        with torch.cuda.stream(self.copy_stream):
            samples = samples.pin_memory().to(self.device, non_blocking=True)
            labels = labels.pin_memory().to(self.device, non_blocking=True)
            return samples, labels, self.copy_stream.record_event()
