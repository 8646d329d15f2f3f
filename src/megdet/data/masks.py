"""Masks of objects at the size of a resized image, each stored as a frame of pixels around its object."""

from typing import NamedTuple

import numpy as np
from hotcoco import mask as coco_masks
from jaxtyping import Bool
from numpy.typing import NDArray
from PIL import Image

from megdet.data.planned import Window
from megdet.data.rle import pixels_of_runs, runs_of_text
from megdet.data.segmentations import Segmentation


class PlacedMask(NamedTuple):
    """The pixels of an object in a frame that covers all of them; an empty frame if no pixel is in the image."""

    x: int
    y: int
    """position in the image of the frame's upper left pixel"""
    pixels: Bool[np.ndarray, "height width"]

    def flipped(self, size: tuple[int, int], *, horizontal: bool, vertical: bool) -> "PlacedMask":
        """The mask in a flipped image of this height and width."""
        height, width = self.pixels.shape
        x = size[1] - self.x - width if horizontal else self.x
        y = size[0] - self.y - height if vertical else self.y
        return PlacedMask(x, y, self.pixels[:: -1 if vertical else 1, :: -1 if horizontal else 1])

    def cut(self, corner: tuple[int, int], size: tuple[int, int]) -> "PlacedMask":
        """The part of the mask in a crop of this height and width whose upper left corner is at (y, x) of the image."""
        y, x = self.y - corner[0], self.x - corner[1]
        pixels = self.pixels[max(0, -y) : max(0, size[0] - y), max(0, -x) : max(0, size[1] - x)]
        if not pixels.any():
            return PlacedMask(0, 0, np.zeros((0, 0), np.bool_))
        return PlacedMask(max(0, x), max(0, y), pixels)


def place_mask(
    segmentation: Segmentation, original: tuple[int, int], size: tuple[int, int], window: Window | None = None
) -> PlacedMask:
    """The mask of an object after its image, or its window, was resized from height and width `original` to `size`.

    Polygons are scaled, then rasterised by the COCO API. Runs are resized with antialias; a pixel belongs to the object
    if at least half of its area does. Compared with taking the nearest pixel this comes closer to the scaled polygon:
    on COCO, at half size, an IoU of 0.984 instead of 0.972 for objects of 32 px and more, 0.921 instead of 0.878 for
    smaller ones. Neither way makes a mask of the whole image.
    """
    (top, left), part = (window.corner, window.size) if window else ((0, 0), original)
    if segmentation.polygons:
        scale, origin = np.array([size[1] / part[1], size[0] / part[0]]), np.array([left, top])
        moved = (polygon.astype(np.float64) - origin for polygon in segmentation.polygons)
        outlines = [(polygon * scale).ravel().tolist() for polygon in moved]
        counts = coco_masks.merge(coco_masks.frPyObjects(outlines, *size))["counts"]
        return _in_frame(_sound(runs_of_text(counts)), size)
    placed = _in_frame(segmentation.runs.astype(np.int64), original)
    if window:
        placed = placed.cut(window.corner, part)
    return placed if part == size or not placed.pixels.size else _resized(placed, part, size)


def _sound(runs: NDArray[np.int64] | None) -> NDArray[np.int64]:
    if runs is None:
        raise ValueError("the COCO API gave no compressed runs")
    return runs


def _in_frame(runs: NDArray[np.int64], size: tuple[int, int]) -> PlacedMask:
    """The pixels of runs over an image of this height and width, in the smallest frame."""
    ends, height = runs.cumsum(), size[0]
    first, last = ends[: len(ends) // 2 * 2 : 2], ends[1::2] - 1
    is_run = first <= last
    first, last = first[is_run], last[is_run]
    if not len(first):
        return PlacedMask(0, 0, np.zeros((0, 0), np.bool_))
    (x, y), (last_x, last_y) = np.divmod(first, height), np.divmod(last, height)
    x1, x2 = int(x[0]), int(last_x[-1]) + 1
    y1, y2 = (int(y.min()), int(last_y.max()) + 1) if (x == last_x).all() else (0, height)
    # a run continues in the next column only if the frame is as high as the image
    turns = np.stack([(x - x1) * (y2 - y1) + y - y1, (last_x - x1) * (y2 - y1) + last_y - y1 + 1], axis=1).ravel()
    own = np.diff(turns, prepend=0, append=(x2 - x1) * (y2 - y1))
    return PlacedMask(x1, y1, pixels_of_runs(own, y2 - y1, x2 - x1))


def _resized(placed: PlacedMask, original: tuple[int, int], size: tuple[int, int]) -> PlacedMask:
    """The mask in the resized image, in the frame of all pixels that it touches."""
    edges, scale = np.array(original), np.array(size) / original
    low = np.array([placed.y, placed.x])
    high = low + placed.pixels.shape
    margin = np.ceil(2 * np.maximum(1, 1 / scale)).astype(int)  # pixels that the filter reads around the new frame
    before, after = np.minimum(margin, low), np.minimum(margin, edges - high)
    padded = np.pad(placed.pixels.astype(np.uint8) * 255, np.stack([before, after], axis=1))
    new_low, new_high = np.floor(low * scale).astype(int), np.minimum(np.ceil(high * scale).astype(int), size)
    box = np.concatenate([new_low / scale, np.minimum(new_high / scale, edges)]) - np.tile(low - before, 2)
    (y1, x1, y2, x2), (height, width) = box.tolist(), (new_high - new_low).tolist()
    image = Image.fromarray(padded).resize((width, height), Image.Resampling.BILINEAR, box=(x1, y1, x2, y2))
    return PlacedMask(int(new_low[1]), int(new_low[0]), np.asarray(image) >= 128)
