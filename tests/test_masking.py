import pytest
import torch

from models import TokenMask, random_mask
from models.masking import count_kept, gather_tokens, unmask


def test_mask_of_a_hand_worked_permutation():
    mask = TokenMask(torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]]), num_keep=2)
    assert mask.ids_keep.tolist() == [[2, 0], [1, 3]]
    assert mask.mask.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert mask.ids_restore.tolist() == [[1, 3, 0, 2], [2, 0, 3, 1]]


@pytest.mark.parametrize("num_keep", [1, 4, 9])
def test_unmask_inverts_mask(num_keep):
    tokens, mask_token = torch.randn(3, 9, 5), torch.randn(1, 1, 5)
    mask = random_mask(3, 9, num_keep=num_keep)
    whole = gather_tokens(unmask(gather_tokens(tokens, mask.ids_keep), mask_token, 9), mask.ids_restore)
    removed = mask.mask.bool().unsqueeze(-1)
    assert torch.equal(whole, torch.where(removed, mask_token, tokens))


@pytest.mark.parametrize("mask_ratio, num_keep", [(0.0, 256), (0.02, 256), (0.04, 240), (0.5, 128), (0.52, 128), (0.55, 112), (0.99, 16)])
def test_kept_count_is_rounded_to_the_nearest_multiple(mask_ratio, num_keep):
    assert count_kept(256, mask_ratio, multiple=16) == num_keep


def test_rounding_leaves_nine_counts_of_a_falling_mask_ratio():
    ratios = [0.5 * i / 1000 for i in range(1001)]
    assert {count_kept(256, ratio, multiple=16) for ratio in ratios} == set(range(128, 257, 16))


def test_a_multiple_that_does_not_divide_the_tokens_is_refused():
    with pytest.raises(ValueError, match="token_multiple=4 must divide the number of tokens, 9"):
        count_kept(9, 0.5, multiple=4)


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
        random_mask(2, 16, num_keep=num_keep)


def test_ids_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="batch, tokens"):
        TokenMask(torch.arange(16), 8)
