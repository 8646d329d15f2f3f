"""Parts of images that are cut out before resizing, at several scales (as in SSD, Liu et al., 2016, and DETR).

Differs from both: the size of a part follows from a factor and the image's size, never from boxes or pixels, and the
part has the image's own shape. So it is resized to the size of the whole image: canvas, padding and batch stay as they
were.
"""

import math

from megdet.data.draws import unit_interval
from megdet.data.planned import Window
from megdet.recipe import Data

_HAS_WINDOW, _SCALE, _TOP, _LEFT = range(20, 24)
"""Purposes of random numbers, numbered among those of the plan."""


def window_of(seed: int, size: tuple[int, int], data: Data) -> Window | None:
    """The part of an image of this seed, height and width that is used; None for the whole image."""
    if unit_interval(seed, _HAS_WINDOW) >= data.crop_probability:
        return None
    low, high = data.crop_scales
    factor = low + (high - low) * unit_interval(seed, _SCALE)
    height, width = (max(1, round(length * factor)) for length in size)
    top, left = (
        math.floor(unit_interval(seed, purpose) * (length - own + 1))
        for purpose, length, own in zip((_TOP, _LEFT), size, (height, width), strict=True)
    )
    return Window((top, left), (height, width), data.crop_least_area) if (height, width) != size else None
