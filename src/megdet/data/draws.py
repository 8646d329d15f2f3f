"""Random numbers of the plan: each is a function of seeds and purposes, so there is no generator that goes on."""

import numpy as np

from megdet.ops.integer_hash import hash_integers


def unit_interval(seed: int, *purpose: int) -> float:
    """A number in [0, 1) drawn by hash."""
    return ((hash_integers(seed, *purpose) >> 11) & ((1 << 53) - 1)) / (1 << 53)


def generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    """A generator that starts anew for each number of each purpose."""
    return np.random.Generator(np.random.Philox(key=hash_integers(seed, purpose, number) & ((1 << 64) - 1)))
