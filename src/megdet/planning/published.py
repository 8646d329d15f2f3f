"""The cost of a step from published numbers: machines and devices, each number with its source, and counted work.

Arithmetic is dense (no sparsity) with sums in float32, at the boost clock, from NVIDIA's data sheets. NVLink and PCIe
have the bandwidths in NCCL (`src/graph/topo.h`): 20.0, 20.6 and 40.1 GB/s of a link of the A100, H100 and B200, of
which they have 12, 18 and 18; 12 GB/s of PCIe 3.0 x16. Networks: one card a GPU as in NVIDIA's DGX and HGX machines.
Images are those of `canvases.py`, the detector's work that of `counts.py`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from megdet.errors import InputError, nearest
from megdet.planning.canvases import largest_pixels, mean_pixels
from megdet.planning.counts import TILE, Variant, detector_counts
from megdet.planning.network import Fabric, nccl_fabric
from megdet.planning.step import StepCost

GIGA, TERA = 1e9, 1e12
USABLE = 0.9
"""Part of a device's memory that counts as usable; libraries and short-lived buffers of convolutions take the rest. An
assumption."""
_STATE_NUMBERS = 3
"""Numbers in float32 for each trained number: itself, its gradient and its momentum."""
_FROZEN_PASSES = 2
"""Reads and writes of a value by a norm layer with fixed statistics: one each, and one each for its gradient."""
_FORWARD_PASSES, _BACKWARD_PASSES = 4, 5
"""Reads and writes of a value by a norm layer with batch statistics: read for the mean, for the variance and to be
normalised, write; then read value and gradient for two sums, read both again and write."""

Recompute = Literal["none", "norms", "backbone"]
"""What is recomputed in the backward: nothing, the norm layers' outputs, or the whole backbone's forward."""


@dataclass(frozen=True)
class Speed:
    """What a program makes of a device."""

    fraction: float
    """part of the peak that convolutions and matrix products achieve"""
    overhead: float
    """seconds of a micro-batch independent of its images: launches, small kernels, waits for the host"""


PLAIN, TUNED = Speed(0.166, 0.0468), Speed(0.640, 0.036)
"""The slow and the fast end of what programs make of current devices.

Each is set by two published speeds of Mask R-CNN in 16 bits (`published_speeds.py`, which has others beside their
predictions): PLAIN by PyTorch programs of 2019 on V100s, TUNED by NVIDIA's entries to MLPerf on A100s and H100s."""


@dataclass(frozen=True)
class Machine:
    """A machine and its devices."""

    device: str
    arithmetic: float
    """published peak of a device in the precision of the training, FLOP/s"""
    memory_bandwidth: float
    """published, of a device, bytes a second"""
    memory: float
    """bytes of a device's memory, by its data sheet"""
    value_bytes: int
    """bytes of an activation"""
    speed: Speed
    fabric: Fabric
    images_per_second: float
    """decoded and resized by the processors of a machine"""
    source: str


PIL_IMAGES_PER_CORE, OUR_IMAGES_PER_CORE = 130.0, 572.0
"""JPEG files of 640 x 480 to tensors of 800 x 1067 a second, measured on one core (docs/benchmarks.md, Input)."""

TITAN_XP = Machine(
    device="TITAN Xp",
    arithmetic=12.15 * TERA,
    memory_bandwidth=547.7 * GIGA,
    memory=12 * GIGA,
    value_bytes=4,
    speed=replace(PLAIN, fraction=1.0),
    fabric=nccl_fabric(8, "pcie", link_bandwidth=12.0 * GIGA, network_bandwidth=12.0 * GIGA),
    images_per_second=16 * PIL_IMAGES_PER_CORE,
    source="NVIDIA: 3,840 cores at 1.582 GHz, 12 GB at 547.7 GB/s; 8 a machine on PCIe 3.0 x16 as the paper says. "
    "Assumed, the paper does not say: one 100 Gb/s card a machine (NCCL's 12 GB/s), 16 cores that decode with PIL",
)
"""The paper's GPU. Its fraction of the peak is calibrated (`paper/times.py`)."""


def dgx(
    device: str, tflops: float, memory: tuple[float, float], nvlink: float, network: float, cores: int, source: str
) -> Machine:
    """A machine of 8 devices; `memory` is its size and its bandwidth, in GB and GB/s."""
    return Machine(
        device=device,
        arithmetic=tflops * TERA,
        memory_bandwidth=memory[1] * GIGA,
        memory=memory[0] * GIGA,
        value_bytes=2,
        speed=PLAIN,
        fabric=nccl_fabric(8, "nvlink", nvlink * GIGA, 8 * network * GIGA),
        images_per_second=cores * OUR_IMAGES_PER_CORE,
        source=f"{source}, {cores} cores",
    )


_A100 = "A100 data sheet; DGX A100: 8 x HDR 200 Gb/s"
_H100 = "H100 data sheet; DGX H100: 8 x NDR 400 Gb/s"
_H200 = "H200 data sheet; DGX H200: 8 x NDR 400 Gb/s"
_B200 = "Blackwell data sheet; DGX B200: 8 x NDR 400 Gb/s"
MACHINES = {
    "a100": dgx("A100 80GB", 312.0, (80.0, 2039.0), 12 * 20.0, 25.0, 128, _A100),
    "h100": dgx("H100 SXM", 989.5, (80.0, 3350.0), 18 * 20.6, 50.0, 112, _H100),
    "h200": dgx("H200 SXM", 989.5, (141.0, 4800.0), 18 * 20.6, 50.0, 112, _H200),
    "b200": dgx("B200", 2250.0, (192.0, 8000.0), 18 * 40.1, 50.0, 112, _B200),
}
"""Current devices in bfloat16, by the name of the option --device."""


def machine_of(name: str) -> Machine:
    """The machine of a device's short name. Raises InputError for an unknown one."""
    if name not in MACHINES:
        raise InputError(f"no device '{name}'{nearest(name, MACHINES)}; there are {', '.join(MACHINES)}")
    return MACHINES[name]


def published_cost(
    machine: Machine,
    variant: Variant,
    devices: int,
    *,
    is_sparse_rpn: bool = True,
    recompute: Recompute = "none",
) -> StepCost:
    """The step of the paper's detector on one of so many devices.

    Convolutions and matrix products run at a fraction of the peak, norm layers at the bandwidth of the memory. The
    bytes are those without recompute.

    Args:
        machine: the machine and its devices.
        variant: the variant of the detector.
        devices: those of a machine share its decoded images.
        is_sparse_rpn: whether the RPN's backward covers the sampled anchors only; its cost then counts as 0.
        recompute: what the backward computes again.
    """
    counts = detector_counts(variant)
    tiles, rate = mean_pixels() / TILE**2, machine.arithmetic * machine.speed.fraction
    flops = tiles * (counts.backbone + counts.pyramid + counts.rpn) + counts.box_head
    backward_flops = tiles * (counts.backward + (0 if is_sparse_rpn else 2 * counts.rpn)) + 2 * counts.box_head
    if recompute == "backbone":
        backward_flops += tiles * counts.backbone
    has_statistics = bool(counts.exchange.norm_channels)
    passes, backward_passes = (_FORWARD_PASSES, _BACKWARD_PASSES) if has_statistics else (_FROZEN_PASSES,) * 2
    # a recomputed norm layer has its statistics: one read and one write
    again = 0 if recompute == "none" else _FROZEN_PASSES * counts.normed
    to_seconds = tiles * machine.value_bytes / machine.memory_bandwidth
    forward = flops / rate + passes * counts.normed * to_seconds
    backward = backward_flops / rate + (backward_passes * counts.normed_backward + again) * to_seconds
    return StepCost(
        update_seconds=0.0,
        micro_batch_seconds=machine.speed.overhead,
        image_seconds=forward + backward,
        fixed_bytes=float(_STATE_NUMBERS * counts.exchange.gradient_bytes),
        image_bytes=counts.kept * machine.value_bytes * largest_pixels() / TILE**2,
        backward_seconds=backward,
        load_seconds=min(devices, machine.fabric.per_machine) / machine.images_per_second,
    )
