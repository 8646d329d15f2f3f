"""The alpha-beta model of collectives after NCCL's: a latency a hop and a time a byte, for rings and trees.

Hops within a machine and hops between machines have their own latency. The constants are those from which NCCL chooses
between its algorithms (`src/graph/tuning.cc` of NCCL 2.10, `src/graph/topo.h` of NCCL 2.28): two protocols, LL for
small messages and Simple for large ones, the longer hops of LL within each of several machines, and the most that trees
reach.

Left out of NCCL 2.10's model: the protocol LL128, which lies between the two; the correction of trees for medium sizes
(0.4 to 1 of the bandwidth); rings of Simple across machines, whose latency counts 1.9 times from 64 kB for each 16
devices on; the 235 GB/s that an A100 reaches (we: 240); the full bandwidth within machines that it reckons with for two
of them. Also everything newer: NVLink SHARP, trees' limits by channel, the larger latencies of a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

MICROSECOND = 1e-6


class Protocol(NamedTuple):
    """How NCCL moves the bytes of one algorithm: what a call, a hop and a byte cost."""

    call: float
    """seconds of a call, whatever its size (`baseLat`)"""
    hop: dict[str, float]
    """seconds of a hop over `nvlink`, `pcie` or the network, `net` (`hwLat`)"""
    part: float
    """part of the bus bandwidth that it reaches"""
    crowded: float = 1.0
    """factor of a hop within a machine as soon as there are several machines"""


def _protocol(call: float, nvlink: float, pcie: float, net: float, part: float, crowded: float = 1.0) -> Protocol:
    hop = {"nvlink": nvlink * MICROSECOND, "pcie": pcie * MICROSECOND, "net": net * MICROSECOND}
    return Protocol(call * MICROSECOND, hop, part, crowded)


RING = (_protocol(3.6, 0.47, 1.0, 2.7, 1 / 4, 1.8), _protocol(8.4, 3.4, 5.7, 9.6, 1.0))
"""LL and Simple."""
GATHER = (RING[0]._replace(part=1 / 3), RING[1])
"""The same of an all-gather within one machine; across machines it is RING."""
_TREE_PART = 0.9
TREE = (_protocol(4.4, 0.52, 1.0, 5.0, _TREE_PART / 3.8, 1.8), _protocol(0.0, 28.0, 28.0, 50.0, _TREE_PART))
"""LL and Simple."""
TREE_LIMITS = (110e9, 80e9)
"""Bytes a second that trees of Simple do not pass, on up to two machines and on more (`maxTreeBw`)."""


@dataclass(frozen=True)
class Fabric:
    """What connects the devices."""

    per_machine: int
    """devices of a machine"""
    link: Literal["nvlink", "pcie"]
    """within a machine"""
    link_bandwidth: float
    """bytes a second in one direction, of a ring within a machine"""
    network_bandwidth: float
    """bytes a second in one direction, of all network cards of a machine together"""

    def machines(self, devices: int) -> int:
        """Machines that so many devices take."""
        return -(-devices // self.per_machine)

    def hop_seconds(self, devices: int, protocol: Protocol) -> float:
        """Seconds of a hop within a machine, where so many devices take part."""
        return protocol.hop[self.link] * (1.0 if self.machines(devices) == 1 else protocol.crowded)

    def bandwidth(self, devices: int) -> float:
        """Bytes a second that pass the narrowest place of a ring over so many devices."""
        inside = self.link_bandwidth
        return inside if self.machines(devices) == 1 else min(inside, self.network_bandwidth)


def ring_seconds(num_bytes: float, devices: int, fabric: Fabric, protocol: Protocol = RING[1]) -> float:
    """All-reduce over a ring: 2 (n - 1) hops, and 2 (n - 1) / n of the bytes over every link.

    With one machine and without the time of a call: 2 (n - 1) alpha + 2 (n - 1) / n * bytes / bandwidth. Of the hops,
    2 (m - 1) go between the m machines.
    """
    return 2 * _around(num_bytes / devices, devices, fabric, protocol) + _call(devices, protocol)


def gather_seconds(num_bytes: float, devices: int, fabric: Fabric, protocol: Protocol = GATHER[1]) -> float:
    """All-gather over a ring of so many bytes from each device: n - 1 hops, m - 1 of them between the m machines."""
    return _around(num_bytes, devices, fabric, protocol) + _call(devices, protocol)


def tree_seconds(num_bytes: float, devices: int, fabric: Fabric, protocol: Protocol = TREE[1]) -> float:
    """All-reduce over a double tree as NCCL's: up and down a chain in each machine and log2(m) levels of machines.

    Devices of a machine and levels are rounded down as NCCL does. The bandwidth is at most TREE_LIMITS, before what LL
    loses of it.
    """
    if devices == 1:
        return 0.0
    machines = fabric.machines(devices)
    within = (devices // machines - 1) * fabric.hop_seconds(devices, protocol)
    levels = machines.bit_length() - 1
    latency = 2 * (within + levels * protocol.hop["net"])
    bandwidth = min(fabric.bandwidth(devices), TREE_LIMITS[machines > 2] / _TREE_PART)
    return protocol.call + latency + 2 * num_bytes / (bandwidth * protocol.part)


@lru_cache(maxsize=4096)
def all_reduce_seconds(num_bytes: float, devices: int, fabric: Fabric) -> float:
    """The faster of rings and trees, each with its better protocol, after NCCL's model."""
    rings = (ring_seconds(num_bytes, devices, fabric, protocol) for protocol in RING)
    trees = (tree_seconds(num_bytes, devices, fabric, protocol) for protocol in TREE)
    return min(*rings, *trees)


@lru_cache(maxsize=4096)
def all_gather_seconds(num_bytes: float, devices: int, fabric: Fabric) -> float:
    """So many bytes of each device to all: a ring, with its better protocol, after NCCL's model."""
    protocols = GATHER if fabric.machines(devices) == 1 else RING
    return min(gather_seconds(num_bytes, devices, fabric, protocol) for protocol in protocols)


def exposed_seconds(buckets: Sequence[float], backward: float) -> float:
    """How long a backward of so many seconds is outlasted by its buckets' all-reduces, given their seconds.

    The buckets become ready one after another at equal distances, the last one at the end of the backward, and are
    reduced one at a time while it goes on.
    """
    end = 0.0
    for number, seconds in enumerate(buckets, start=1):
        end = max(end, backward * number / len(buckets)) + seconds
    return max(0.0, end - backward)


def _around(num_bytes: float, devices: int, fabric: Fabric, protocol: Protocol) -> float:
    """Seconds of n - 1 hops around a ring, each of so many bytes."""
    hops, outside = devices - 1, fabric.machines(devices) - 1
    latency = (hops - outside) * fabric.hop_seconds(devices, protocol) + outside * protocol.hop["net"]
    return latency + hops * num_bytes / (fabric.bandwidth(devices) * protocol.part)


def _call(devices: int, protocol: Protocol) -> float:
    return 0.0 if devices == 1 else protocol.call
