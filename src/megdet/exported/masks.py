"""Masks of detections, from a grid over a box to the runs of an image: `ops.masks.paste_masks` without torch."""

# Written twice, because exported files run where there is no torch, and `ops.masks` pastes on the device where the
# masks are, many in one product. A test holds the two equal.

import math

import numpy as np
from jaxtyping import Bool, Float, Float32
from numpy.typing import NDArray

from megdet.data.rle import Rle, encode_mask
from megdet.exported.resizing import bilinear_places

THRESHOLD = 0.5
"""A pixel belongs to an object that is at least so probable."""


def pasted(
    grid: Float32[np.ndarray, "rows columns"], box: Float[np.ndarray, "4"], size: tuple[int, int], *, exact: bool
) -> Rle:
    """The pixels of an object in an image of this height and width; `exact` is that of `paste_masks`."""
    x, y, pixels = (_exactly if exact else _rounded)(grid, box, size)
    return encode_mask(pixels, x, y, size)


def _exactly(
    grid: NDArray[np.float32], box: NDArray[np.floating], size: tuple[int, int]
) -> tuple[int, int, Bool[np.ndarray, "height width"]]:
    """Interpolation of a grid in y and x is a product with a matrix on either side, of two numbers a pixel."""
    if not (np.isfinite(box).all() and (box[2:] > box[:2]).all()):
        return 0, 0, np.zeros((0, 0), np.bool_)
    low, high = box[:2].tolist(), box[2:].tolist()
    start = [min(max(math.ceil(edge - 0.5), 0), length) for edge, length in zip(low, size[::-1], strict=True)]
    end = [min(math.floor(edge - 0.5) + 1, length) for edge, length in zip(high, size[::-1], strict=True)]
    x, y = (
        _weights(low[axis], high[axis], start[axis], max(0, end[axis] - start[axis]), grid.shape[1 - axis])
        for axis in (0, 1)
    )
    return start[0], start[1], y @ grid @ x.T >= THRESHOLD


def _weights(start: float, end: float, first: int, count: int, cells: int) -> NDArray[np.float32]:
    """How much of each cell of a grid between two edges is in each pixel from the first one on; in one direction."""
    centres = first + np.arange(count) + 0.5
    place = ((centres - start) / (end - start) * cells - 0.5).astype(np.float32)  # 0 is the centre of the first cell
    distance = np.abs(place[:, None] - np.arange(cells, dtype=np.float32))
    weights: NDArray[np.float32] = np.maximum(1 - distance, 0)
    return weights


def _rounded(
    grid: NDArray[np.float32], box: NDArray[np.floating], size: tuple[int, int]
) -> tuple[int, int, Bool[np.ndarray, "height width"]]:
    """A grid with a border of zeros, resized to its box in whole pixels, as torchvision does it."""
    padded, cells = np.pad(grid, 1), grid.shape[1]
    centre, half = (box[2:] + box[:2]) * 0.5, (box[2:] - box[:2]) * 0.5 * ((cells + 2) / cells)
    if not np.isfinite(box).all() or (half < 0).any():
        return 0, 0, np.zeros((0, 0), np.bool_)
    x1, y1, x2, y2 = np.concatenate([centre - half, centre + half]).astype(np.int64).tolist()
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2 + 1, size[1]), min(y2 + 1, size[0])
    if left >= right or top >= bottom:
        return 0, 0, np.zeros((0, 0), np.bool_)
    whole = padded
    for axis, length in enumerate((y2 - y1 + 1, x2 - x1 + 1)):
        low, high, part = bilinear_places(length, padded.shape[axis])
        weight = part.astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
        whole = whole.take(low, axis) * (1 - weight) + whole.take(high, axis) * weight
    return left, top, whole[top - y1 : bottom - y1, left - x1 : right - x1] >= THRESHOLD
