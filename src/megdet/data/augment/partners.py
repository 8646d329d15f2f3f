"""Copy-paste in the plan: which image gets objects of which other one, and where (Ghiasi et al., CVPR 2021).

Everything is drawn by hash of the image's seed, so it belongs to the image and its epoch. Partners come from the order
of the epoch: an image that comes more often, for its weight or its classes, is also more often a partner. The picture
keeps the size that the plan gave it.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from megdet.data.draws import unit_interval
from megdet.data.planned import Paste, PlannedImage
from megdet.ops.integer_hash import hash_integers
from megdet.recipe import Data

_HAS_PARTNER, _PARTNER, _TOP, _LEFT, _OBJECT = range(14, 19)
"""Purposes of random numbers, numbered among those of the plan."""


def drawn_partner(seed: int, index: int, order: NDArray[np.int64], *purpose: int) -> tuple[int, int] | None:
    """The index and the seed of another image of an epoch, drawn for an image; None if there is no other one.

    Args:
        seed: of the image.
        index: of the image.
        order: (places,) the images of its epoch.
        purpose: what the other image is for.
    """
    first = math.floor(unit_interval(seed, *purpose) * len(order))
    others = (int(order[(first + step) % len(order)]) for step in range(len(order)))
    partner = next((other for other in others if other != index), None)
    return None if partner is None else (partner, hash_integers(seed, *purpose, partner))


def paste_of(
    image: PlannedImage, order: NDArray[np.int64], prepared: Callable[[int, int], PlannedImage], data: Data
) -> Paste | None:
    """What is pasted onto an image; None if nothing is.

    Args:
        image: without it.
        order: (places,) the images of its epoch.
        prepared: gives the image of an index and a seed as it would be alone.
        data: says how likely a partner is, and how much of an object must be seen.
    """
    if unit_interval(image.seed, _HAS_PARTNER) >= data.copy_paste:
        return None
    partner = drawn_partner(image.seed, image.index, order, _PARTNER)
    return None if partner is None else placed_on(image, prepared(*partner), data.paste_least_area)


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
