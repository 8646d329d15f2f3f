"""The time of collectives: a latency for each hop and a time for each byte, over rings and trees of a fabric.

Hops within a machine and hops between machines have different latencies. For GPUs the constants are those by which NCCL
chooses between its algorithms (`src/graph/tuning.cc` of NCCL 2.10, `src/graph/topo.h` of NCCL 2.28): two protocols, LL
for small messages and Simple for large ones, the longer hops of LL within each of several machines, and the largest
bandwidth of trees.

Left out of NCCL 2.10's model: the protocol LL128, which lies between the two; the correction of trees for medium sizes
(0.4 to 1 of the bandwidth); rings of Simple across machines, whose latency counts 1.9 times from 64 kB for each 16
devices on; the 235 GB/s that an A100 reaches (we: 240); the full bandwidth within machines that it assumes for two of
them. Also everything newer: NVLink SHARP, limits of trees by channel, larger latencies of a call.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple


class Protocol(NamedTuple):
    """The costs of one algorithm: of a call, a hop and a byte."""

    call: float
    """seconds of a call, whatever its size (NCCL's `baseLat`)"""
    inside: float
    """seconds of a hop within a machine (`hwLat`)"""
    between: float
    """seconds of a hop between machines"""
    part: float
    """part of the bus bandwidth that it reaches"""
    crowded: float = 1.0
    """factor of a hop within a machine if there are several machines"""


@dataclass(frozen=True)
class Fabric:
    """The connection of the devices."""

    per_machine: int
    """devices of a machine"""
    link_bandwidth: float
    """bytes a second in one direction, of a ring within a machine"""
    network_bandwidth: float
    """bytes a second in one direction, of all network cards of a machine together"""
    rings: tuple[Protocol, ...]
    gathers: tuple[Protocol, ...]
    """rings of an all-gather within one machine; across machines they are `rings`"""
    trees: tuple[Protocol, ...] = ()

    def machines(self, devices: int) -> int:
        """Machines that so many devices take."""
        return -(-devices // self.per_machine)

    def hop_seconds(self, devices: int, protocol: Protocol) -> float:
        """Seconds of a hop within a machine, where so many devices take part."""
        return protocol.inside * (1.0 if self.machines(devices) == 1 else protocol.crowded)

    def bandwidth(self, devices: int) -> float:
        """Bytes a second through the slowest link of a ring over so many devices."""
        inside = self.link_bandwidth
        return inside if self.machines(devices) == 1 else min(inside, self.network_bandwidth)


def flat_fabric(latency: float, bandwidth: float) -> Fabric:
    """Every device on a network of its own: a hop of n bytes of a ring takes latency + n / bandwidth seconds."""
    plain = (Protocol(0.0, latency, latency, 1.0),)
    return Fabric(1, bandwidth, bandwidth, plain, plain)


_TREE_PART = 0.9
_TREE_LIMITS = (110e9, 80e9)
"""The largest bandwidth of trees of Simple in bytes a second, on up to two machines and on more (`maxTreeBw`)."""
_HOPS = {"nvlink": (0.47, 3.4, 0.52, 28.0), "pcie": (1.0, 5.7, 1.0, 28.0)}
"""Microseconds of a hop within a machine: for LL and Simple of a ring, then for LL and Simple of a tree."""


def nccl_fabric(
    per_machine: int, link: Literal["nvlink", "pcie"], link_bandwidth: float, network_bandwidth: float
) -> Fabric:
    """Machines of GPUs connected by NCCL; each algorithm has the protocols LL and Simple."""
    ring_ll, ring_simple, tree_ll, tree_simple = (1e-6 * hop for hop in _HOPS[link])
    low = Protocol(3.6e-6, ring_ll, 2.7e-6, 1 / 4, 1.8)
    simple = Protocol(8.4e-6, ring_simple, 9.6e-6, 1.0)
    trees = (
        Protocol(4.4e-6, tree_ll, 5e-6, _TREE_PART / 3.8, 1.8),
        Protocol(0.0, tree_simple, 50e-6, _TREE_PART),
    )
    gathers = (low._replace(part=1 / 3), simple)
    return Fabric(per_machine, link_bandwidth, network_bandwidth, (low, simple), gathers, trees)


class Message(NamedTuple):
    """A collective of a step."""

    kind: Literal["all-reduce", "all-gather"]
    num_bytes: float
    """bytes of each device"""
    devices: int
    """the number that take part"""
    times: int = 1
    """how often in a step"""

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, around a ring."""
        around = (self.devices - 1) * self.num_bytes
        return self.times * (2 * around / self.devices if self.kind == "all-reduce" else around)

    def seconds(self, fabric: Fabric) -> float:
        """Seconds of a step, one after another."""
        of = all_reduce_seconds if self.kind == "all-reduce" else all_gather_seconds
        return self.times * of(self.num_bytes, self.devices, fabric)


def ring_seconds(num_bytes: float, devices: int, fabric: Fabric, protocol: Protocol) -> float:
    """All-reduce over a ring: 2 (n - 1) hops, and 2 (n - 1) / n of the bytes over every link.

    With one machine and without the time of a call: 2 (n - 1) alpha + 2 (n - 1) / n * bytes / bandwidth. Of the hops,
    2 (m - 1) go between the m machines.
    """
    return 2 * _around(num_bytes / devices, devices, fabric, protocol) + protocol.call


def gather_seconds(num_bytes: float, devices: int, fabric: Fabric, protocol: Protocol) -> float:
    """All-gather over a ring of so many bytes from each device: n - 1 hops, m - 1 of them between the m machines."""
    return _around(num_bytes, devices, fabric, protocol) + protocol.call


def tree_seconds(num_bytes: float, devices: int, fabric: Fabric, protocol: Protocol) -> float:
    """All-reduce over a double tree as NCCL's: up and down a chain in each machine and log2(m) levels of machines.

    Devices of a machine and levels are rounded down as in NCCL; the bandwidth is limited before LL takes its part.
    """
    machines = fabric.machines(devices)
    within = (devices // machines - 1) * fabric.hop_seconds(devices, protocol)
    levels = machines.bit_length() - 1
    latency = 2 * (within + levels * protocol.between)
    bandwidth = min(fabric.bandwidth(devices), _TREE_LIMITS[machines > 2] / _TREE_PART)
    return protocol.call + latency + 2 * num_bytes / (bandwidth * protocol.part)


@lru_cache(maxsize=4096)
def all_reduce_seconds(num_bytes: float, devices: int, fabric: Fabric) -> float:
    """The faster of rings and trees, each with its better protocol; 0 for one device."""
    if devices == 1:
        return 0.0
    rings = (ring_seconds(num_bytes, devices, fabric, protocol) for protocol in fabric.rings)
    trees = (tree_seconds(num_bytes, devices, fabric, protocol) for protocol in fabric.trees)
    return min(itertools.chain(rings, trees))


@lru_cache(maxsize=4096)
def all_gather_seconds(num_bytes: float, devices: int, fabric: Fabric) -> float:
    """So many bytes of each device to all: a ring, with its better protocol."""
    if devices == 1:
        return 0.0
    protocols = fabric.gathers if fabric.machines(devices) == 1 else fabric.rings
    return min(gather_seconds(num_bytes, devices, fabric, protocol) for protocol in protocols)


def exposed_seconds(buckets: Sequence[float], backward: float) -> float:
    """How long the all-reduces of the buckets, given their seconds, go on after a backward of so many seconds.

    The buckets become ready at equal intervals, the last at the end of the backward, and are reduced one at a time
    while it runs. If the backward is 0, nothing is hidden.
    """
    end = 0.0
    for number, seconds in enumerate(buckets, start=1):
        end = max(end, backward * number / len(buckets)) + seconds
    return max(0.0, end - backward)


def _around(num_bytes: float, devices: int, fabric: Fabric, protocol: Protocol) -> float:
    """Seconds of n - 1 hops around a ring, each of so many bytes."""
    hops, outside = devices - 1, fabric.machines(devices) - 1
    latency = (hops - outside) * fabric.hop_seconds(devices, protocol) + outside * protocol.between
    return latency + hops * num_bytes / (fabric.bandwidth(devices) * protocol.part)
