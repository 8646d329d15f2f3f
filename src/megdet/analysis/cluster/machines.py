"""Devices and the machines that carry them: published numbers, each with its source.

Arithmetic is dense (no sparsity) with sums in float32, at the boost clock, from NVIDIA's data sheets. NVLink and PCIe
count what NCCL reckons with (`src/graph/topo.h`): 20.0, 20.6 and 40.1 GB/s of a link of the A100, H100 and B200, of
which they have 12, 18 and 18; 12 GB/s of PCIe 3.0 x16. Networks: one card a GPU as in NVIDIA's DGX and HGX machines.
"""

from dataclasses import dataclass

from megdet.analysis.cluster.network import Fabric
from megdet.errors import InputError, nearest

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """A machine and its devices."""

    device: str
    arithmetic: float
    """published peak of a device in the precision of the training, FLOP/s"""
    memory_bandwidth: float
    """published, of a device, bytes a second"""
    memory: float
    """of a device as its data sheet has it, bytes"""
    value_bytes: int
    """bytes of an activation"""
    fraction: float
    """part of the peak that convolutions and matrix products reach"""
    overhead: float
    """seconds of a micro-batch whatever its images: kernels launched, small kernels, waits for the host"""
    fabric: Fabric
    images_per_second: float
    """that the processors of a machine decode and resize"""
    source: str


PIL_IMAGES_PER_CORE, OUR_IMAGES_PER_CORE = 130.0, 572.0
"""JPEG files of 640 x 480 to tensors of 800 x 1067 a second, measured on one core (docs/benchmarks.md, Input)."""
MIXED_FRACTION, OVERHEAD = 0.165, 0.047
"""Part of the peak in 16 bits, and seconds of a micro-batch whatever its images: a line through two published speeds of
Mask R-CNN R-50 FPN training in float16 on V100s (125 TFLOP/s), 10.77 images a second with 2 images a step and 13.82
with 16 (NVIDIA DeepLearningExamples, Mask R-CNN for PyTorch, March 2019). The two speeds are of two different cards, so
the line is a rough one. It rises by 69 ms an image, for which we count 1.43 TFLOP: 1.02 of the box detector with its
stem and first stage frozen, 0.41 of the mask head on 128 RoIs."""

TITAN_XP = Machine(
    device="TITAN Xp",
    arithmetic=12.15 * TERA,
    memory_bandwidth=547.7 * GIGA,
    memory=12 * GIGA,
    value_bytes=4,
    fraction=1.0,
    overhead=OVERHEAD,
    fabric=Fabric(per_machine=8, link="pcie", link_bandwidth=12.0 * GIGA, network_bandwidth=12.0 * GIGA),
    images_per_second=16 * PIL_IMAGES_PER_CORE,
    source="NVIDIA: 3,840 cores at 1.582 GHz, 12 GB at 547.7 GB/s; 8 a machine on PCIe 3.0 x16 as the paper says. "
    "Assumed, the paper does not say: one 100 Gb/s card a machine (NCCL's 12 GB/s), 16 cores that decode with PIL",
)
"""The paper's GPU. Its fraction of the peak is calibrated (`paper.py`)."""


def _dgx(
    device: str, tflops: float, memory: tuple[float, float], nvlink: float, network: float, cores: int, source: str
) -> Machine:
    """A machine of 8 devices; `memory` is its size and its bandwidth, in GB and GB/s."""
    return Machine(
        device=device,
        arithmetic=tflops * TERA,
        memory_bandwidth=memory[1] * GIGA,
        memory=memory[0] * GIGA,
        value_bytes=2,
        fraction=MIXED_FRACTION,
        overhead=OVERHEAD,
        fabric=Fabric(8, "nvlink", nvlink * GIGA, 8 * network * GIGA),
        images_per_second=cores * OUR_IMAGES_PER_CORE,
        source=source,
    )


MACHINES = {
    "a100": _dgx(
        "A100 80GB",
        312.0,
        (80.0, 2039.0),
        12 * 20.0,
        25.0,
        128,
        "A100 data sheet; DGX A100: 8 x HDR 200 Gb/s, 128 cores",
    ),
    "h100": _dgx(
        "H100 SXM",
        989.5,
        (80.0, 3350.0),
        18 * 20.6,
        50.0,
        112,
        "H100 data sheet; DGX H100: 8 x NDR 400 Gb/s, 112 cores",
    ),
    "h200": _dgx(
        "H200 SXM",
        989.5,
        (141.0, 4800.0),
        18 * 20.6,
        50.0,
        112,
        "H200 data sheet; DGX H200: 8 x NDR 400 Gb/s, 112 cores",
    ),
    "b200": _dgx(
        "B200",
        2250.0,
        (192.0, 8000.0),
        18 * 40.1,
        50.0,
        112,
        "Blackwell data sheet; DGX B200: 8 x NDR 400 Gb/s, 112 cores",
    ),
}
"""Devices of today in bfloat16, by the name of the option --device."""


def machine_of(name: str) -> Machine:
    """The machine of a device's short name. Raises InputError for an unknown one."""
    if name not in MACHINES:
        raise InputError(f"no device '{name}'{nearest(name, MACHINES)}; there are {', '.join(MACHINES)}")
    return MACHINES[name]
