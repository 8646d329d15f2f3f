"""The slowest of many devices, by the canvases of their images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megdet.errors import InputError
from megdet.planning.canvases import canvas_distribution, mean_pixels, slowest_of


def test_the_canvases_are_a_distribution_of_159_photos() -> None:
    first, chances = canvas_distribution()
    assert chances.sum() == pytest.approx(1.0)
    assert np.allclose(chances * 159, np.round(chances * 159))
    assert first * 32 * 32 == 800 * 800
    assert 800 * 800 < mean_pixels() < 800 * 1344


@pytest.mark.parametrize(("workers", "rounds"), [(1, 1), (1, 7)])
def test_one_worker_waits_for_nobody(workers: int, rounds: int) -> None:
    assert slowest_of(workers, rounds) == 1.0


def test_the_slowest_worker_is_that_of_drawn_steps() -> None:
    first, chances = canvas_distribution()
    drawn = first + np.random.default_rng(0).choice(len(chances), size=(20_000, 8, 2), p=chances)
    sums = drawn.sum(2)
    assert slowest_of(8, rounds=2) == pytest.approx(sums.max(1).mean() / sums.mean(), rel=0.002)


@given(workers=st.integers(1, 200), rounds=st.integers(1, 4))
def test_more_workers_wait_longer_and_more_rounds_even_out(workers: int, rounds: int) -> None:
    here = slowest_of(workers, rounds)
    assert slowest_of(workers + 1, rounds) >= here - 1e-12
    assert slowest_of(workers, 4 * rounds) <= here + 1e-12
    assert 1.0 <= here <= 800 * 1344 / mean_pixels() + 1e-9


@pytest.mark.parametrize("rounds", [1, 2, 3, 8, 60])
def test_sums_of_canvases_are_those_of_direct_convolution(rounds: int) -> None:
    first, chances = canvas_distribution()
    sums = np.ones(1)
    for _ in range(rounds):
        sums = np.convolve(sums, chances)
    below = np.minimum(np.cumsum(sums), 1.0)
    tiles = rounds * first + np.arange(len(sums))
    largest = tiles @ np.diff(below**64, prepend=0.0)
    assert slowest_of(64, rounds) == pytest.approx(largest / (tiles @ sums), rel=1e-12)


def test_thousands_of_rounds_even_out_as_the_square_root_of_their_number() -> None:
    """Sums of so many draws are normal: what the slowest takes longer falls as 1 / sqrt(rounds)."""
    few, many, more = (slowest_of(16, rounds) - 1 for rounds in (4096, 65_536, 1_048_576))
    assert few == pytest.approx(4 * many, rel=0.01)
    assert many == pytest.approx(4 * more, rel=0.01)


def test_no_worker_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        slowest_of(0)
