"""Copy-paste in the plan: which image gets objects of which other one, and where (Ghiasi et al., CVPR 2021).

Everything is drawn by hash of the image's seed, so it belongs to the image and its epoch. Partners come from the order
of the epoch: an image that comes more often, for its weight or its classes, is also more often a partner. The picture
keeps the size that the plan gave it.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megdet.data.draws import unit_interval
from megdet.data.planned import Paste, PlannedImage
from megdet.ops.integer_hash import hash_integers
from megdet.recipe import Data

_HAS_PARTNER, _PARTNER, _SEED, _TOP, _LEFT, _OBJECT = range(14, 20)
"""Purposes of random numbers, numbered among those of the plan."""


def partner_of(seed: int, index: int, order: NDArray[np.int64], data: Data) -> tuple[int, int] | None:
    """The index and the seed of the image that gives objects to an image; None if it gets none.

    Args:
        seed: of the image.
        index: of the image.
        order: (places,) the images of its epoch.
        data: says how likely a partner is.
    """
    if unit_interval(seed, _HAS_PARTNER) >= data.copy_paste:
        return None
    first = math.floor(unit_interval(seed, _PARTNER) * len(order))
    others = (int(order[(first + step) % len(order)]) for step in range(len(order)))
    partner = next((other for other in others if other != index), None)
    return None if partner is None else (partner, hash_integers(seed, _SEED, partner))


def placed_on(image: PlannedImage, source: PlannedImage, least_area: float) -> Paste:
    """The source at a place on the image drawn by the source's seed: one lies in the other, on either axis."""
    top, left = (
        min(0, length - own) + math.floor(unit_interval(source.seed, purpose) * (abs(length - own) + 1))
        for purpose, length, own in zip((_TOP, _LEFT), image.size, source.size, strict=True)
    )
    return Paste(source, (top, left), least_area)


def drawn_objects(seed: int, places: Sequence[int]) -> list[int]:
    """Which of the objects at these places among an image's annotations are pasted: each with one half, at least one.

    `seed` is that of the source.
    """
    draws = {place: unit_interval(seed, _OBJECT, place) for place in places}
    least = min(draws.values(), default=0.0)
    return [place for place, draw in draws.items() if draw < 0.5 or draw == least]
