"""The time of a training step on many devices: arithmetic, stragglers, batch-norm and gradient collectives, input.

No clock and no device: a step is a sum of parts, each from published numbers (`machines.py`), the detector's work
(`detector.py`), the sizes of COCO's images (`images.py`) and a model after NCCL's (`network.py`).
Evaluation is no part of a step.
"""

from dataclasses import dataclass
from typing import Literal

from megdet.analysis.cluster.detector import Work, image_work, kept_values, num_gradients, resnet50
from megdet.analysis.cluster.images import largest_pixels, mean_pixels, slowest_of
from megdet.analysis.cluster.machines import Machine
from megdet.analysis.cluster.network import all_gather_seconds, all_reduce_seconds, exposed_seconds
from megdet.distributed.layout import BUCKET_BYTES

Recompute = Literal["none", "norms", "backbone"]

_GRADIENT_BYTES = 4
_STATISTIC_BYTES = 4.0
_STATE_BYTES = 3 * 4
"""Of a trained number: itself, its gradient and its momentum in float32."""
USABLE = 0.9
"""Part of a device's memory that is taken as usable: the libraries and what the convolutions need for a moment take the
rest. An assumption."""
_FROZEN_PASSES = 2
"""Reads and writes of a value by a norm layer with fixed statistics: read it, write it; the same for its gradient."""
_FORWARD_PASSES, _BACKWARD_PASSES = 4, 5
"""With statistics of the batch: read for the mean, for the variance and to be normalised, write; then read value and
gradient for two sums, read both again and write."""
FROZEN_STAGES = 2
"""The stem and the first stage, which our recipes of BN size 0 freeze."""


@dataclass(frozen=True)
class Job:
    """What a step asks of its devices."""

    devices: int
    images: int
    """of the largest micro-batch of a device"""
    rounds: int = 1
    """micro-batches of a device in a step"""
    lane_width: int = 1
    """devices that share batch statistics"""
    independent: int = 1
    """micro-batches side by side whose canvases are independent, of which the slowest is waited for"""
    batch_norm: bool = True
    """statistics of the batch; else fixed ones"""
    frozen_stages: int = 0
    algorithm1: bool = False
    """batch norm to the letter of the paper: mean and variance all-reduced one after the other, running statistics left
    alone; else as our trainer has it"""
    recompute: Recompute = "none"
    """what the backward computes again: nothing, the norm layers' outputs, or the whole backbone's forward"""
    sparse_rpn: bool = False


@dataclass(frozen=True)
class StepTime:
    """Where the seconds of a step go."""

    images: float
    """arithmetic and norm layers on images of mean size"""
    overhead: float
    """what every micro-batch takes whatever its images"""
    stragglers: float
    """waiting for the device with the largest images"""
    norms: float
    """batch-norm collectives"""
    gradients: float
    """the part of the gradients' all-reduce that the backward does not hide"""
    input: float
    """waiting for images"""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.images + self.overhead + self.stragglers + self.norms + self.gradients + self.input

    @property
    def communication(self) -> float:
        """The part of the step, 0 to 1, that collectives take."""
        return (self.norms + self.gradients) / self.total


def step_time(job: Job, machine: Machine) -> StepTime:
    """The step of a job on machines of one kind."""
    forward, backward = image_seconds(job, machine)
    images = job.rounds * job.images * (forward + backward)
    overhead = job.rounds * machine.overhead
    stragglers = images * (slowest_of(job.independent, job.rounds) - 1)
    norms = job.rounds * norm_seconds(job, machine) + fold_seconds(job, machine) if job.batch_norm else 0.0
    gradients = exposed_seconds(bucket_seconds(job, machine), job.images * backward)
    busy = images + overhead + stragglers + norms + gradients
    local = min(job.devices, machine.fabric.per_machine)
    loading = local * job.rounds * job.images / machine.images_per_second
    return StepTime(images, overhead, stragglers, norms, gradients, max(0.0, loading - busy))


def memory_bytes(job: Job, machine: Machine) -> float:
    """Bytes of a device: weights, gradients and momentum, and what its micro-batch keeps for the backward.

    All images are on the largest canvas and nothing is computed again.
    """
    return _state_bytes(job.frozen_stages) + job.images * _image_bytes(job.frozen_stages, machine)


def most_images(frozen_stages: int, machine: Machine) -> int:
    """Images of the largest micro-batch that fits; 1 where not even that one does."""
    free = USABLE * machine.memory - _state_bytes(frozen_stages)
    return max(1, int(free / _image_bytes(frozen_stages, machine)))


def fits(job: Job, machine: Machine) -> bool:
    """Whether the micro-batch fits in what is usable of the device's memory."""
    return memory_bytes(job, machine) <= USABLE * machine.memory


def image_seconds(job: Job, machine: Machine) -> tuple[float, float]:
    """Seconds of an image of mean size on one device, forward and backward.

    Convolutions and matrix products run at a fraction of the peak, norm layers at the memory's bandwidth.
    """
    work = image_work(mean_pixels(), job.frozen_stages, job.sparse_rpn)
    rate = machine.arithmetic * machine.fraction
    forward, backward = _norm_bytes(job, machine, work)
    again = work.backbone if job.recompute == "backbone" else 0.0
    return (
        work.forward / rate + forward / machine.memory_bandwidth,
        (work.backward + again) / rate + backward / machine.memory_bandwidth,
    )


def norm_seconds(job: Job, machine: Machine) -> float:
    """Seconds of all batch-norm collectives of one forward and backward; nothing can hide them.

    A norm layer of our trainer gathers count, mean and squares of the lane's devices, and its backward reduces two
    sums. Of the backward the paper says nothing, and the same is taken.
    """
    return sum(
        _forward_norm_seconds(layer.channels, job, machine) + _reduce_in_lane(2 * layer.channels, job, machine)
        for layer in resnet50()
    )


def fold_seconds(job: Job, machine: Machine) -> float:
    """Seconds of the one all-reduce a step, over all devices, that folds the groups into the running statistics."""
    if job.algorithm1:
        return 0.0
    num_bytes = _STATISTIC_BYTES * sum(2 * layer.channels for layer in resnet50())
    return all_reduce_seconds(num_bytes, job.devices, machine.fabric)


def bucket_seconds(job: Job, machine: Machine) -> list[float]:
    """Seconds of the all-reduce of each bucket of gradients, all of one size."""
    total = _GRADIENT_BYTES * num_gradients(job.frozen_stages)
    count = -(-total // BUCKET_BYTES)
    return [all_reduce_seconds(total / count, job.devices, machine.fabric)] * count


def efficiency(job: Job, alone: Job, machine: Machine) -> float:
    """The speed of a device in `job` as a part of that of one device that does the same mini-batch `alone`, 0 to 1.

    The images of the one device are of mean size, and it never waits for input.
    """
    images = alone.images * sum(image_seconds(alone, machine))
    return alone.rounds * (machine.overhead + images) / (job.devices * step_time(job, machine).total)


def _norm_bytes(job: Job, machine: Machine, work: Work) -> tuple[float, float]:
    """What norm layers read and write in the forward and in the backward, of one image."""
    forward, backward = (_FORWARD_PASSES, _BACKWARD_PASSES) if job.batch_norm else (_FROZEN_PASSES, _FROZEN_PASSES)
    # what is computed again knows its statistics: it is read and written once
    again = 0.0 if job.recompute == "none" else _FROZEN_PASSES * work.normed
    return (
        forward * work.normed * machine.value_bytes,
        (backward * work.normed_backward + again) * machine.value_bytes,
    )


def _forward_norm_seconds(channels: int, job: Job, machine: Machine) -> float:
    if job.algorithm1:
        return 2 * _reduce_in_lane(channels, job, machine)
    return all_gather_seconds(_STATISTIC_BYTES * (1 + 2 * channels), job.lane_width, machine.fabric)


def _reduce_in_lane(numbers: int, job: Job, machine: Machine) -> float:
    return all_reduce_seconds(_STATISTIC_BYTES * numbers, job.lane_width, machine.fabric)


def _state_bytes(frozen_stages: int) -> int:
    return _STATE_BYTES * num_gradients(frozen_stages)


def _image_bytes(frozen_stages: int, machine: Machine) -> float:
    return kept_values(largest_pixels(), frozen_stages) * machine.value_bytes
