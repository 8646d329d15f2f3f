"""Stragglers by image size: how much longer the slowest of many devices takes than the mean one.

The time of an image is assumed proportional to its canvas. The canvases are those of the 159 photos of `coco-mini`, a
sample of COCO train2017 and val2017, at the paper's size: the shorter edge 800 pixels, the longer one at most 1333,
edges rounded up to 32. The plan puts images of similar aspect ratio into one micro-batch, so it has one canvas, and the
canvases of the micro-batches of a step are independent draws from this distribution.
"""

import math
from functools import cache

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from megdet.errors import InputError

_TILE = 32
_CANVASES = {
    (800, 800): 3,
    (800, 832): 1,
    (800, 896): 1,
    (800, 928): 1,
    (800, 992): 2,
    (800, 1024): 2,
    (640, 1344): 1,
    (800, 1088): 68,
    (800, 1120): 6,
    (672, 1344): 1,
    (800, 1184): 2,
    (800, 1216): 55,
    (736, 1344): 1,
    (800, 1248): 2,
    (800, 1280): 3,
    (768, 1344): 4,
    (800, 1312): 3,
    (800, 1344): 3,
}
"""Photos on each canvas, short edge and long edge in pixels."""


@cache
def canvas_distribution() -> tuple[int, Float64[np.ndarray, "sizes"]]:
    """The smallest canvas in tiles of 32 x 32 pixels, and the probability of each size from there on."""
    tiles = {size: height * width // _TILE**2 for size in _CANVASES for height, width in [size]}
    first = min(tiles.values())
    chances = np.zeros(max(tiles.values()) - first + 1)
    for size, photos in _CANVASES.items():
        chances[tiles[size] - first] += photos
    return first, chances / chances.sum()


@cache
def mean_pixels() -> float:
    """Pixels of the mean canvas."""
    first, chances = canvas_distribution()
    return float((first + np.arange(len(chances))) @ chances) * _TILE**2


def largest_pixels() -> float:
    """Pixels of the largest canvas."""
    return max(float(height * width) for height, width in _CANVASES)


@cache
def slowest_of(workers: int, rounds: int = 1) -> float:
    """The expected canvas of the slowest of so many workers, as a multiple of the mean canvas.

    Each worker adds up `rounds` independent canvases. If F is the distribution function of such a sum, the largest of n
    sums has F^n, and this is its mean. Raises InputError below one worker or round.
    """
    if workers < 1 or rounds < 1:
        raise InputError(f"the slowest of {workers} workers in {rounds} rounds: it takes at least one of each")
    if workers == 1:
        return 1.0
    first, chances = canvas_distribution()
    least, sums = _sum_distribution(chances, rounds)
    below = np.minimum(np.cumsum(sums), 1.0)
    largest = np.diff(below**workers, prepend=0.0)
    tiles = rounds * first + least + np.arange(len(sums))
    return float(tiles @ largest / largest.sum()) * _TILE**2 / (rounds * mean_pixels())


def _sum_distribution(chances: NDArray[np.float64], rounds: int) -> tuple[int, NDArray[np.float64]]:
    """The distribution of the sum of so many draws of 0, 1, ...: its least value, and the chances from there on.

    Computed as a power of the Fourier transform. That is cyclic, so sums of many draws are cut at 12 standard
    deviations from their mean; the chance beyond is too small for float64.
    """
    draws = np.arange(len(chances))
    mean = float(draws @ chances)
    deviation = math.sqrt(float((draws - mean) ** 2 @ chances) * rounds)
    whole = rounds * (len(chances) - 1) + 1
    width = max(len(chances), min(whole, 2 * math.ceil(12 * deviation)))
    width = 1 << (width - 1).bit_length()
    sums = np.maximum(np.fft.irfft(np.fft.rfft(chances, width) ** rounds, width), 0.0)
    least = 0 if whole <= width else max(0, round(rounds * mean) - width // 2)
    sums = np.roll(sums, -least)[:whole]
    return least, sums / sums.sum()
