"""Mosaic in the plan: a picture made of four images, each in a quarter of it (YOLOv4, Bochkovskiy et al., 2020).

The picture keeps the size that the plan gave it. A cross point is drawn by the image's seed; the image has one of the
quarters, three partners have the others. Each is resized to cover its quarter, at most to the size that it has alone,
and cut. Differs from YOLOv4: nothing is padded, and the picture is not resized again.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megdet.data.augment.partners import drawn_partner
from megdet.data.draws import unit_interval
from megdet.data.planned import Crop, PlannedImage, Tile
from megdet.ops.integer_hash import hash_integers
from megdet.recipe import Data

_HAS_MOSAIC, _CROSS_Y, _CROSS_X, _OWN, _PARTNER, _SCALE, _TOP, _LEFT = range(24, 32)
"""Purposes of random numbers, numbered among those of the plan."""
_NEAREST, _FARTHEST = 0.3, 0.7
"""Where the cross point may be, in parts of the picture's height and width."""


def tiles_of(
    image: PlannedImage, order: NDArray[np.int64], prepared: Callable[[int, int], PlannedImage], data: Data
) -> tuple[Tile, ...]:
    """The four images of a picture, row by row; none if it is the image alone.

    Args:
        image: as it would be alone.
        order: (places,) the images of its epoch.
        prepared: gives the image of an index and a seed as it would be alone.
        data: says how likely a mosaic is, and how much of a box must be left.
    """
    if unit_interval(image.seed, _HAS_MOSAIC) >= data.mosaic or min(image.size) < 2:
        return ()
    y, x = (
        min(
            length - 1, max(1, round(length * (_NEAREST + (_FARTHEST - _NEAREST) * unit_interval(image.seed, purpose))))
        )
        for purpose, length in zip((_CROSS_Y, _CROSS_X), image.size, strict=True)
    )
    (height, width), own = image.size, math.floor(4 * unit_interval(image.seed, _OWN))
    quarters = [(0, 0, y, x), (0, x, y, width - x), (y, 0, height - y, x), (y, x, height - y, width - x)]
    tiles = []
    for number, (top, left, rows, columns) in enumerate(quarters):
        partner = drawn_partner(image.seed, image.index, order, _PARTNER, number)
        alone = (
            image
            if number == own
            else prepared(*(partner or (image.index, hash_integers(image.seed, _PARTNER, number))))
        )
        tiles.append(tile_in((top, left), (rows, columns), alone, data.crop_least_area))
    return tuple(tiles)


def tile_in(corner: tuple[int, int], size: tuple[int, int], alone: PlannedImage, least_area: float) -> Tile:
    """An image in the quarter of this corner, height and width, at a scale and place drawn by its seed."""
    cover = max(length / own for length, own in zip(size, alone.resized, strict=True))
    scale = cover ** (1 - unit_interval(alone.seed, _SCALE)) if cover < 1 else cover
    height, width = (max(length, round(own * scale)) for length, own in zip(size, alone.resized, strict=True))
    top, left = (
        math.floor(unit_interval(alone.seed, purpose) * (whole - length + 1))
        for purpose, whole, length in zip((_TOP, _LEFT), (height, width), size, strict=True)
    )
    crop = Crop((height, width), (top, left), least_area)
    return Tile(replace(alone, size=size, crop=crop, paste=None, tiles=()), corner)


def refilled(tile: Tile, alone: PlannedImage) -> Tile:
    """The quarter with another image in it, given as it would be alone."""
    return tile_in(tile.corner, tile.image.size, alone, tile.image.crop.least_area if tile.image.crop else 0.0)
