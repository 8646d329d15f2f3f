"""Lanes: the neighbouring ranks that carry one group of images together."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed

from megdet.distributed.layout import Layout
from megdet.distributed.world import World
from megdet.errors import InputError

_groups: dict[int, tuple[distributed.ProcessGroup | None, distributed.ProcessGroup]] = {}
"""Lane width -> the process group of all ranks at the time it was made, and this process's group of the lane."""


@dataclass(frozen=True)
class Lane:
    """The `width` neighbouring ranks that carry one group together, this process among them.

    It holds the width only; the process group is looked up when it is used. So a model with a lane can be copied,
    pickled and loaded by another process.
    """

    width: int

    @property
    def place(self) -> int:
        """The index of this rank in its lane, from 0."""
        return 0 if self.width == 1 else _rank_and_size(self.width)[0] % self.width

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of its lane: it alone contributes numbers that the whole lane has."""
        return self.place == 0

    @property
    def process_group(self) -> distributed.ProcessGroup | None:
        """The process group of the lane. For a model loaded from a file, all ranks make it at the first use."""
        _, size = _rank_and_size(self.width)
        everybody, group = _groups.get(self.width, (None, None))
        if group is not None and everybody is distributed.group.WORLD:
            return group
        return distributed.group.WORLD if self.width == size else _make_groups(self.width)


SINGLE_LANE = Lane(1)


def make_lane(world: World, layout: Layout) -> Lane:
    """This rank's lane, with a process group of its own if it has more than one rank.

    Every rank makes the groups of all lanes, as torch.distributed requires; call it once a run.
    """
    if layout.lane_width > 1:
        _make_groups(layout.lane_width, world.timeout)
    return Lane(layout.lane_width)


def lane_of_images(bn_size: int, images_per_device: int) -> Lane:
    """The lane of this process in a program of your own, in which each process carries `images_per_device` at a time.

    Every process must call it, after `init_process_group` if there are several. Raises InputError if the processes do
    not make whole groups.
    """
    size = distributed.get_world_size() if distributed.is_initialized() else 1
    if images_per_device < 1 or bn_size < 1 or bn_size % images_per_device:
        raise InputError(
            f"bn_size {bn_size} is not a multiple of images_per_device {images_per_device}: a group is made of "
            "whole forwards; choose a bn_size that is, or smaller forwards and accumulation"
        )
    width = bn_size // images_per_device
    if size % width:
        raise InputError(
            f"bn_size {bn_size} takes {width} processes of {images_per_device} images, which does not divide the "
            f"{size} processes here: choose another bn_size, or start more processes"
        )
    if width > 1:
        _make_groups(width)
    return Lane(width)


def lane_of_all() -> Lane:
    """The lane of all processes."""
    return Lane(distributed.get_world_size()) if distributed.is_initialized() else SINGLE_LANE


def _make_groups(width: int, timeout: timedelta | None = None) -> distributed.ProcessGroup:
    """Make the groups of all lanes, and keep this rank's."""
    rank, size = _rank_and_size(width)
    lanes = [range(start, start + width) for start in range(0, size, width)]
    made: list[Any] = [distributed.new_group(list(lane), timeout=timeout) for lane in lanes]
    group: distributed.ProcessGroup = made[rank // width]
    _groups[width] = distributed.group.WORLD, group
    return group


def _rank_and_size(width: int) -> tuple[int, int]:
    size = distributed.get_world_size() if distributed.is_initialized() else 1
    if size % width:
        raise InputError(
            f"a batch norm over {width} processes cannot train in a program of {size}: start a multiple of {width} by "
            "torchrun and call init_process_group, or convert the model again"
        )
    return distributed.get_rank(), size
