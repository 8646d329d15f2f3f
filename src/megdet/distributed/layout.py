"""How a mini-batch is spread over devices: groups, lanes, rounds and shares. Pure arithmetic.

A mini-batch is G groups of S images. W ranks make W / k lanes of k neighbouring ranks. A lane works through its groups
one after another (rounds), and each rank of the lane carries a share of every group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megdet.errors import InputError
from megdet.recipe import Recipe


@dataclass(frozen=True)
class Layout:
    """The spread of `num_groups` groups of `group_size` images over `world_size` ranks in lanes of `lane_width`."""

    num_groups: int
    group_size: int
    world_size: int
    lane_width: int

    @property
    def batch_size(self) -> int:
        """Images a step."""
        return self.num_groups * self.group_size

    @property
    def num_lanes(self) -> int:
        """Number of lanes that work side by side."""
        return self.world_size // self.lane_width

    @property
    def rounds(self) -> int:
        """Groups that the busiest lane works through in a step: the accumulation."""
        return -(-self.num_groups // self.num_lanes)

    @property
    def largest_share(self) -> int:
        """Images of the largest micro-batch."""
        return -(-self.group_size // self.lane_width)

    @property
    def busiest_images(self) -> int:
        """Images a step of the busiest rank, which sets the time of a step."""
        return self.rounds * self.largest_share

    @property
    def idle(self) -> float:
        """The part of the devices' time, 0 to 1, that uneven shares and rounds leave unused."""
        return 1 - self.batch_size / (self.world_size * self.busiest_images)

    def lane_of(self, rank: int) -> int:
        """The lane of a rank."""
        return rank // self.lane_width

    def groups_of(self, rank: int) -> range:
        """The numbers of the groups in a step that a rank's lane works through, in order."""
        return range(self.lane_of(rank), self.num_groups, self.num_lanes)

    def share_of(self, rank: int) -> slice:
        """Which of a group's images a rank carries; only the first rank of a lane always has some."""
        place, size, width = rank % self.lane_width, self.group_size, self.lane_width
        return slice(-(-place * size // width), -(-(place + 1) * size // width))


def smaller_shares(
    layout: Layout, lane_width: int | None = None, max_images_per_device: int | None = None
) -> Iterator[Layout]:
    """The other layouts of the same groups and ranks whose largest share has fewer images, the best first.

    Raises InputError as `possible_layouts` does.
    """
    groups, size, ranks = layout.num_groups, layout.group_size, layout.world_size
    for other in possible_layouts(groups, size, ranks, lane_width, max_images_per_device):
        if other.largest_share < layout.largest_share:
            yield other


def possible_layouts(
    num_groups: int,
    group_size: int,
    world_size: int,
    lane_width: int | None = None,
    max_images_per_device: int | None = None,
) -> Iterator[Layout]:
    """Layouts of every lane width, the fewest images on the busiest rank first, narrow lanes first among equals.

    `lane_width` forces the width; `max_images_per_device` is the most images that a share may have.
    Raises InputError if there are more ranks than images, or if no lane width fits the forced values.
    """
    batch_size = num_groups * group_size
    if world_size < 1:
        raise InputError(f"{devices_text(world_size)}: it takes at least one")
    if world_size > batch_size:
        raise InputError(
            f"{devices_text(world_size)} for a mini-batch of {batch_size} images: "
            f"use at most {devices_text(batch_size)} or a larger batch_size"
        )
    widths = [k for k in range(1, world_size + 1) if world_size % k == 0]
    if lane_width is not None:
        if lane_width not in widths:
            known = ", ".join(map(str, widths))
            raise InputError(
                f"lane width {lane_width} does not divide {devices_text(world_size)}: choose one of {known}"
            )
        widths = [lane_width]
    layouts = [Layout(num_groups, group_size, world_size, k) for k in widths]
    if max_images_per_device is not None:
        if max_images_per_device < 1:
            raise InputError(f"at most {max_images_per_device} images a device: that must be at least 1")
        fitting = [layout for layout in layouts if layout.largest_share <= max_images_per_device]
        if not fitting:
            needed = -(-group_size // max_images_per_device)
            raise InputError(
                f"a group of {group_size} images over {devices_text(max(widths))} gives {layouts[-1].largest_share} "
                f"images a device, more than {max_images_per_device}: it takes at least {needed} devices in one lane, "
                "or a smaller bn_size"
            )
        layouts = fitting
    return iter(sorted(layouts, key=lambda layout: (layout.busiest_images, layout.lane_width)))


def choose_layout(
    num_groups: int,
    group_size: int,
    world_size: int,
    lane_width: int | None = None,
    max_images_per_device: int | None = None,
) -> Layout:
    """The layout whose busiest rank carries the fewest images a step; the narrowest lanes among equals.

    The arguments and errors are those of `possible_layouts`.
    """
    return next(possible_layouts(num_groups, group_size, world_size, lane_width, max_images_per_device))


def recipe_layout(
    recipe: Recipe, world_size: int, lane_width: int | None = None, max_images_per_device: int | None = None
) -> Layout:
    """`choose_layout` for the groups of a recipe."""
    return choose_layout(recipe.groups_per_step, recipe.images_per_group, world_size, lane_width, max_images_per_device)


def better_device_counts(
    layout: Layout, count: int = 3, lane_width: int | None = None, max_images_per_device: int | None = None
) -> Iterator[Layout]:
    """Layouts on other numbers of devices with less idle time, the nearest first, with the same limits forced."""
    if layout.idle <= 0:
        return
    found = 0
    for distance in range(1, layout.batch_size):
        for world_size in (layout.world_size - distance, layout.world_size + distance):
            if not 1 <= world_size <= layout.batch_size or found == count:
                continue
            try:
                other = choose_layout(
                    layout.num_groups, layout.group_size, world_size, lane_width, max_images_per_device
                )
            except InputError:  # a forced value does not fit so many devices
                continue
            if other.idle < layout.idle:
                found += 1
                yield other


def devices_text(count: int) -> str:
    """`1 device`, `2 devices`."""
    return f"{count} device{'' if count == 1 else 's'}"
