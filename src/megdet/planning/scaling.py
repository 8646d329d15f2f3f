"""Current devices from 1 to 1,024: time, efficiency, and where more devices or a larger batch stop paying."""

from dataclasses import dataclass
from typing import Any

from megdet.distributed.layout import Layout, choose_layout
from megdet.errors import InputError
from megdet.planning.batches import BatchWorth
from megdet.planning.canvases import slowest_of
from megdet.planning.counts import Variant, detector_counts
from megdet.planning.published import USABLE, Machine, published_cost
from megdet.planning.step import Exchange, StepCost, StepTime, step_bytes, step_time
from megdet.recipe import Schedule
from megdet.run_length import decay_of

COUNTS = tuple(2**power for power in range(11))
"""Devices that are simulated."""
LEAST_EFFICIENCY = 0.5
"""Efficiency below which more devices do not pay: less than half of their time is used."""


@dataclass(frozen=True)
class Asked:
    """The training that is simulated on every number of devices."""

    images_per_device: int = 8
    """images of a device in a step; the mini-batch grows with the devices, in whole BN groups"""
    bn_size: int = 32
    """images that share batch statistics; 0 = frozen statistics, the first two stages frozen too"""
    batch_size: int | None = None
    """images of a step on any number of devices, instead of images_per_device"""
    noise_scale: float | None = None
    """gradient noise scale in images: a batch beyond it saves few steps"""


_IMAGES = 118_000
"""Images of COCO train2017, as the paper rounds them (Sec. 4)."""
_NORMAL = Schedule(policy="normal")


@dataclass(frozen=True)
class Point:
    """The training on one number of devices."""

    batch_size: int
    """images a step"""
    layout: Layout
    step: StepTime
    efficiency: float
    """speed of a device relative to one device that does the same mini-batch alone, 0 to 1"""
    worth: BatchWorth | None
    """how much the batch pays; None without a noise scale"""
    memory_bytes: float
    """memory of a device: its state, what a micro-batch on the largest canvas keeps, and a bucket of gradients"""
    fits: bool
    """whether the device has so much memory"""

    @property
    def images_per_second(self) -> float:
        """Images a second of all devices together."""
        return self.batch_size / self.step.total

    @property
    def hours(self) -> float:
        """Hours of the normal policy on COCO, without evaluation."""
        return decay_of(_NORMAL).epochs * _IMAGES / self.images_per_second / 3600

    @property
    def steps(self) -> int:
        """Steps of the normal policy on COCO."""
        return int(decay_of(_NORMAL).epochs * _IMAGES / self.batch_size)

    @property
    def why_not(self) -> str:
        """Why this number of devices does not pay, or ""."""
        if not self.fits:
            return "does not fit"
        if self.efficiency < LEAST_EFFICIENCY:
            return f"efficiency below {LEAST_EFFICIENCY:.0%}"
        if self.worth is not None and not self.worth.pays:
            return f"batch beyond the noise scale of {self.worth.noise_scale:g}"
        if self.steps < _NORMAL.warmup_steps:
            return f"{self.steps} steps, fewer than the {_NORMAL.warmup_steps} of the warmup"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "devices": self.layout.world_size,
            "batch_size": self.batch_size,
            "lane_width": self.layout.lane_width,
            "rounds": self.layout.rounds,
            "micro_batch": self.layout.largest_share,
            "seconds_per_step": self.step.total,
            "images_per_second": self.images_per_second,
            "efficiency": self.efficiency,
            "hours": self.hours,
            "steps": self.steps,
            "memory_gb": self.memory_bytes / 1e9,
            "fits": self.fits,
            "communication": self.step.communication / self.step.total,
            "stragglers": self.step.stragglers / self.step.total,
            "pays": not self.why_not,
            "why_not": self.why_not,
            "examples": None if self.worth is None else self.worth.examples,
        }


def simulate_scaling(machine: Machine, asked: Asked) -> list[Point]:
    """A point for every number of devices in COUNTS; a fixed batch allows at most as many devices as it has images.

    Raises InputError if bn_size does not divide the batch, and for numbers that are too small.
    """
    _check(asked)
    counts = [count for count in COUNTS if asked.batch_size is None or count <= asked.batch_size]
    return [_point(count, machine, asked) for count in counts]


def last_that_pays(points: list[Point]) -> Point | None:
    """The point before the first one that does not pay; None if the first does not pay.

    Points on so few devices that the training does not fit are skipped at the start.
    """
    paying = None
    for point in points:
        if paying is None and not point.fits:
            continue
        if point.why_not:
            break
        paying = point
    return paying


def _point(devices: int, machine: Machine, asked: Asked) -> Point:
    group = asked.bn_size or 1
    batch_size = asked.batch_size or -(-asked.images_per_device * devices // group) * group
    variant: Variant = "trained" if asked.bn_size else "frozen"
    exchange, cost = detector_counts(variant).exchange, published_cost(machine, variant, devices)
    room = USABLE * machine.memory
    if asked.bn_size:
        layout, alone = (choose_layout(batch_size // group, group, count) for count in (devices, 1))
    else:
        layout, alone = (_frozen_layout(batch_size, count, cost, exchange, room) for count in (devices, 1))
    step = step_time(
        cost, layout, exchange, machine.fabric, slowest_of(min(layout.num_lanes, layout.num_groups), layout.rounds)
    )
    memory = step_bytes(cost, layout, exchange) or 0.0
    worth = None if asked.noise_scale is None else BatchWorth(batch_size, asked.noise_scale)
    # one device has images of mean size, and never waits for input
    efficiency = step_time(cost, alone, exchange, machine.fabric).compute / (devices * step.total)
    return Point(batch_size, layout, step, efficiency, worth, memory, memory <= room)


def _frozen_layout(batch_size: int, devices: int, cost: StepCost, exchange: Exchange, room: float) -> Layout:
    """A layout without groups: a device's share is one micro-batch, or as few equal ones as fit.

    Uneven shares are rounded up, so the layout may have a few images more than the batch.
    """
    one_image = step_bytes(cost, Layout(devices, 1, devices, 1), exchange) or 0.0
    most = max(1, 1 + int((room - one_image) / cost.image_bytes))
    share = -(-batch_size // devices)
    rounds = -(-share // most)
    return Layout(devices * rounds, -(-share // rounds), devices, 1)


def _check(asked: Asked) -> None:
    if asked.images_per_device < 1:
        raise InputError(f"{asked.images_per_device} images a device: it must be at least 1")
    if asked.batch_size is not None and asked.batch_size < 1:
        raise InputError(f"a batch of {asked.batch_size} images: it must be at least 1")
    if asked.batch_size and asked.bn_size and asked.batch_size % asked.bn_size:
        raise InputError(f"BN size {asked.bn_size} does not divide the batch of {asked.batch_size} images: change one")
    if asked.noise_scale is not None and asked.noise_scale <= 0:
        raise InputError(f"a noise scale of {asked.noise_scale:g} images: it must be above 0")
