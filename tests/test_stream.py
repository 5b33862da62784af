import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.formats import open_latents
from dataset.images import open_images
from dataset.stream import BatchStream, read_ahead, stream_indices
from dataset.store import LatentWriter, Plan

FASHION_MNIST = Path(__file__).parents[1] / "assets" / "fashion-mnist" / "t10k-images-idx3-ubyte.gz"
N, SHAPE = 23, (8, 3, 3)


class Numbers:
    """Sample i is the number i; label i % 5."""

    name, num_classes = "numbers", 5

    def __init__(self, count=N, fail_at=None):
        self.count, self.fail_at = count, fail_at
        self.threads, self.num_read = set(), 0

    def __len__(self):
        return self.count

    def read(self, indices):
        self.threads.add(threading.current_thread().name)
        self.num_read += 1
        if self.fail_at in indices:
            raise ValueError(f"numbers.bin: sample {self.fail_at} is damaged")
        return np.asarray(indices, np.float32)[:, None], np.asarray(indices) % 5


@pytest.fixture
def stored(tmp_path):
    """A set of 23 images with mirrored copies, in shards of 4; moments, mirrored, labels beside it."""
    rng = np.random.default_rng(0)
    moments, mirrored = rng.standard_normal((2, N, *SHAPE), np.float32)
    labels = np.arange(N) % 5
    plan = Plan(N, SHAPE, "float32", True, 5, tuple("abcde"), 0.18215, 0.0, "vae", shard_size=4)
    writer = LatentWriter(tmp_path / "set", plan)
    for shard in writer.pending():
        part = list(plan.shards[shard])
        writer.write(shard, moments[part], labels[part], mirrored[part])
    writer.finish()
    return tmp_path / "set", np.concatenate([moments, mirrored]), np.tile(labels, 2)


def take(dataset, count, **kwargs):
    with BatchStream(dataset, **{"batch_size": 4, "seed": 0, **kwargs}) as stream:
        return [next(stream) for _ in range(count)]


def test_every_epoch_is_a_permutation_and_epochs_differ():
    stream = stream_indices(N, seed=3, start=0, count=4 * N)
    epochs = stream.reshape(4, N)
    assert (np.sort(epochs) == np.arange(N)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (epochs[0] != np.arange(N)).any()


def test_stream_is_the_same_however_it_is_cut():
    whole = stream_indices(N, seed=3, start=0, count=100)
    for start, count in ((0, 7), (20, 30), (46, 1), (22, 2), (99, 1), (50, 0)):
        np.testing.assert_array_equal(stream_indices(N, 3, start, count), whole[start:start + count])


def test_seeds_give_different_orders():
    assert (stream_indices(N, 0, 0, N) != stream_indices(N, 1, 0, N)).any()


def test_order_is_pinned_for_ever():
    """Resuming with a newer numpy must give the same order: these numbers were written down once."""
    np.testing.assert_array_equal(stream_indices(10, seed=0, start=0, count=12), [3, 2, 1, 8, 6, 0, 7, 4, 5, 9, 7, 4])


def test_order_is_close_to_uniform():
    """Each sample's place in an epoch is uniform: over 2000 epochs of 6, each of 36 counts is 333 with std 17; 6 std allowed."""
    epochs = stream_indices(6, 5, 0, 6 * 2000).reshape(2000, 6)
    counts = np.array([[(epochs[:, place] == sample).sum() for sample in range(6)] for place in range(6)])
    assert abs(counts - 2000 / 6).max() < 6 * np.sqrt(2000 / 6 * 5 / 6)


@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (2, 3), (3, 5), (2, 30)])
def test_ranks_share_every_epoch_without_loss_or_double(world_size, batch_size):
    steps = -(-3 * N // (world_size * batch_size))
    ranks = [take(Numbers(), steps, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    merged = np.concatenate([ranks[rank][step][0][:, 0] for step in range(steps) for rank in range(world_size)])
    np.testing.assert_array_equal(merged, stream_indices(N, 0, 0, len(merged)))
    assert (np.sort(merged[:3 * N].reshape(3, N)) == np.arange(N)).all()


def test_start_goes_on_where_the_stream_stopped():
    whole, resumed = take(Numbers(), 9, rank=1, world_size=2), take(Numbers(), 5, rank=1, world_size=2, start=4 * 2 * 4)
    for (samples, labels), (again, labels_again) in zip(whole[4:], resumed, strict=True):
        assert torch.equal(samples, again) and torch.equal(labels, labels_again)


@pytest.mark.parametrize("num_workers, prefetch", [(0, 1), (1, 3), (4, 2), (0, 0), (4, 0)])
def test_workers_and_prefetch_do_not_change_the_order(num_workers, prefetch):
    dataset = Numbers()
    batches = take(dataset, 12, num_workers=num_workers, prefetch=prefetch)
    np.testing.assert_array_equal(torch.cat([samples[:, 0] for samples, _ in batches]), stream_indices(N, 0, 0, 48))
    assert threading.current_thread().name not in dataset.threads


@pytest.mark.parametrize("num_workers", [1, 4])
def test_without_prefetch_a_batch_is_read_when_it_is_asked_for(num_workers):
    dataset = Numbers()
    with BatchStream(dataset, 4, 0, num_workers=num_workers, prefetch=0) as stream:
        for count in range(1, 6):
            next(stream)
            assert dataset.num_read == count


@pytest.mark.parametrize("depth", [0, 3])
def test_reading_ahead_goes_as_far_as_it_is_told(depth):
    asked = []
    with ThreadPoolExecutor(1) as pool:
        results = read_ahead(pool, lambda item: asked.append(item) or item, range(9), depth)
        assert next(results) == 0
        pool.submit(int).result()  # what was submitted before is done now
        assert asked == list(range(depth + 1))
        assert list(results) == list(range(1, 9))


def test_labels_belong_to_their_samples_and_are_int64():
    for samples, labels in take(Numbers(), 8):
        assert labels.dtype == torch.int64 and (labels == samples[:, 0] % 5).all()


def test_error_in_a_thread_reaches_the_consumer_at_its_batch():
    order = stream_indices(N, 0, 0, N)
    with BatchStream(Numbers(fail_at=order[9]), 4, 0, num_workers=2) as stream:
        next(stream), next(stream)
        with pytest.raises(ValueError, match=f"numbers.bin: sample {order[9]} is damaged"):
            next(stream)


def test_closed_stream_ends_its_threads():
    before = threading.active_count()
    with BatchStream(Numbers(), 4, 0, num_workers=3) as stream:
        next(stream)
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"start": -1}, {"prefetch": -1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(AssertionError):
        take(Numbers(), 0, **wrong)


def test_stream_leaves_the_global_random_state_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(Numbers(), 10)
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()


def test_stored_latents_stream_bit_for_bit(stored):
    path, moments, labels = stored
    order = stream_indices(2 * N, 7, 0, 60)
    batches = take(open_latents(path, xflip=True), 15, seed=7, num_workers=3)
    np.testing.assert_array_equal(torch.cat([samples for samples, _ in batches]), moments[order])
    np.testing.assert_array_equal(torch.cat([found for _, found in batches]), labels[order])


def test_number_of_classes_is_checked_against_the_model(stored):
    assert [open_latents(stored[0], num_classes=wanted).num_classes for wanted in (5, None, 0)] == [5, 5, 5]
    with pytest.raises(ValueError, match="has 5 classes, wanted 1000; set model.num_classes=5"):
        open_latents(stored[0], num_classes=1000)


def test_images_are_read_cropped_and_mirrored():
    images = open_images(FASHION_MNIST, 32, xflip=True, num_classes=10)
    pixels, labels = images.read([5, 5 + 10000])
    assert pixels.shape == (2, 3, 32, 32) and pixels.dtype == np.uint8 and pixels.max() > 0
    np.testing.assert_array_equal(pixels[1], pixels[0][:, :, ::-1])
    assert labels[0] == labels[1] and images.class_names[labels[0]] == "trouser"


def test_pickled_set_carries_no_samples(stored):
    dataset = open_latents(stored[0], xflip=True)
    small = len(pickle.dumps(dataset))
    dataset.read(range(2 * N))
    assert len(pickle.dumps(dataset)) < small + 1000  # labels, 184 bytes; the moments are 13 kB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_equal_those_on_the_cpu(stored):
    dataset = open_latents(stored[0])
    for (samples, labels), (again, labels_again) in zip(take(dataset, 20), take(dataset, 20, device="cuda"), strict=True):
        assert again.is_cuda and torch.equal(samples, again.cpu()) and torch.equal(labels, labels_again.cpu())
