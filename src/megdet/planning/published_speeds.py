"""Published speeds of Mask R-CNN trainings on one machine beside what the cost model predicts.

Four of them set the two speeds of `published.py`; the others show how far the model is to be trusted: what it says of
more images a device and of more devices. The plain rule beside it is the same line through the same two speeds,
seconds = a + b images, for any number of devices.

All are Mask R-CNN R-50 FPN with frozen statistics on COCO at 800 px in 16 bits. We count 1.41 TFLOP an image: 1.00 of
the box detector with its stem and first stage frozen, 0.41 of the mask head on 128 RoIs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from megdet.distributed.layout import Layout
from megdet.planning.canvases import slowest_of
from megdet.planning.counts import detector_counts
from megdet.planning.published import GIGA, MACHINES, PLAIN, TERA, TUNED, Machine, Speed, dgx, published_cost
from megdet.planning.step import step_time

_MASK_HEAD_FLOPS = 0.41 * TERA
"""Of an image, forward and backward."""
_V100 = dgx("V100", 125.0, (32.0, 900.0), 6 * 20.0, 6.25, 40, "V100 data sheet; DGX-1: 4 x EDR 100 Gb/s")
_EXAMPLES = "DeepLearningExamples, Mask R-CNN for PyTorch, March 2019"
_MLPERF = "NVIDIA's deep learning performance page, 96 images a step"


@dataclass(frozen=True)
class PublishedSpeed:
    """A published speed."""

    machine: Machine
    devices: int
    micro_batch: int
    """images of a device"""
    images_per_second: float
    """of all devices together"""
    source: str
    speed: Speed
    """the end of the range to which the program belongs"""
    calibrates: bool = False
    """whether it set that speed"""

    def predicted(self, speed: Speed) -> float:
        """Images a second that the model predicts for all devices together, at a speed."""
        machine = replace(self.machine, speed=speed)
        cost = published_cost(machine, "frozen", self.devices, is_sparse_rpn=False)
        masks = _MASK_HEAD_FLOPS / (machine.arithmetic * speed.fraction)
        cost = replace(
            cost, image_seconds=cost.image_seconds + masks, backward_seconds=cost.backward_seconds + 2 / 3 * masks
        )
        layout = Layout(self.devices, self.micro_batch, self.devices, 1)
        exchange = detector_counts("frozen").exchange
        step = step_time(cost, layout, exchange, machine.fabric, slowest_of(self.devices))
        return self.devices * self.micro_batch / step.total

    def predicted_by_rule(self) -> float:
        """Images a second by the plain rule: as many times those of one device as there are devices."""
        one = replace(self, devices=1)
        return self.devices * one.predicted(self.speed)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "device": self.machine.device,
            "devices": self.devices,
            "micro_batch": self.micro_batch,
            "images_per_second": self.images_per_second,
            "predicted_plain": self.predicted(PLAIN),
            "predicted_tuned": self.predicted(TUNED),
            "error": error(self.predicted(self.speed), self),
            "plain_rule_error": error(self.predicted_by_rule(), self),
            "calibrates": self.calibrates,
            "source": self.source,
        }


def _v100(size: int, micro_batch: int, *speeds: float) -> list[PublishedSpeed]:
    """The published speeds of 1, 4 and 8 V100s with so many GB."""
    machine = replace(_V100, device=f"V100 {size}GB", memory=size * GIGA)
    calibrates = {(16, 2), (32, 16)}
    return [
        PublishedSpeed(
            machine, devices, micro_batch, speed, _EXAMPLES, PLAIN, devices == 1 and (size, micro_batch) in calibrates
        )
        for devices, speed in zip((1, 4, 8), speeds, strict=True)
    ]


PUBLISHED_SPEEDS = [
    *_v100(16, 2, 10.77, 36.88, 70.45),
    *_v100(16, 4, 12.73, 44.95, 82.90),
    *_v100(32, 4, 13.14, 50.70, 82.30),
    *_v100(32, 8, 13.05, 46.69, 87.10),
    *_v100(32, 16, 13.82, 48.41, 89.33),
    PublishedSpeed(MACHINES["a100"], 8, 12, 8 * 87.0, _MLPERF, TUNED, calibrates=True),
    PublishedSpeed(MACHINES["h100"], 8, 12, 8 * 170.0, _MLPERF, TUNED, calibrates=True),
]


def error(predicted: float, published: PublishedSpeed) -> float:
    """(predicted - published) / published."""
    return predicted / published.images_per_second - 1


def mean_errors(speeds: Sequence[PublishedSpeed]) -> tuple[float, float]:
    """The mean absolute error of the model and of the plain rule, over the speeds that set nothing."""
    others = [own for own in speeds if not own.calibrates]
    return (
        fmean(abs(error(own.predicted(own.speed), own)) for own in others),
        fmean(abs(error(own.predicted_by_rule(), own)) for own in others),
    )
