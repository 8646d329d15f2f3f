"""Images resized as in training, by Pillow and NumPy."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray
from PIL import Image

from megdet.recipe import ResizeKind


def resize(pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "_ _ 3"]:
    """Bilinear with antialias, on 8-bit numbers: Pillow's own, which `data.transforms.resize` follows to one level."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))


def resize_as_torchvision(
    pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
) -> Float32[np.ndarray, "_ _ 3"]:
    """Bilinear without antialias, on floats from 0 to 255: `data.transforms.resize_as_torchvision`, to rounding."""
    values = pixels.astype(np.float32)
    for axis, length in enumerate(size):
        low, high, part = bilinear_places(length, pixels.shape[axis])
        weight = part.astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        values = values.take(low, axis) * (1 - weight) + values.take(high, axis) * weight
    return values


def bilinear_places(length: int, source: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """For each place of an edge of the new length, the two of the old one that it lies between, and the part of the
    second; pixels are at their centres, and beyond the outer ones nothing changes."""
    places = np.maximum((np.arange(length) + 0.5) * (source / length) - 0.5, 0)
    low = np.minimum(places.astype(np.int64), source - 1)
    return low, np.minimum(low + 1, source - 1), places - low


RESIZE: dict[ResizeKind, Callable[[NDArray[np.uint8], tuple[int, int]], NDArray[np.uint8 | np.float32]]] = {
    "antialias": resize,
    "torchvision": resize_as_torchvision,
}
"""By `data.resize`."""
