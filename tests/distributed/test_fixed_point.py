"""Sums in fixed point: one value in whatever order, as exact as float32, and never a wrapped one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megdet.distributed.fixed_point import GRADIENT_BITS, LOSS_BITS, add_numbers, fixed_numbers, summed_numbers
from megdet.recipe import MOST_EXACT_IMAGES

LARGEST = 2.0 ** (50 - GRADIENT_BITS)
SEEDS = st.integers(0, 2**31)


def drawn(seed: int, count: int, numbers: int = 300, scale: float = 0.1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numbers, generator=generator) * scale for _ in range(count)]


def summed(parts: list[Tensor]) -> Tensor:
    total = torch.full((len(parts[0]),), 12345)  # what lies in memory before the first is added
    for place, part in enumerate(parts):
        assert add_numbers(total, part, GRADIENT_BITS, begins=place == 0)
    return total


@given(seed=SEEDS, count=st.integers(1, 40))
def test_the_order_and_the_grouping_of_a_sum_do_not_change_it(seed, count):
    parts = drawn(seed, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    halves = [[parts[i] for i in order[: count // 2]], [parts[i] for i in order[count // 2 :]]]
    assert torch.equal(summed(parts), sum(summed(half) for half in halves if half))


@given(seed=SEEDS, count=st.integers(1, 64))
def test_a_sum_is_within_half_a_step_a_number_of_the_sum_in_float64(seed, count):
    parts = drawn(seed, count)
    truth = torch.stack(parts).double().sum(0)
    found = summed(parts).double() * 2.0**-GRADIENT_BITS
    assert (found - truth).abs().max() <= count * 2.0 ** -(GRADIENT_BITS + 1) + 1e-15


@given(seed=SEEDS)
def test_a_sum_is_at_least_as_exact_as_one_in_float32(seed):
    parts = drawn(seed, 16, numbers=4000, scale=1e-3)
    truth = torch.stack(parts).double().sum(0)
    plain = torch.zeros(4000)
    for part in parts:
        plain += part
    found = summed(parts).double() * 2.0**-GRADIENT_BITS
    assert (found - truth).norm() <= (plain.double() - truth).norm()


def test_the_most_and_largest_numbers_do_not_wrap():
    values = torch.tensor([math.nextafter(LARGEST, 0), -math.nextafter(LARGEST, 0)], dtype=torch.float64)
    one = torch.zeros(2, dtype=torch.int64)
    assert add_numbers(one, values, GRADIENT_BITS)
    assert one.tolist() == [2**50, -(2**50)]
    total = (MOST_EXACT_IMAGES - 1) * one
    assert add_numbers(total, values, GRADIENT_BITS)
    assert total.tolist() == [MOST_EXACT_IMAGES * 2**50, -MOST_EXACT_IMAGES * 2**50]


@pytest.mark.parametrize("bad", [LARGEST, -LARGEST, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 40_000, 99_999])
def test_a_number_that_does_not_fit_is_noticed_wherever_it_stands(bad, place):
    values = torch.zeros(100_000)
    values[place] = bad
    assert not add_numbers(torch.zeros(100_000, dtype=torch.int64), values, GRADIENT_BITS)


def test_no_numbers_fit():
    assert add_numbers(torch.zeros(0, dtype=torch.int64), torch.zeros(0), GRADIENT_BITS)


def test_what_does_not_fit_makes_its_own_sum_nan_and_no_other():
    good, bad = torch.tensor([1.5, -2.25, 3.0]), torch.tensor([0.5, math.inf, 1.0])
    sums = fixed_numbers(good, LOSS_BITS) + fixed_numbers(bad, LOSS_BITS)
    found = summed_numbers(sums, LOSS_BITS)
    assert found.dtype == torch.float64
    assert found[[0, 2]].tolist() == [2.0, 4.0]
    assert found[1].isnan()
