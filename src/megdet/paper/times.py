"""The paper's training times, predicted: two rows of Table 3 set two constants, all other rows are predictions.

    hours = fixed + epochs * images / batch size * seconds a step / 3600

The two constants are the part of the TITAN Xp's peak that the paper's program reached, and the hours of a run that
neither more devices nor fewer epochs shorten (`fixed`). They are set by the first and the last run of BN size 16 and
the normal policy: 16 images on 8 GPUs and 256 on 128, the two ends of the claim that the paper makes.

A plain rule, `hours = fixed + slope * epochs / GPUs`, is set by the same two rows and knows nothing about steps. It
shows how much of the fit is due to the cost model.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from megdet.distributed.layout import Layout
from megdet.paper.tables import TABLE3, TRAINING_IMAGES, TrainingRow, timed_rows
from megdet.planning.canvases import slowest_of
from megdet.planning.counts import Variant, detector_counts
from megdet.planning.published import GIGA, TITAN_XP, Machine, Recompute, published_cost
from megdet.planning.step import StepTime, step_time

CALIBRATED_BY = tuple(
    row for row in TABLE3 if (row.bn_size, row.policy) == (16, "normal") and row.batch_size in (16, 256)
)
GOOD = 0.2
"""The error below which a prediction counts as good."""
_RECOMPUTED_FROM = 32
"""Table 3: "when the BN size >= 32, the sublinear memory is applied"."""


@dataclass(frozen=True)
class Assumptions:
    """Our assumptions about what the paper leaves open."""

    machine: Machine = TITAN_XP
    recompute: Recompute = "norms"
    """what sublinear memory computes again; by the paper it reduces the speed "slightly" """
    fixed: Literal["run", "epoch"] = "run"
    """whether the fixed time is needed once a run, or once an epoch like an evaluation"""


OTHERS = {
    "a fixed time an epoch instead of a run": Assumptions(fixed="epoch"),
    "sublinear memory runs the backbone's forward again": Assumptions(recompute="backbone"),
    "sublinear memory costs nothing": Assumptions(recompute="none"),
    "10 Gb/s Ethernet between the machines": Assumptions(
        replace(TITAN_XP, fabric=replace(TITAN_XP.fabric, network_bandwidth=1.25 * GIGA))
    ),
}
"""Other readings of the paper, to see how much depends on ours."""


_NO_GPUS = (
    "2 and 4 times the batch divide the paper's hours by more than 2 and 4; we assume 2 and 4 times the GPUs, which "
    "Table 2 does not print, and no sum of costs scales better than linearly"
)
_MISSED = {
    ("table2", 32, 0): _NO_GPUS,
    ("table2", 64, 0): _NO_GPUS,
    (
        "table3",
        8,
        8,
    ): "by the paper's hours a step with 1 image a GPU takes twice as long on 8 GPUs as on 2, and hardly "
    "less than with 2 images: something other than images and collectives takes time there",
}
"""Why we think that a row is missed, by table, batch size and BN size."""


@dataclass(frozen=True)
class Constants:
    """The constants that the two rows set."""

    fraction: float
    """fraction of the TITAN Xp's peak that is reached"""
    fixed_hours: float
    """fixed hours of a run, or of an epoch"""


@dataclass(frozen=True)
class PlainRule:
    """hours = fixed + slope * epochs / GPUs, for any mini-batch, BN size and network."""

    fixed_hours: float
    slope: float
    """hours of one epoch on one GPU"""

    def hours(self, row: TrainingRow) -> float:
        """Predicted hours of a row of Table 2 or 3."""
        return self.fixed_hours + self.slope * row.epochs / row.devices


@dataclass(frozen=True)
class Prediction:
    """A row of Table 2 or 3 beside its predicted time."""

    row: TrainingRow
    hours: float
    seconds: float
    """predicted seconds of a step"""

    @property
    def error(self) -> float:
        """(predicted - paper) / paper."""
        return self.hours / _hours(self.row) - 1

    @property
    def paper_seconds(self) -> float:
        """Seconds of a step if the paper's hours were all spent on steps."""
        return _hours(self.row) * 3600 / _num_steps(self.row)

    @property
    def calibrated(self) -> bool:
        """Whether this row set the constants."""
        return self.row in CALIBRATED_BY

    @property
    def is_good(self) -> bool:
        """Whether the error is under 20%."""
        return abs(self.error) < GOOD

    @property
    def why_missed(self) -> str:
        """Our explanation of an error of 20% or more, or nothing."""
        row = self.row
        return "" if self.is_good else _MISSED.get((row.table, row.batch_size, row.bn_size), "unexplained")

    def as_dict(self) -> dict[str, Any]:
        """For --json. `policy` is normal or long; half of the linear scaling rule's rate stands in `rate`, as half."""
        row = self.row
        return {
            "table": row.table,
            "batch_size": row.batch_size,
            "bn_size": row.bn_size,
            "devices": row.devices,
            "devices_printed": row.num_gpus is not None,
            "policy": row.policy,
            "rate": row.rate,
            "paper_hours": row.hours,
            "predicted_hours": self.hours,
            "error": self.error,
            "seconds_per_step": self.seconds,
            "calibrated": self.calibrated,
        }


def paper_layout(row: TrainingRow) -> Layout:
    """One micro-batch a GPU, and batch norm over neighbouring GPUs, within a machine by Sec. 3.3."""
    images = row.batch_size // row.devices
    group = row.bn_size or images
    return Layout(row.batch_size // group, group, row.devices, group // images)


def paper_step(row: TrainingRow, machine: Machine, recompute: Recompute = "norms") -> StepTime:
    """The step of a row: exactly Algorithm 1, the loss of every anchor, a canvas for every GPU's images."""
    variant: Variant = "trained" if row.bn_size else "frozen"
    again: Recompute = recompute if row.bn_size >= _RECOMPUTED_FROM else "none"
    cost = published_cost(machine, variant, row.devices, is_sparse_rpn=False, recompute=again)
    exchange = replace(detector_counts(variant).exchange, is_two_pass=True)
    return step_time(cost, paper_layout(row), exchange, machine.fabric, slowest_of(row.devices))


def predict_paper(assumptions: Assumptions | None = None) -> tuple[Constants, list[Prediction]]:
    """The constants, and every row of Tables 2 and 3 that has a time beside its prediction."""
    assumptions = assumptions or Assumptions()
    constants = calibrate(assumptions)
    predictions = []
    for row in timed_rows():
        seconds = _step_seconds(row, assumptions, constants.fraction)
        hours = constants.fixed_hours * _times(row, assumptions) + _num_steps(row) * seconds / 3600
        predictions.append(Prediction(row, hours, seconds))
    return constants, predictions


def count_good(predictions: list[Prediction]) -> tuple[int, int]:
    """How many trainings are predicted within GOOD, and how many there are.

    The rows that set the constants are left out. A training in both tables counts once: the row of BN size 0 in Table 3
    is the row of 16 images in Table 2.
    """
    trainings = {
        replace(prediction.row, table="table3", num_gpus=prediction.row.devices): prediction.is_good
        for prediction in predictions
        if not prediction.calibrated
    }
    return sum(trainings.values()), len(trainings)


def plain_rule() -> PlainRule:
    """The line through the two rows that set the constants."""
    slow, fast = CALIBRATED_BY
    slope = (_hours(slow) - _hours(fast)) / (slow.epochs / slow.devices - fast.epochs / fast.devices)
    return PlainRule(_hours(slow) - slope * slow.epochs / slow.devices, slope)


def predict_by_rule() -> list[Prediction]:
    """The plain rule's predictions for every row of Tables 2 and 3 with a time; `seconds` are of a step."""
    rule = plain_rule()
    predictions = []
    for row in timed_rows():
        seconds = rule.slope * row.epochs / row.devices * 3600 / _num_steps(row)
        predictions.append(Prediction(row, rule.hours(row), seconds))
    return predictions


@cache
def calibrate(assumptions: Assumptions) -> Constants:
    """The constants that give both rows their printed hours, by bisection of the fraction of the peak."""
    slow, fast = CALIBRATED_BY  # both rows have equal length, so the fixed hours cancel in their difference
    low, high = 1e-3, 1.0
    for _ in range(60):
        fraction = math.sqrt(low * high)
        difference = _step_hours(slow, assumptions, fraction) - _step_hours(fast, assumptions, fraction)
        if difference > _hours(slow) - _hours(fast):
            low = fraction
        else:
            high = fraction
    fixed = _hours(slow) - _step_hours(slow, assumptions, fraction)
    return Constants(fraction, fixed / _times(slow, assumptions))


def _times(row: TrainingRow, assumptions: Assumptions) -> float:
    return row.epochs if assumptions.fixed == "epoch" else 1.0


def _step_hours(row: TrainingRow, assumptions: Assumptions, fraction: float) -> float:
    return _num_steps(row) * _step_seconds(row, assumptions, fraction) / 3600


def _step_seconds(row: TrainingRow, assumptions: Assumptions, fraction: float) -> float:
    own = assumptions.machine
    machine = replace(own, speed=replace(own.speed, fraction=fraction))
    return paper_step(row, machine, assumptions.recompute).total


def _num_steps(row: TrainingRow) -> float:
    return row.epochs * TRAINING_IMAGES / row.batch_size


def _hours(row: TrainingRow) -> float:
    assert row.hours is not None, f"{row.name} has no time"
    return row.hours
