"""Compares a step made again with its line in metrics.jsonl, which finds a machine that computes wrongly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megdet.recipe import Precision

LIMITS: Mapping[Precision, float] = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2}
"""The allowed relative difference by precision. The first two are those of the contract, the others our choice."""
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Compared:
    """A step here and in metrics.jsonl."""

    step: int
    """the number of the step: 1, 2, ..."""
    difference: float
    """the largest relative difference of a loss or of the gradient norm; infinite if one side is not finite"""
    name: str
    here: float
    there: float


@dataclass(frozen=True)
class Comparison:
    """All steps from the checkpoint on that are in metrics.jsonl."""

    steps: Sequence[Compared]
    limit: float
    is_exact: bool
    """whether later steps must agree as well as the first: in float64"""

    @property
    def first_wrong(self) -> Compared | None:
        """The first step that differs by more than the limit."""
        return next((own for own in self.steps if own.difference > self.limit), None)

    def sentence(self) -> str:
        """The verdict in one line."""
        if not self.steps:
            return "metrics.jsonl has no line of these steps to compare with"
        first, last, wrong = self.steps[0].step, self.steps[-1].step, self.first_wrong
        span = f"step {first}" if first == last else f"steps {first} to {last}"
        if wrong is None:
            worst = max(self.steps, key=lambda own: own.difference)
            return (
                f"{span} agree with metrics.jsonl: the largest relative difference is {worst.difference:.2g}, allowed "
                f"{self.limit:g}"
            )
        before = "the steps before it agree, so it" if wrong.step > first else "it"
        doubt = ""
        if not self.is_exact and wrong.step > first:
            doubt = (
                "; on another number of devices a near-tie may flip in this precision: replay it on as many as it had"
            )
        return (
            f"step {wrong.step} differs: {wrong.name} is {wrong.here:.9g} here and {wrong.there:.9g} in metrics.jsonl, "
            f"a relative difference of {wrong.difference:.2g}, allowed {self.limit:g}; {before} was computed wrongly "
            f"by a machine, then or now, unless code or data have changed{doubt}"
        )


def compare(here: Sequence[Mapping[str, Any]], there: Sequence[Mapping[str, Any]], precision: Precision) -> Comparison:
    """Compare the lines of steps with those of the run, as far as it has them."""
    recorded = {line["step"]: line for line in there if "loss" in line}
    found = [_compared(line, recorded[line["step"]]) for line in here if line["step"] in recorded]
    return Comparison(found, LIMITS[precision], precision == "float64")


def _compared(here: Mapping[str, Any], there: Mapping[str, Any]) -> Compared:
    names = [name for name, value in here.items() if isinstance(value, float) and name in there]
    apart = {name: _relative(here[name], there[name]) for name in names}
    name = max(names, key=lambda own: apart[own])
    return Compared(here["step"], apart[name], name, here[name], there[name])


def _relative(here: float, there: float) -> float:
    if not (math.isfinite(here) and math.isfinite(there)):
        return 0.0 if here == there or (math.isnan(here) and math.isnan(there)) else math.inf
    return abs(here - there) / max(abs(there), _SMALLEST)
