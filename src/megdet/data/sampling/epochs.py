"""The order of the images of an epoch: a permutation, or with frequencies a list of the same length."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megdet.data.draws import generator, unit_interval

_ORDER, _REPEATS, _REPEATS_ORDER = 1, 9, 10
"""Purposes of random numbers, numbered among those of the plan."""


class EpochOrders:
    """The orders of the epochs of a run.

    Args:
        num_images: images of the data set, and places of an epoch.
        seed: of the recipe.
        frequencies: (images,) how often each comes, compared with the others; None: every image comes once.
    """

    def __init__(self, num_images: int, seed: int, frequencies: NDArray[np.float64] | None = None) -> None:
        self.num_images, self.seed, self.frequencies = num_images, seed, frequencies
        self.permutation = lru_cache(maxsize=3)(self._permutation)
        """all image indices, once each, in an order of epoch 0, 1, ..."""
        self.places = lru_cache(maxsize=3)(self._places)
        """the image index of each place of epoch 0, 1, ..., and how often it has come in the epoch before"""

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return generator(self.seed, _ORDER, epoch).permutation(self.num_images)

    def _places(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        permutation = self.permutation(epoch)
        if self.frequencies is None:
            return permutation, np.zeros_like(permutation)
        counts = _counts(self.frequencies[permutation], unit_interval(self.seed, _REPEATS, epoch))
        copies = np.concatenate([np.arange(count) for count in counts.tolist()])
        mixed = generator(self.seed, _REPEATS_ORDER, epoch).permutation(self.num_images)
        return np.repeat(permutation, counts)[mixed], copies[mixed]


def _counts(weights: NDArray[np.float64], offset: float) -> NDArray[np.int64]:
    """How often each of n images comes, n in all, in proportion to its weight: systematic sampling from an offset.

    A count is n times the weight's part of their sum, rounded up or down; over offsets in [0, 1) its mean is exact.
    """
    sums = np.cumsum(weights)
    offset = math.floor(offset * 2**20) / 2**20  # so that the last sum is exact
    ends = np.floor(sums / sums[-1] * len(weights) + offset).astype(np.int64)
    counts: NDArray[np.int64] = np.diff(ends, prepend=0)
    return counts
