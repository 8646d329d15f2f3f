"""A measurement of a recipe on a machine, and the cost of a step that is fitted to it."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from megdet.errors import InputError
from megdet.files import read_json
from megdet.planning.step import StepCost
from megdet.recipe import RecomputePlan

GIB = 2.0**30
Whole = Annotated[int, msgspec.Meta(ge=1, le=sys.maxsize)]
Whole0 = Annotated[int, msgspec.Meta(ge=0, le=sys.maxsize)]
Above0 = Annotated[float, msgspec.Meta(gt=0, le=sys.float_info.max)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]


@dataclass(frozen=True)
class TimedSteps:
    """Steps of one kind, made by one process."""

    recompute: RecomputePlan
    images: Whole
    """images of a micro-batch"""
    rounds: Whole
    """micro-batches of a step"""
    seconds: Above0
    """median seconds of a step on the typical canvas, without reading images"""
    bytes: Whole | None
    """peak memory of the process, with a step on the largest canvas; None if the system does not tell"""


@dataclass(frozen=True)
class Measurement:
    """A measurement of a recipe on a machine; `--json` prints it and `--measured` reads it."""

    recipe: str
    """the whole recipe as YAML"""
    device: Literal["cpu", "cuda"]
    machine: str
    """name of the machine"""
    side_by_side: Whole
    """processes that measured at the same time, each on its own device or its share of the cores"""
    num_images: Whole
    """images of the training set"""
    num_val_images: Whole0
    num_classes: Whole
    typical_canvas: tuple[Whole, Whole]
    """height and width in pixels of the canvas whose area is nearest to the mean of the first epoch: for the time"""
    largest_canvas: tuple[Whole, Whole]
    """largest canvas of the first epoch, for the memory"""
    load_seconds: NotNegative
    """seconds to read and resize one training image in one process"""
    evaluation_seconds: NotNegative
    """seconds to detect on one validation image"""
    evaluation_bytes: Whole0 | None
    """the peak of a process that evaluated after its steps"""
    points: Annotated[tuple[TimedSteps, ...], msgspec.Meta(min_length=1)]
    latency: NotNegative | None = None
    """seconds of a hop between two processes of this machine, if it was measured"""
    bandwidth: Above0 | None = None
    """bytes a second between the two processes"""
    others_bytes: Whole0 = 0
    """memory of the GPU that other processes held when measuring began; no other number includes it"""


@dataclass(frozen=True)
class _PlanFile:
    """The part of the output of `megdet plan --json` that is read again."""

    measurement: Measurement


def read_measurement(path: Path) -> Measurement:
    """The measurement in the output of `megdet plan --json`. Raises InputError, which names the wrong key."""
    try:
        return read_json(path, _PlanFile).measurement
    except InputError as error:
        raise InputError(f"{error}; make one with `megdet plan RECIPE --json`") from None


def fit_costs(measurement: Measurement) -> dict[RecomputePlan, StepCost]:
    """The cost of a step by recompute plan. Raises InputError if one was measured at a single size."""
    plans = dict.fromkeys(point.recompute for point in measurement.points)
    return {plan: _fit([p for p in measurement.points if p.recompute == plan], measurement) for plan in plans}


def _fit(points: Sequence[TimedSteps], measurement: Measurement) -> StepCost:
    sizes = sorted({point.images for point in points})
    if len(sizes) < 2:
        raise InputError(
            f"recompute {points[0].recompute} was measured with micro-batches of {sizes[0]} images alone, which shows "
            "no slope: give at least two --sizes"
        )
    seconds = _least_squares(((1, p.rounds, p.rounds * p.images) for p in points), [p.seconds for p in points])
    if any(point.bytes is None for point in points):
        return StepCost(*seconds)
    memory = _least_squares(
        ((1, int(p.rounds > 1), p.images) for p in points), [float(p.bytes) for p in points if p.bytes is not None]
    )
    return StepCost(*seconds, *memory, float(measurement.evaluation_bytes or 0))


def _least_squares(rows: Iterable[Sequence[int]], values: Sequence[float]) -> tuple[float, float, float]:
    """Three coefficients, none below 0, with the least squares of the relative errors.

    With noise the best fit may have a negative coefficient, which makes no sense. The best fit without negative ones is
    found by trying every subset of the three terms.
    """
    target = np.asarray(values, dtype=np.float64)
    matrix = np.asarray(list(rows), dtype=np.float64) / target[:, None]
    best, least = np.zeros(3), math.inf
    for chosen in range(1, 8):
        terms = [i for i in range(3) if chosen >> i & 1]
        found = np.linalg.lstsq(matrix[:, terms], np.ones(len(target)), rcond=None)[0]
        error = float(((matrix[:, terms] @ found - 1) ** 2).sum())
        if found.min() >= 0 and error < least:
            least, best = error, np.zeros(3)
            best[terms] = found
    return float(best[0]), float(best[1]), float(best[2])
