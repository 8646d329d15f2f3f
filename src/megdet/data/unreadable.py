"""Training images whose files are lost or damaged, and which image takes their place.

The rule depends only on the image and its group, so it is the same on every layout: the next image in the epoch's
permutation, as large as the recipe and the group's canvas allow, with randomness of its own. If a partner of an image
is lost, of which it gets objects or a part, the next image is its partner.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megdet.data.augment.mosaic import refilled
from megdet.data.augment.partners import placed_on
from megdet.data.draws import unit_interval
from megdet.data.plan import TrainingPlan, resized, training_size
from megdet.data.planned import PlannedImage
from megdet.errors import InputError
from megdet.ops.integer_hash import hash_integers

MOST_IN_A_ROW = 8
"""Unreadable images in a row after which the folder counts as lost, not a file."""

_STAND_IN, _HORIZONTAL, _VERTICAL = 8, 1, 2
"""Purposes of random numbers; `_STAND_IN` is numbered among those of the plan."""


class UnreadableImageError(InputError):
    """The file of an image of the data set cannot be read."""

    def __init__(self, message: str, index: int = -1, reason: str = "") -> None:
        super().__init__(message)
        self.index, self.reason = index, reason


class Replaced(NamedTuple):
    """An image that could not be read, and the one that took its place."""

    step: int
    """step of the plan: 0, 1, ..."""
    image: int
    """index of the unreadable image in the data set"""
    by: int
    """index of the image that took its place"""
    reason: str
    """why it could not be read"""


def most_replaced(part: float, num_images: int) -> int:
    """How many images may be lost: this part of them, at least one."""
    return max(1, math.floor(part * num_images))


def without(
    image: PlannedImage, index: int, other: Callable[[PlannedImage], PlannedImage]
) -> tuple[PlannedImage, PlannedImage]:
    """The image without the unreadable one of this index, which is itself or a partner, and what takes the place.

    `other` gives what takes the place of an image.
    """
    taken = other(next(own for own in image.sources if own.index == index))
    if image.index == index:
        return taken, taken
    tiles = tuple(refilled(tile, other(tile.image)) if tile.image.index == index else tile for tile in image.tiles)
    paste = image.paste
    if paste is not None and paste.source.index == index:
        paste = placed_on(image, other(paste.source), paste.least_area)
    return replace(image, tiles=tiles, paste=paste), taken


def stand_in(plan: TrainingPlan, image: PlannedImage, canvas: tuple[int, int]) -> PlannedImage:
    """The image that takes the place of `image` in a group with this canvas; it is not cropped."""
    data, order = plan.recipe.data, plan.permutation(image.epoch)
    place = int(np.flatnonzero(order == image.index)[0])
    index = int(order[(place + 1) % len(order)])
    height, width = plan.sizes[index].tolist()
    largest = training_size(height, width, max(data.short_edges), data.scale_jitter[1], data)
    scale = min(min(largest) / min(height, width), canvas[0] / height, canvas[1] / width)
    seed = hash_integers(plan.recipe.seed, _STAND_IN, image.seed, index)
    return PlannedImage(
        index,
        image.epoch,
        seed,
        resized(height, width, scale * min(height, width), math.inf, data.resize),
        unit_interval(seed, _HORIZONTAL) < data.horizontal_flip,
        unit_interval(seed, _VERTICAL) < data.vertical_flip,
        data.resize,
    )
