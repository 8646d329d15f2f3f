"""What a training step costs: one description, whether its numbers were measured here or are published.

    seconds = update + micro-batches + images + stragglers + collectives of batch norm and of gradients + input
    memory  = fixed (weights, momentum, gradients, libraries) + gradients that wait + images + a bucket on its way

`measurement.py` fits a `StepCost` to steps that were measured; `published.py` makes one of data sheets and counts. Here
is the arithmetic: no clock, no device, no torch.
"""

import math
from collections import Counter
from dataclasses import dataclass

from megdet.distributed.layout import Layout
from megdet.planning.network import Fabric, Message, exposed_seconds


@dataclass(frozen=True)
class StepCost:
    """Time and memory of a device's step: affine in the images of a micro-batch and in the number of micro-batches."""

    update_seconds: float
    """of a step, whatever is in it: the optimizer"""
    micro_batch_seconds: float
    """of a micro-batch, whatever is in it"""
    image_seconds: float
    """of an image on the mean canvas, forward and backward"""
    fixed_bytes: float | None = None
    """weights, momentum, gradients, the libraries; None where memory is not known"""
    accumulation_bytes: float = 0.0
    """more where a step has several micro-batches: gradients that wait while the next one is computed"""
    image_bytes: float = 0.0
    """of an image of a micro-batch, on the largest canvas"""
    least_bytes: float = 0.0
    """what a process has anyway, in its evaluation"""
    backward_seconds: float = 0.0
    """the part of image_seconds behind which gradients travel; 0 = sending overlaps with nothing"""
    load_seconds: float = 0.0
    """until a device has its next image read and resized"""
    loads_beside: bool = True
    """whether other processes load images while the step goes on"""


@dataclass(frozen=True)
class Exchange:
    """What the devices tell one another in a step."""

    bucket_bytes: tuple[int, ...]
    """gradients, in buckets that travel one after another"""
    norm_channels: tuple[int, ...]
    """of every layer of cross-device batch norm"""
    number_bytes: int = 4
    """of a statistic: 4, or 8 in float64"""
    gathers_sums: bool = False
    """whether the backward's sums are gathered and then added, as on a CPU, instead of reduced"""
    is_two_pass: bool = False
    """batch norm to the letter of Algorithm 1: mean and variance reduced one after the other, no running statistics"""

    @property
    def gradient_bytes(self) -> int:
        """Of the whole gradient."""
        return sum(self.bucket_bytes)

    def gradients(self, layout: Layout) -> list[Message]:
        """Summed over all ranks, once a step."""
        return [Message("all-reduce", float(size), layout.world_size) for size in self.bucket_bytes]

    def norms(self, layout: Layout) -> list[Message]:
        """Over a lane for every micro-batch and layer, and once a step over all ranks.

        In the merged form of Algorithm 1 count, mean and squares are gathered forward. Two sums are added up backward,
        of which the paper says nothing. Once a step the groups' statistics are folded into the running ones.
        """
        width, found = layout.lane_width, []
        for channels, layers in Counter(self.norm_channels).items():
            size, times = float(self.number_bytes * channels), layers * layout.rounds
            if self.is_two_pass:
                found.append(Message("all-reduce", size, width, 2 * times))
            else:
                found.append(Message("all-gather", 2 * size + self.number_bytes, width, times))
            found.append(Message("all-gather" if self.gathers_sums else "all-reduce", 2 * size, width, times))
        if self.norm_channels and not self.is_two_pass:
            folded = 2.0 * self.number_bytes * sum(self.norm_channels)
            found.append(Message("all-reduce", folded, layout.world_size))
        return found


@dataclass(frozen=True)
class StepTime:
    """Where the seconds of a step go."""

    images: float
    """on images of mean size"""
    overhead: float
    """what the update and every micro-batch take whatever the images"""
    stragglers: float
    """waiting for the device with the largest images"""
    norms: float
    """batch-norm collectives; nothing can hide them"""
    gradients: float
    """the part of the gradients' all-reduce that the backward does not hide"""
    input: float
    """waiting for images"""

    @property
    def compute(self) -> float:
        """Seconds of the busiest device without waiting for anything."""
        return self.images + self.overhead

    @property
    def communication(self) -> float:
        """Seconds of collectives."""
        return self.norms + self.gradients

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.stragglers + self.communication + self.input


def step_time(cost: StepCost, layout: Layout, exchange: Exchange, fabric: Fabric, slowest: float = 1.0) -> StepTime:
    """A step of a layout, as long as its busiest device takes; losses that are summed, a few numbers, are left out.

    Args:
        cost: of a device.
        layout: of the mini-batch.
        exchange: what travels.
        fabric: over what.
        slowest: the images of the slowest device as a multiple of the mean ones.
    """
    images = layout.busiest_images * cost.image_seconds
    overhead = cost.update_seconds + layout.rounds * cost.micro_batch_seconds
    stragglers = images * (slowest - 1)
    norms = math.fsum(message.seconds(fabric) for message in exchange.norms(layout))
    buckets = [message.seconds(fabric) for message in exchange.gradients(layout)]
    gradients = exposed_seconds(buckets, layout.largest_share * cost.backward_seconds)
    busy = images + overhead + stragglers + norms + gradients
    load = layout.busiest_images * cost.load_seconds
    return StepTime(
        images, overhead, stragglers, norms, gradients, max(0.0, load - busy) if cost.loads_beside else load
    )


def step_bytes(cost: StepCost, layout: Layout, exchange: Exchange, gradient_copies: int = 0) -> float | None:
    """The most that a device needs, or None where it is not known."""
    if cost.fixed_bytes is None:
        return None
    needed = cost.fixed_bytes + cost.accumulation_bytes * (layout.rounds > 1) + cost.image_bytes * layout.largest_share
    # a bucket is filled from gradients that are still there
    bucket = max(exchange.bucket_bytes, default=0) if layout.world_size > 1 else 0
    return max(needed, cost.least_bytes) + bucket + gradient_copies * exchange.gradient_bytes
