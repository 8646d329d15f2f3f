"""Student's t: intervals over a few seeds, and how many seeds a difference needs."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

_POWER = 0.8
MOST_SEEDS = 1000
"""The largest number of seeds that is looked for."""


def t_cdf(t: float, freedom: float) -> float:
    """The probability that Student's t with `freedom` degrees of freedom (1 or more) is at most `t`.

    With x = root(freedom) tan(angle) the density is a power of a cosine; Simpson's rule does the rest.
    """
    angles = np.linspace(0.0, math.atan(abs(t) / math.sqrt(freedom)), 2001)
    values = np.cos(angles) ** (freedom - 1)
    area = (values[0] + values[-1] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum()) * angles[1] / 3
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + math.copysign(min(0.5, scale * float(area)), t)


def t_quantile(probability: float, freedom: float) -> float:
    """The t that is not exceeded with this probability (0.5 or more, below 1)."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability and high < 1e12:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def welch_interval(ours: Sequence[float], theirs: Sequence[float], level: float) -> tuple[float, float] | None:
    """The interval of mean(theirs) - mean(ours) by Welch's t; None with fewer than two values on a side."""
    if min(len(ours), len(theirs)) < 2:
        return None
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (ours, theirs)]
    difference, variance = float(np.mean(theirs) - np.mean(ours)), sum(parts)
    if variance == 0.0:
        return difference, difference
    freedom = variance**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (ours, theirs), strict=True))
    half = t_quantile((1 + level) / 2, freedom) * math.sqrt(variance)
    return difference - half, difference + half


def mean_interval(values: Sequence[float], level: float) -> tuple[float, float] | None:
    """The interval of a mean by Student's t; None with fewer than two values."""
    if len(values) < 2:
        return None
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = t_quantile((1 + level) / 2, float(len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean - half, mean + half


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within the groups; None if no group has two values."""
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return None
    return math.sqrt(sum(float(np.var(values)) * len(values) for values in groups) / freedom)


def seeds_needed(difference: float, deviation: float, level: float = 0.95) -> int | None:
    """Seeds of each recipe for a t-test to find a true difference of this size in 8 of 10 cases (power 0.8).

    `deviation` is that of one recipe over its seeds, `level` 0.95 a test at 5%. None if more than `MOST_SEEDS` are.
    """
    if difference == 0.0:
        return None
    effect = abs(difference) / deviation if deviation else math.inf
    normal = NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(_POWER)
    fewest = min(MOST_SEEDS + 1.0, 2 * (normal / effect) ** 2)  # of a t that is known better than by seeds
    for seeds in range(max(2, int(fewest)), MOST_SEEDS + 1):
        freedom = 2.0 * seeds - 2.0
        both = t_quantile((1 + level) / 2, freedom) + t_quantile(_POWER, freedom)
        if seeds >= 2 * (both / effect) ** 2:
            return seeds
    return None
