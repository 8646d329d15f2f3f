import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megdet.ops.integer_hash import hash_integers
from megdet.ops.ordering import NEVER, hash64, score_keys, top

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False)


def splitmix64(seed: int, index: int) -> int:
    """The published finaliser on Python's unbounded numbers."""
    mask = 2**64 - 1
    x = (seed + index * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x = x ^ (x >> 31)
    return x - 2**64 if x >> 63 else x


@given(INT64, INT64)
def test_the_hash_is_the_finaliser_of_splitmix64(seed, index):
    assert int(hash64(torch.tensor(seed), torch.tensor(index))) == splitmix64(seed, index)


def test_the_first_numbers_of_seed_zero_are_the_published_ones():
    # Vigna's splitmix64.c from state 0
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(hash64(torch.tensor(0), torch.tensor(i))) % 2**64 for i in (1, 2, 3)] == published


@given(INT64, INT64)
def test_no_two_candidates_of_an_image_get_the_same_key(seed, start):
    index = torch.tensor(start) + torch.arange(4096)
    assert len(hash64(torch.tensor(seed), index).unique()) == 4096


def test_the_keys_of_neighbouring_seeds_choose_like_independent_coins():
    seeds, index = torch.arange(200).unsqueeze(1), torch.arange(500).unsqueeze(0)
    is_high = hash64(seeds, index) > 0
    assert abs(is_high.double().mean() - 0.5) < 0.01  # 100,000 coins: six standard deviations are 0.0095
    agree = (is_high[1:] == is_high[:-1]).double().mean()
    assert abs(agree - 0.5) < 0.01
    agree = (is_high[:, 1:] == is_high[:, :-1]).double().mean()
    assert abs(agree - 0.5) < 0.01


def test_a_hash_of_integers_depends_on_each_and_on_their_order():
    assert len({hash_integers(*numbers) for numbers in [(1, 2, 3), (3, 2, 1), (1, 2), (1, 2, 4), (0, 2, 3)]}) == 5


@given(st.lists(INT64, min_size=1, max_size=4))
def test_a_hash_of_integers_is_the_tensor_hash_repeated(numbers):
    state = torch.tensor(0)
    for number in numbers:
        state = hash64(state, torch.tensor(number))
    assert hash_integers(*numbers) == int(state)


@given(st.lists(FLOAT32 | st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf]), max_size=40))
def test_score_keys_order_like_a_stable_falling_sort(scores):
    values = torch.tensor(scores, dtype=torch.float32)
    order = score_keys(values).argsort(descending=True)
    assert order.tolist() == sorted(range(len(scores)), key=lambda i: -scores[i])


def test_zeros_of_both_signs_are_a_tie():
    assert score_keys(torch.tensor([-0.0, 0.0, -0.0])).argsort(descending=True).tolist() == [0, 1, 2]


def test_the_lowest_score_still_beats_what_must_never_be_chosen_and_nan_does_not():
    keys = score_keys(torch.tensor([-math.inf, math.nan, torch.finfo(torch.float32).min]))
    assert keys[0] > NEVER
    assert keys[1] == NEVER
    assert keys[2] > keys[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_score_keys_take_any_precision_and_any_batch(dtype):
    scores = torch.tensor([[3.0, -1.0, 3.0], [0.5, 0.5, 2.0]], dtype=dtype)
    assert score_keys(scores).argsort(descending=True).tolist() == [[0, 2, 1], [2, 0, 1]]


@given(st.lists(INT64, unique=True, max_size=30), st.integers(0, 40))
def test_top_takes_the_largest_keys_in_falling_order(keys, count):
    values, places = top(torch.tensor(keys, dtype=torch.int64), count)
    assert values.tolist() == sorted(keys, reverse=True)[:count]
    assert [keys[place] for place in places] == values.tolist()


def test_top_of_no_images_and_of_no_candidates_is_empty():
    assert top(torch.zeros(0, 5, dtype=torch.int64), 3)[0].shape == (0, 3)
    assert top(torch.zeros(2, 0, dtype=torch.int64), 3)[1].shape == (2, 0)
