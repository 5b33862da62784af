import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import TokenMask, random_mask
from models.masking import Unshuffle, count_kept, gather_tokens


def test_mask_of_a_hand_worked_permutation():
    mask = TokenMask(torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]]), num_keep=2)
    assert mask.ids_keep.tolist() == [[2, 0], [1, 3]]
    assert mask.mask.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert mask.ids_restore.tolist() == [[1, 3, 0, 2], [2, 0, 3, 1]]


@pytest.mark.parametrize("num_keep", [1, 4, 9])
def test_restoring_undoes_the_shuffle(num_keep):
    tokens = torch.randn(3, 9, 5)
    mask = TokenMask(random_mask(3, 9, 0.5).ids_shuffle, num_keep)
    kept = gather_tokens(tokens, mask.ids_keep)
    shuffled = torch.cat([kept, torch.zeros(3, 9 - num_keep, 5)], dim=1)
    removed = mask.mask.bool().unsqueeze(-1)
    assert torch.equal(gather_tokens(shuffled, mask.ids_restore), tokens.masked_fill(removed, 0.0))


class Operations(TorchDispatchMode):
    """Notes the name of every operation that PyTorch runs in it."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def gradient_of(restore, tokens):
    tokens = tokens.clone().requires_grad_()
    restored = restore(tokens)
    restored.sin().sum().backward()  # a gradient that differs from place to place
    return restored.detach(), tokens.grad


@pytest.mark.parametrize("compiled", [False, True])
def test_unshuffling_has_the_values_and_gradients_of_a_gather(compiled):
    tokens, mask = torch.randn(3, 9, 5), random_mask(3, 9, 0.5)

    def unshuffle(tokens):
        return Unshuffle.apply(tokens, mask.ids_restore, mask.ids_shuffle)

    if compiled:
        unshuffle = torch.compile(unshuffle, backend="aot_eager", fullgraph=True)
    restored, gradient = gradient_of(unshuffle, tokens)
    wanted, wanted_gradient = gradient_of(lambda tokens: gather_tokens(tokens, mask.ids_restore), tokens)
    assert torch.equal(restored, wanted)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-6, atol=0)


def test_masks_and_unshuffling_write_nothing_by_index():
    """Deterministic kernels that scatter made the host wait for the GPU, on torch 2.7. `pytest -s` prints the counts."""
    with Operations() as making:
        mask = random_mask(3, 9, 0.5)
    with Operations() as moving:
        gradient_of(lambda tokens: Unshuffle.apply(tokens, mask.ids_restore, mask.ids_shuffle), torch.randn(3, 9, 5))
    print(f"{len(making.names)} operations make a mask, {len(moving.names)} unshuffle and go back")
    assert "aten.sort.default" in making.names and moving.names.count("aten.gather.default") == 2
    assert [name for name in making.names + moving.names if "scatter" in name or "index" in name] == []


@pytest.mark.parametrize("num_tokens, mask_ratio, num_keep", [
    (16, 0.5, 8), (16, 0.75, 4), (16, 0.0, 16), (16, 0.01, 15), (16, 0.99, 1), (9, 0.5, 4)])
def test_kept_count_is_the_published_rule_and_at_least_one(num_tokens, mask_ratio, num_keep):
    assert count_kept(num_tokens, mask_ratio) == num_keep
    mask = random_mask(3, num_tokens, mask_ratio)
    assert mask.ids_keep.shape == (3, num_keep)
    assert mask.mask.sum(dim=1).tolist() == [num_tokens - num_keep] * 3


def test_every_sample_keeps_a_uniform_choice_of_its_own():
    mask = random_mask(4000, 8, 0.5, torch.Generator().manual_seed(0))
    # kept counts per token are binomial(4000, 1/2), standard deviation 32; five of them are allowed
    assert ((1 - mask.mask).sum(dim=0) - 2000).abs().max() < 160
    assert len({tuple(ids) for ids in mask.ids_keep.sort(dim=1).values.tolist()}) == 70  # all 8-choose-4 subsets


def test_mask_is_a_function_of_the_generator_alone():
    state = torch.get_rng_state()
    first, again = (random_mask(2, 16, 0.5, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.ids_shuffle, again.ids_shuffle)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0, 1.5])
def test_impossible_ratio_is_refused(mask_ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        random_mask(2, 16, mask_ratio)


@pytest.mark.parametrize("num_keep", [0, 17])
def test_impossible_count_is_refused(num_keep):
    with pytest.raises(ValueError, match="num_keep"):
        TokenMask(torch.arange(16).repeat(2, 1), num_keep)


def test_ids_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="batch, tokens"):
        TokenMask(torch.arange(16), 8)
