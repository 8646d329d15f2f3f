"""Variances, errors and noise scales from inner products, against numpy and hand arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megdet.studies.gradients.statistics import (
    Estimate,
    batch_gram,
    batch_variance,
    few_blocks,
    jackknife,
    noise_of_two_batches,
    noise_of_units,
    total_variance,
)


def gram(*gradients: list[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    rows = np.array(gradients, dtype=float)
    return rows @ rows.T


@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 3), st.integers(0, 99))
def test_a_mini_batch_is_the_mean_of_units_that_follow_one_another(
    count: int, size: int, left_over: int, seed: int
) -> None:
    rows = np.random.default_rng(seed).normal(2.0, 1.0, (count * size + left_over % size, 5))
    means = rows[: count * size].reshape(count, size, 5).mean(axis=1)
    np.testing.assert_allclose(batch_gram(gram(*rows), size), means @ means.T)
    assert batch_variance(gram(*rows), size) == pytest.approx(means.var(axis=0, ddof=1).sum())


def test_independent_gradients_follow_the_law_of_one_over_n() -> None:
    # of a linear model y = w x with x = 1, 3 and residual e of variance 1: the gradient is e x, its variance 1 + 9
    residuals = np.random.default_rng(0).normal(0.0, 1.0, (1024, 2))
    found = gram(*(residuals * [1.0, 3.0]))
    for size in (1, 2, 4, 8):
        [estimate] = jackknife(found, 32, lambda part, size=size: np.array([batch_variance(part, size)]))
        assert 0 < estimate.error < 0.25 * 10 / size
        assert abs(estimate.value - 10 / size) < 4 * estimate.error


def test_gradients_that_come_twice_break_the_law() -> None:
    values = np.random.default_rng(1).normal(0.0, 1.0, (8, 3))
    found = gram(*values.repeat(2, axis=0))
    # sum of squares S of 8 values: 2 S / 15 for single units, S / 7 for pairs
    assert 2 * batch_variance(found, 2) / batch_variance(found, 1) == pytest.approx(15 / 7)


def test_the_jackknife_of_a_mean_is_its_textbook_error() -> None:
    values = np.array([3.0, 5.0, 8.0, 4.0, 7.0])
    [mean] = jackknife(gram(*values[:, None]), 1, lambda part: np.sqrt(part.mean())[None])
    assert mean.value == pytest.approx(values.mean())
    assert mean.error == pytest.approx(few_blocks(5) * values.std(ddof=1) / np.sqrt(5))


def test_the_jackknife_leaves_out_blocks() -> None:
    values = np.array([3.0, 5.0, 8.0, 4.0, 7.0, 1.0, 100.0])
    blocks = np.array([4.0, 6.0, 4.0])  # the last value makes no block
    [mean] = jackknife(gram(*values[:, None]), 2, lambda part: np.sqrt(part.mean())[None])
    assert mean.value == pytest.approx(blocks.mean())
    assert mean.error == pytest.approx(few_blocks(3) * blocks.std(ddof=1) / np.sqrt(3))


@pytest.mark.parametrize(
    ("blocks", "quantile"), [(4, 3.31), (5, 2.87), (6, 2.65), (8, 2.43), (11, 2.28), (21, 2.13), (10_000, 2.0)]
)
def test_errors_of_few_blocks_are_widened_by_students_t(blocks: int, quantile: float) -> None:
    # GUM, table G.2: t of 95.45% for blocks - 1 degrees of freedom, where the normal has 2
    assert 2 * few_blocks(blocks) == pytest.approx(quantile, abs=0.011)


@pytest.mark.parametrize("blocks", [4, 8])
def test_twice_the_error_of_few_blocks_covers_the_truth_in_95_of_100_cases(blocks: int) -> None:
    random = np.random.default_rng(7)

    def is_covered() -> bool:
        values = random.normal(5.0, 1.0, blocks)
        [mean] = jackknife(gram(*values[:, None]), 1, lambda part: np.sqrt(part.mean())[None])
        return bool(abs(mean.value - 5.0) < 2 * mean.error)

    # without the factor it is 86% of the cases for 4 blocks and 91% for 8
    assert np.mean([is_covered() for _ in range(2000)]) == pytest.approx(0.954, abs=0.015)


THREES_AND_ONES = gram(*[[3.0], [1.0]] * 4)


def test_the_noise_scale_of_two_batch_sizes_by_hand() -> None:
    # |G_1|^2 = (9 + 1) / 2 = 5, |G_2|^2 = 4: |G|^2 = (2 x 4 - 5) / 1 = 3, tr S = (5 - 4) / (1 - 1/2) = 2
    found = noise_of_two_batches(THREES_AND_ONES, 1, 2, unit_images=1)
    assert (found.signal.value, found.noise.value) == (pytest.approx(3), pytest.approx(2))
    assert (found.signal.error, found.noise.error) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert found.scale is not None
    assert found.scale.value == pytest.approx(2 / 3)
    assert found.is_resolved


def test_the_noise_scale_of_units_by_hand() -> None:
    # mean 2, variance 8 / 7: |G|^2 = 4 - (8 / 7) / 8, and a group of 3 images counts three times
    found = noise_of_units(THREES_AND_ONES, 2, unit_images=3)
    assert found.signal.value == pytest.approx(4 - 1 / 7)
    assert found.noise.value == pytest.approx(3 * 8 / 7)


@pytest.mark.parametrize("unit_images", [1, 4])
def test_both_estimators_find_a_noise_scale_that_is_known(unit_images: int) -> None:
    # G = (1, 0, ...), each of 10 entries of a unit has variance 2: tr S = 20 a unit
    rows = np.random.default_rng(2).normal(0.0, np.sqrt(2), (1024, 10))
    rows[:, 0] += 1
    for found in (
        noise_of_two_batches(gram(*rows), 2, 64, unit_images),
        noise_of_units(gram(*rows), 64, unit_images),
    ):
        assert found.scale is not None
        assert found.is_resolved
        assert found.scale.error < 0.3 * found.scale.value
        assert abs(found.scale.value - 20 * unit_images) < 4 * found.scale.error
        assert abs(found.signal.value - 1) < 4 * found.signal.error


def test_noise_without_a_signal_has_no_scale_that_is_resolved() -> None:
    rows = np.random.default_rng(3).normal(0.0, 1.0, (64, 500))
    rows -= rows.mean(axis=0)
    found = noise_of_units(gram(*rows), 8, 1)
    assert found.scale is None
    assert not found.is_resolved
    assert found.as_dict()["scale"] is None


def test_the_variance_of_two_samples_by_hand() -> None:
    assert total_variance(gram([0.0, 0.0], [2.0, 4.0])) == pytest.approx(2 + 8)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(134.2, 43.4), "134 ± 43"),
        (Estimate(0.000271, 0.0000214), "0.000271 ± 0.000021"),
        (Estimate(1.0, 0.0), "1 ± 0"),
        (Estimate(2.5e-9, 1e-10), "2.5e-09 ± 1e-10"),
    ],
)
def test_an_estimate_reads_as_a_number_and_its_error(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text
