"""Sides in turn: a round calls every side once, so that a drift of the machine touches all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every counted round; one round before them warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def summary(times: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Each side's median (`seconds`) and `spread`, and the reference's time over it (`ratios`, `ratio_spread`).

    A spread is [smallest, largest]; that of a ratio is taken round by round.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: [a / b for a, b in zip(times[reference], values, strict=True)] for name, values in times.items()}
    return {
        "seconds": medians,
        "spread": {name: [min(values), max(values)] for name, values in times.items()},
        "ratios": {name: medians[reference] / seconds for name, seconds in medians.items()},
        "ratio_spread": {name: [min(values), max(values)] for name, values in ratios.items()},
    }
