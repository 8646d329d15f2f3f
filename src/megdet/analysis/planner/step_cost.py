"""What a training step costs: measured points, and the affine model of time and memory that is fitted to them."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast, get_args

import numpy as np

from megdet.errors import InputError
from megdet.recipe import RecomputePlan

GIB = 2.0**30


@dataclass(frozen=True)
class Point:
    """Steps of one kind, as one process made them."""

    recompute: RecomputePlan
    images: int
    """of a micro-batch"""
    rounds: int
    """micro-batches of a step"""
    seconds: float
    """of a step on the typical canvas, the median; reading images is not in it"""
    bytes: int | None
    """the most that the process had, with a step on the largest canvas; None where the system does not tell"""


@dataclass(frozen=True)
class Link:
    """A connection between neighbours of a ring: a message of n bytes takes latency + n / bandwidth."""

    latency: float
    """seconds of a hop"""
    bandwidth: float
    """bytes a second that a device sends"""
    source: str
    """where these numbers are from"""


@dataclass(frozen=True)
class Measurement:
    """What was measured of a recipe on a machine; `--json` prints it and `--measured` reads it."""

    recipe: str
    """the whole recipe as YAML"""
    device: str
    """cpu or cuda"""
    machine: str
    """its name"""
    side_by_side: int
    """processes that measured at the same time, each on a device of its own or on its share of the cores"""
    num_images: int
    """of the training set"""
    num_val_images: int
    num_classes: int
    typical_canvas: tuple[int, int]
    """height and width in pixels of the canvas whose area is nearest to the mean of the first epoch: for the time"""
    largest_canvas: tuple[int, int]
    """of the first epoch: for the memory"""
    load_seconds: float
    """to read and resize one training image in one process"""
    evaluation_seconds: float
    """to detect on one validation image"""
    evaluation_bytes: int | None
    """the most that a process had which evaluated after its steps"""
    points: tuple[Point, ...]
    link: Link | None = None
    """between two processes of this machine, if it was measured"""
    others_bytes: int = 0
    """what other processes held of the GPU when measuring began; it is in no other number"""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any, source: str) -> "Measurement":
        """What `as_dict` made, also inside of what `megdet plan --json` prints; what has a default may be missing.

        Raises InputError, which names the key whose value cannot be.
        """
        content = value.get("measurement") if isinstance(value, dict) and "measurement" in value else value
        if not isinstance(content, dict):
            raise InputError(f"{source}: it holds no measurement; make one with `megdet plan RECIPE --json`")
        try:
            return _measurement(_Values(content))
        except ValueError as error:
            raise InputError(
                f"{source}: its measurement cannot be used ({error}); make one with `megdet plan RECIPE --json`"
            ) from None


class _Values:
    """The values of a JSON object, asked for by key and kind; each raises ValueError, which names the key."""

    def __init__(self, content: object, place: str = "") -> None:
        if not isinstance(content, Mapping):
            raise ValueError(f"{place} is {_shown(content)}: it must be an object")
        self.content, self.place = content, f"{place}." if place else ""

    def value(self, key: str) -> Any:
        """Whatever it is."""
        if key not in self.content:
            raise ValueError(f"{self.place}{key} is missing")
        return self.content[key]

    def text(self, key: str, *choices: str) -> str:
        """A text, one of the choices if there are any."""
        value = self.value(key)
        wanted = f"one of {', '.join(choices)}" if choices else "a text"
        return cast(str, self._checked(key, isinstance(value, str) and (not choices or value in choices), wanted))

    def number(self, key: str, *, is_divisor: bool = False) -> float:
        """A finite number, not negative, and not 0 where it divides."""
        value = self.value(key)
        # nan and infinity compare false, and so do whole numbers that are too large for a float
        is_right = _is_number(value, float) and 0 <= value <= sys.float_info.max and not (is_divisor and value == 0)
        return float(self._checked(key, is_right, f"a finite number, {'above 0' if is_divisor else 'not negative'}"))

    def whole(self, key: str, least: int = 1) -> int:
        """A whole number of at least so much."""
        value = self.value(key)
        is_right = _is_number(value) and least <= value <= sys.maxsize
        return int(self._checked(key, is_right, f"a whole number, at least {least}"))

    def canvas(self, key: str) -> tuple[int, int]:
        """Height and width in pixels."""
        value = self.value(key)
        is_right = isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(n) and n > 0 for n in value)
        height, width = self._checked(key, is_right, "a height and a width in pixels")
        return int(height), int(width)

    def objects(self, key: str) -> "list[_Values]":
        """One object or more."""
        value = self.value(key)
        found = self._checked(key, isinstance(value, list | tuple) and len(value) > 0, "a list that is not empty")
        return [_Values(own, f"{self.place}{key}[{number}]") for number, own in enumerate(found)]

    def _checked(self, key: str, is_right: bool, wanted: str) -> Any:
        if not is_right:
            raise ValueError(f"{self.place}{key} is {_shown(self.content[key])}: it must be {wanted}")
        return self.content[key]


def _is_number(value: object, *more: type) -> bool:
    """Whether it is a whole number, or one of `more`; true and false are none."""
    return isinstance(value, (int, *more)) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A value as it stands in the file, its beginning alone where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _measurement(values: _Values) -> Measurement:
    link = values.content.get("link")
    return Measurement(
        recipe=values.text("recipe"),
        device=values.text("device", "cpu", "cuda"),
        machine=values.text("machine"),
        side_by_side=values.whole("side_by_side"),
        num_images=values.whole("num_images"),
        num_val_images=values.whole("num_val_images", 0),
        num_classes=values.whole("num_classes"),
        typical_canvas=values.canvas("typical_canvas"),
        largest_canvas=values.canvas("largest_canvas"),
        load_seconds=values.number("load_seconds"),
        evaluation_seconds=values.number("evaluation_seconds"),
        evaluation_bytes=None if values.value("evaluation_bytes") is None else values.whole("evaluation_bytes", 0),
        points=tuple(_point(own) for own in values.objects("points")),
        link=None if link is None else _link(_Values(link, "link")),
        others_bytes=values.whole("others_bytes", 0) if "others_bytes" in values.content else 0,
    )


def _point(values: _Values) -> Point:
    return Point(
        recompute=cast(RecomputePlan, values.text("recompute", *get_args(RecomputePlan))),
        images=values.whole("images"),
        rounds=values.whole("rounds"),
        seconds=values.number("seconds", is_divisor=True),
        bytes=None if values.value("bytes") is None else values.whole("bytes"),
    )


def _link(values: _Values) -> Link:
    return Link(values.number("latency"), values.number("bandwidth", is_divisor=True), values.text("source"))


@dataclass(frozen=True)
class StepCost:
    """Time and memory of a device's step: affine in the images of a micro-batch and in the number of micro-batches."""

    update_seconds: float
    """of a step, whatever is in it: the optimizer"""
    micro_batch_seconds: float
    """of a micro-batch, whatever is in it"""
    image_seconds: float
    """of an image"""
    fixed_bytes: float | None = None
    """weights, momentum, gradients, the libraries; None where memory is not known"""
    accumulation_bytes: float = 0.0
    """more where a step has several micro-batches: gradients that wait while the next one is computed"""
    image_bytes: float = 0.0
    """of an image of a micro-batch"""
    least_bytes: float = 0.0
    """what a process has anyway, in its evaluation"""

    def seconds(self, images: int, rounds: int) -> float:
        """Seconds of a step of `rounds` micro-batches of so many images, on a device alone."""
        return self.update_seconds + rounds * (self.micro_batch_seconds + self.image_seconds * images)

    def bytes(self, images: int, rounds: int) -> float | None:
        """The most that such steps need, or None where it is not known."""
        if self.fixed_bytes is None:
            return None
        needed = self.fixed_bytes + self.accumulation_bytes * (rounds > 1) + self.image_bytes * images
        return max(needed, self.least_bytes)


def fit_costs(measurement: Measurement) -> dict[RecomputePlan, StepCost]:
    """The cost of a step by recompute plan. Raises InputError where a plan was measured at one size alone."""
    plans = dict.fromkeys(point.recompute for point in measurement.points)
    return {plan: _fit([p for p in measurement.points if p.recompute == plan], measurement) for plan in plans}


def _fit(points: Sequence[Point], measurement: Measurement) -> StepCost:
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
    """The three coefficients, none below 0, with the least squares of the relative errors.

    Noise may ask for a negative coefficient, which would make large or small steps free. The best one without the
    terms that ask for it is found by trying every set of terms: there are three.
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
