"""Pictures made of several prepared images: mosaics, and objects of one pasted onto another.

Copy-paste is that of Ghiasi et al., CVPR 2021. Edges are not blended: the authors find no gain. Differs from the paper:
an object without a mask is pasted as the rectangle of its box.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from megdet.data.masks import PlacedMask
from megdet.ops.boxes import clip_boxes

NO_MASK = PlacedMask(0, 0, np.zeros((0, 0), np.bool_))
"""Of an object whose mask is not known."""


@dataclass
class Prepared:
    """One image, resized, cut and flipped, with its targets in pixels of the result."""

    pixels: Tensor
    """(3, height, width): 0 to 255, uint8 or float32"""
    boxes: Float32[Tensor, "boxes 4"]
    labels: Int64[Tensor, " boxes"]
    masks: list[PlacedMask]
    """one a box; empty ones where there are none, and no list at all (empty) if they were not asked for"""


def pasted(image: Prepared, source: Prepared, corner: tuple[int, int], least_area: float) -> Prepared:
    """The image with all objects of the source, whose upper left corner is at `corner` (y, x); may change its pixels.

    A box of the image that is partly hidden shrinks as its mask does. An object is left out if less than `least_area`
    of it is seen, or nothing: hidden by pasted ones, or outside of the image. Both must have masks.
    """
    size = image.pixels.shape[1], image.pixels.shape[2]
    shapes = [_shape(*own) for own in zip(source.masks, source.boxes.tolist(), strict=True)]
    moved = [shape.cut((-corner[0], -corner[1]), size) for shape in shapes]
    is_pasted = [_is_seen(new, old, least_area) for new, old in zip(moved, shapes, strict=True)]
    moved = [own for own, is_own in zip(moved, is_pasted, strict=True) if is_own]
    cover = np.zeros(size, np.bool_)
    for x, y, own in moved:
        cover[y : y + own.shape[0], x : x + own.shape[1]] |= own
    pixels = _covered(image.pixels, source.pixels, corner, cover) if moved else image.pixels
    boxes, masks, is_kept = _uncovered(image, cover, least_area)
    new_boxes = source.boxes[is_pasted] + torch.tensor([corner[1], corner[0]] * 2)
    return Prepared(
        pixels,
        torch.cat([boxes[is_kept], clip_boxes(new_boxes[None], torch.tensor([size]))[0]]),
        torch.cat([image.labels[is_kept], source.labels[is_pasted]]),
        [*(mask for mask, is_own in zip(masks, is_kept, strict=True) if is_own), *moved],
    )


def put_together(parts: Sequence[tuple[tuple[int, int], Prepared]], size: tuple[int, int]) -> Prepared:
    """The picture of this height and width that the parts fill, each from its upper left corner (y, x) on."""
    pixels = torch.empty((*size, 3), dtype=parts[0][1].pixels.dtype).permute(2, 0, 1)  # channels last, as images are
    boxes, masks = [], list[PlacedMask]()
    for (top, left), own in parts:
        height, width = own.pixels.shape[1:]
        pixels[:, top : top + height, left : left + width] = own.pixels
        boxes.append(own.boxes + torch.tensor([left, top] * 2))
        masks += [PlacedMask(mask.x + left, mask.y + top, mask.pixels) for mask in own.masks]
    return Prepared(pixels, torch.cat(boxes), torch.cat([own.labels for _, own in parts]), masks)


def _shape(mask: PlacedMask, box: list[float]) -> PlacedMask:
    """The mask, or without one the pixels whose middle lies in the box."""
    if mask.pixels.size:
        return mask
    x1, y1, x2, y2 = (max(0, int(np.ceil(edge - 0.5))) for edge in box)
    return PlacedMask(x1, y1, np.ones((y2 - y1, x2 - x1), np.bool_)) if x2 > x1 and y2 > y1 else NO_MASK


def _is_seen(new: PlacedMask, old: PlacedMask, least_area: float) -> bool:
    left = int(new.pixels.sum())
    return left > 0 and left >= least_area * int(old.pixels.sum())


def _covered(
    pixels: Tensor, source: Tensor, corner: tuple[int, int], cover: Bool[np.ndarray, "height width"]
) -> Tensor:
    """The pixels, with those of the source where `cover` is true; may change them."""
    below, above = (np.ascontiguousarray(own.permute(1, 2, 0).numpy()) for own in (pixels, source))
    (top, left), (height, width) = corner, source.shape[1:]
    y1, x1 = max(0, top), max(0, left)
    y2, x2 = min(cover.shape[0], top + height), min(cover.shape[1], left + width)
    # a pixel is one value of three channels: with a mask for each channel the copy takes ten times as long
    pixel = np.dtype((np.void, 3 * below.itemsize))
    under, over = (own.view(pixel)[:, :, 0] for own in (below, above))
    np.copyto(under[y1:y2, x1:x2], over[y1 - top : y2 - top, x1 - left : x2 - left], where=cover[y1:y2, x1:x2])
    return torch.from_numpy(below).permute(2, 0, 1)


def _uncovered(
    image: Prepared, cover: Bool[np.ndarray, "height width"], least_area: float
) -> tuple[Tensor, list[PlacedMask], list[bool]]:
    """The boxes and masks of what is still seen of each object of the image, and which are targets."""
    boxes, masks, is_kept = image.boxes.clone(), list(image.masks), [True] * len(image.masks)
    for place, (mask, box) in enumerate(zip(image.masks, image.boxes.tolist(), strict=True)):
        shape = _shape(mask, box)
        height, width = shape.pixels.shape
        hidden = shape.pixels & cover[shape.y : shape.y + height, shape.x : shape.x + width]
        if not hidden.any():
            continue
        left = PlacedMask(shape.x, shape.y, shape.pixels & ~hidden)
        is_kept[place] = _is_seen(left, shape, least_area)
        if is_kept[place]:
            boxes[place] += torch.from_numpy(_edges(left) - _edges(shape))
            masks[place] = left
            is_kept[place] = bool((boxes[place, 2:] > boxes[place, :2]).all())
    return boxes, masks, is_kept


def _edges(mask: PlacedMask) -> NDArray[np.float32]:
    """x1, y1, x2, y2 around the pixels of a mask that has some."""
    ys, xs = np.flatnonzero(mask.pixels.any(axis=1)), np.flatnonzero(mask.pixels.any(axis=0))
    return np.array([mask.x + xs[0], mask.y + ys[0], mask.x + xs[-1] + 1, mask.y + ys[-1] + 1], np.float32)
