"""From 1 to 1,024 devices of today: time, efficiency, and where more devices or a larger batch stop paying."""

from dataclasses import dataclass
from typing import Any

from megdet.analysis.cluster.machines import Machine
from megdet.analysis.cluster.step import (
    FROZEN_STAGES,
    Job,
    StepTime,
    efficiency,
    fits,
    memory_bytes,
    most_images,
    step_time,
)
from megdet.analysis.paper.tables import NORMAL_EPOCHS, TRAINING_IMAGES
from megdet.distributed.layout import choose_layout
from megdet.errors import InputError
from megdet.recipe import Recipe

COUNTS = tuple(2**power for power in range(11))
"""Devices that are simulated."""
LEAST_EFFICIENCY = 0.5
"""Below it more devices do not pay: half of what is paid for is not used."""


@dataclass(frozen=True)
class Asked:
    """What is asked of every number of devices."""

    images_per_device: int = 8
    """of a step; the mini-batch grows with the devices, in whole BN groups"""
    bn_size: int = 32
    """images that share batch statistics; 0 = frozen statistics, with the first two stages frozen as in our recipes"""
    batch_size: int | None = None
    """images of a step whatever the devices, instead of images_per_device"""
    noise_scale: float | None = None
    """gradient noise scale in images: a batch beyond it buys few steps for its images"""


@dataclass(frozen=True)
class Point:
    """So many devices."""

    batch_size: int
    """images a step"""
    job: Job
    step: StepTime
    efficiency: float
    """speed of a device against one device that does the same mini-batch alone, 0 to 1"""
    noise_scale: float | None
    memory_bytes: float
    """of a device, as `step.memory_bytes` reckons"""
    fits: bool
    """whether the device has them"""

    @property
    def images_per_second(self) -> float:
        """Of all devices."""
        return self.batch_size / self.step.total

    @property
    def hours(self) -> float:
        """Of the normal policy on COCO, without evaluation."""
        return NORMAL_EPOCHS * TRAINING_IMAGES / self.images_per_second / 3600

    @property
    def steps(self) -> int:
        """Of the normal policy on COCO."""
        return int(NORMAL_EPOCHS * TRAINING_IMAGES / self.batch_size)

    @property
    def examples(self) -> float | None:
        """Images for the same progress over the fewest, 1 + B / noise scale (McCandlish et al. 2018, Sec. 2.3)."""
        return None if self.noise_scale is None else 1 + self.batch_size / self.noise_scale

    @property
    def why_not(self) -> str:
        """Why it does not pay, or nothing."""
        if not self.fits:
            return "does not fit"
        if self.efficiency < LEAST_EFFICIENCY:
            return f"efficiency below {LEAST_EFFICIENCY:.0%}"
        if self.noise_scale is not None and self.batch_size > self.noise_scale:
            return f"batch beyond the noise scale of {self.noise_scale:g}"
        if self.steps < Recipe().schedule.warmup_steps:
            return f"{self.steps} steps, fewer than the {Recipe().schedule.warmup_steps} of the warmup"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "devices": self.job.devices,
            "batch_size": self.batch_size,
            "lane_width": self.job.lane_width,
            "rounds": self.job.rounds,
            "micro_batch": self.job.images,
            "seconds_per_step": self.step.total,
            "images_per_second": self.images_per_second,
            "efficiency": self.efficiency,
            "hours": self.hours,
            "steps": self.steps,
            "memory_gb": self.memory_bytes / 1e9,
            "fits": self.fits,
            "communication": self.step.communication,
            "stragglers": self.step.stragglers / self.step.total,
            "pays": not self.why_not,
            "why_not": self.why_not,
            "examples": self.examples,
        }


def simulate_scaling(machine: Machine, asked: Asked) -> list[Point]:
    """A point for every number of devices in COUNTS, with a fixed batch for as many as it has images.

    Raises InputError when bn_size does not divide the batch.
    """
    _check(asked)
    counts = [count for count in COUNTS if asked.batch_size is None or count <= asked.batch_size]
    return [_point(count, machine, asked) for count in counts]


def last_that_pays(points: list[Point]) -> Point | None:
    """The point before the first one that does not pay; None where the first does not.

    Where a few devices have too little memory, the first one is that of the fewest devices that have enough.
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
    job, alone = (_job(batch_size, count, machine, asked.bn_size) for count in (devices, 1))
    time, part = step_time(job, machine), efficiency(job, alone, machine)
    return Point(batch_size, job, time, part, asked.noise_scale, memory_bytes(job, machine), fits(job, machine))


def _job(batch_size: int, devices: int, machine: Machine, bn_size: int) -> Job:
    """BN groups are spread as by the trainer (`distributed/layout.py`)."""
    if not bn_size:
        return _frozen_job(batch_size, devices, machine)
    layout = choose_layout(batch_size // bn_size, bn_size, devices)
    return Job(
        devices=devices,
        images=layout.largest_share,
        rounds=layout.rounds,
        lane_width=layout.lane_width,
        independent=min(layout.num_lanes, layout.num_groups),
        sparse_rpn=True,
    )


def _frozen_job(batch_size: int, devices: int, machine: Machine) -> Job:
    """Nothing has to be together: a device's share is one micro-batch, or as few equal ones as fit."""
    share = -(-batch_size // devices)
    rounds = -(-share // most_images(FROZEN_STAGES, machine))
    return Job(
        devices=devices,
        images=-(-share // rounds),
        rounds=rounds,
        independent=devices,
        batch_norm=False,
        frozen_stages=FROZEN_STAGES,
        sparse_rpn=True,
    )


def _check(asked: Asked) -> None:
    if asked.images_per_device < 1:
        raise InputError(f"{asked.images_per_device} images a device: it must be at least 1")
    if asked.batch_size is not None and asked.batch_size < 1:
        raise InputError(f"a batch of {asked.batch_size} images: it must be at least 1")
    if asked.batch_size and asked.bn_size and asked.batch_size % asked.bn_size:
        raise InputError(f"BN size {asked.bn_size} does not divide the batch of {asked.batch_size} images: change one")
    if asked.noise_scale is not None and asked.noise_scale <= 0:
        raise InputError(f"a noise scale of {asked.noise_scale:g} images: it must be above 0")
