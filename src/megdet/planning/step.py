"""The cost of a training step, in one description for measured and published numbers.

    seconds = update + micro-batches + images + stragglers + collectives of batch norm and of gradients + input
    memory  = fixed (weights, momentum, gradients, libraries, on a CPU the copy from which checkpoints are written)
              + waiting gradients + images + a bucket being sent

`measurement.py` fits a `StepCost` to measured steps; `published.py` makes one from data sheets and counts. This module
is pure arithmetic.
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
    """seconds of a step that do not depend on its images: the optimizer"""
    micro_batch_seconds: float
    """seconds of a micro-batch that do not depend on its images"""
    image_seconds: float
    """seconds of an image on the mean canvas, forward and backward"""
    fixed_bytes: float | None = None
    """weights, momentum, gradients, libraries, on a CPU the copy of the state; None if memory is not known"""
    accumulation_bytes: float = 0.0
    """added if a step has several micro-batches: gradients that wait while the next one is computed"""
    image_bytes: float = 0.0
    """bytes of an image of a micro-batch, on the largest canvas"""
    least_bytes: float = 0.0
    """least memory of a process, which its evaluation needs"""
    backward_seconds: float = 0.0
    """the part of image_seconds during which gradients are sent; 0 = sending overlaps with nothing"""
    load_seconds: float = 0.0
    """seconds to read and resize one image for a device"""
    loads_beside: bool = True
    """whether other processes load images during the step"""


@dataclass(frozen=True)
class Exchange:
    """What the devices send to one another in a step."""

    bucket_bytes: tuple[int, ...]
    """gradients, in buckets that are sent one after another"""
    norm_channels: tuple[int, ...]
    """channels of each layer of cross-device batch norm"""
    number_bytes: int = 4
    """bytes of a statistic: 4, or 8 in float64"""
    gathers_sums: bool = False
    """whether the backward's sums are gathered and then added, as on a CPU, instead of reduced"""
    is_two_pass: bool = False
    """batch norm as in Algorithm 1: mean and variance reduced one after the other, no running statistics"""

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the whole gradient."""
        return sum(self.bucket_bytes)

    def gradients(self, layout: Layout) -> list[Message]:
        """The all-reduces of gradients over all ranks, once a step."""
        return [Message("all-reduce", float(size), layout.world_size) for size in self.bucket_bytes]

    def norms(self, layout: Layout) -> list[Message]:
        """The collectives of batch norm: over a lane for every micro-batch and layer, over all ranks once a step.

        The merged form of Algorithm 1 gathers count, mean and squares forward. The backward adds up two sums, which the
        paper does not mention. Once a step the groups' statistics are folded into the running statistics.
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
    """The seconds of a step, by what they are spent on."""

    images: float
    """computing images of mean size"""
    overhead: float
    """the update, and the part of every micro-batch that does not depend on its images"""
    stragglers: float
    """waiting for the device with the largest images"""
    norms: float
    """batch-norm collectives; nothing can hide them"""
    gradients: float
    """the part of the gradients' all-reduce that the backward does not hide"""
    input: float
    """waiting for images to be loaded"""

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
    """The time of a step: that of its busiest device. The sum of the losses, a few numbers, is left out.

    Args:
        cost: the cost of a device's step.
        layout: the layout of the mini-batch.
        exchange: what the devices send.
        fabric: their connection.
        slowest: the images of the slowest device as a multiple of the mean.
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
    """The peak of memory of a device, or None if it is not known."""
    if cost.fixed_bytes is None:
        return None
    needed = cost.fixed_bytes + cost.accumulation_bytes * (layout.rounds > 1) + cost.image_bytes * layout.largest_share
    # while a bucket is filled, its gradients exist twice
    bucket = max(exchange.bucket_bytes, default=0) if layout.world_size > 1 else 0
    return max(needed, cost.least_bytes) + bucket + gradient_copies * exchange.gradient_bytes
