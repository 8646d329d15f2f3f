"""Masks of detections, from a grid over a box to the pixels of an image.

Only a frame of whole pixels around each box is sampled, frames of similar size together. So the memory depends neither
on the size of the image nor on the number of objects.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

THRESHOLD = 0.5
"""Least probability at which a pixel belongs to an object."""
_MOST_PIXELS = 1 << 22
"""Pixels of frames that are sampled together: 16 MB in float32."""
_FEW_PIXELS = 1 << 13
"""Least pixels that a frame counts for: for smaller frames the call costs more than the pixels."""


@dataclass(frozen=True)
class PastedMask:
    """The mask of one object within a frame; it is 0 outside the frame."""

    index: int
    """index of the mask"""
    x: int
    y: int
    """column and row of the image at which the frame begins"""
    pixels: Bool[Tensor, "height width"]


def paste_masks(
    probabilities: Float[Tensor, "masks rows columns"],
    boxes: Float[Tensor, "masks 4"],
    size: tuple[int, int],
    *,
    exact: bool = True,
) -> Iterator[PastedMask]:
    """The masks of objects as pixels of an image; in any order, and without objects that have no pixel.

    Args:
        probabilities: 0 to 1, on a grid over each box.
        boxes: x1, y1, x2, y2 in pixels of the image; they may reach out of it.
        size: height and width of the image in pixels.
        exact: take the bilinear value of the grid at each pixel's centre, 0 outside the box, as detectron2 does.
            Otherwise resize the grid with a border of zeros to the box in whole pixels, as torchvision's
            `paste_masks_in_image` does. This takes memory for the whole box, so boxes should be clipped to the image.
    """
    return _exactly(probabilities, boxes, size) if exact else _rounded(probabilities, boxes, size)


def _exactly(
    probabilities: Float[Tensor, "masks rows columns"], boxes: Float[Tensor, "masks 4"], size: tuple[int, int]
) -> Iterator[PastedMask]:
    """Bilinear interpolation of each grid as a product with two matrices, one for y and one for x."""
    frames = _frames(boxes, size)
    corners = frames.tolist()
    for rows in _alike(corners):
        height = max(corners[row][3] - corners[row][1] for row in rows)
        width = max(corners[row][2] - corners[row][0] for row in rows)
        index = torch.tensor(rows, device=boxes.device)
        grids = probabilities[index]
        x = _weights(boxes[index, 0::2], frames[index, 0], width, grids.shape[2], grids.dtype)
        y = _weights(boxes[index, 1::2], frames[index, 1], height, grids.shape[1], grids.dtype)
        pixels = y @ grids @ x.mT >= THRESHOLD
        for own, row in zip(pixels, rows, strict=True):
            x1, y1, x2, y2 = corners[row]
            yield PastedMask(row, x1, y1, own[: y2 - y1, : x2 - x1])


def resampled_masks(
    probabilities: Float[Tensor, "masks rows columns"],
    boxes: Float[Tensor, "masks 4"],
    others: Float[Tensor, "masks 4"],
) -> Float[Tensor, "masks rows columns"]:
    """Masks resampled to grids of the same number of cells over the boxes `others`, bilinear between cell centres.

    As in `paste_masks`, masks are 0 outside their grids.
    """
    rows, columns = probabilities.shape[1:]
    x = _cell_weights(boxes[:, 0::2], others[:, 0::2], columns, probabilities.dtype)
    y = _cell_weights(boxes[:, 1::2], others[:, 1::2], rows, probabilities.dtype)
    return y @ probabilities @ x.mT


def _cell_weights(
    edges: Float[Tensor, "masks 2"], others: Float[Tensor, "masks 2"], cells: int, dtype: torch.dtype
) -> Float[Tensor, "masks cells cells"]:
    """Weights along one axis: of each cell of a grid over `edges` in each cell of a grid over `others`."""
    start, end = edges.double().unsqueeze(2).unbind(1)
    first, last = others.double().unsqueeze(2).unbind(1)
    centres = first + (torch.arange(cells, device=edges.device) + 0.5) / cells * (last - first)
    return _weights_at(centres, start, end, cells, dtype)


def _frames(boxes: Float[Tensor, "masks 4"], size: tuple[int, int]) -> Int64[Tensor, "masks 4"]:
    """The pixels of the image whose centres are in each box: first column and row, last ones + 1."""
    height, width = size
    limits = boxes.new_tensor([width, height], dtype=torch.float64)
    first, last = boxes[:, :2].double(), boxes[:, 2:].double()
    is_box = (torch.isfinite(first) & torch.isfinite(last) & (last > first)).all(dim=1, keepdim=True)
    start = torch.minimum((first - 0.5).ceil().clamp(min=0), limits)
    end = torch.minimum((last - 0.5).floor() + 1, limits)
    return torch.where(is_box, torch.cat([start, torch.maximum(start, end)], dim=1), 0.0).long()


def _alike(corners: list[list[int]]) -> Iterator[list[int]]:
    """Groups of nonempty frames of similar size, so that padding all to the largest of a group costs little."""
    sides = [(y2 - y1, x2 - x1) for x1, y1, x2, y2 in corners]
    found = [index for index, (height, width) in enumerate(sides) if height and width]
    found.sort(key=lambda index: (sides[index][0].bit_length(), sides[index][1]))
    group: list[int] = []
    used = height = width = 0
    for index in found:
        own = max(_FEW_PIXELS, sides[index][0] * sides[index][1])
        tallest, widest = max(height, sides[index][0]), max(width, sides[index][1])
        padded = (len(group) + 1) * tallest * widest
        if group and padded > min(2 * (used + own), _MOST_PIXELS):
            yield group
            group, used, (tallest, widest) = [], 0, sides[index]
        group.append(index)
        used, height, width = used + own, tallest, widest
    if group:
        yield group


def _weights(
    edges: Float[Tensor, "masks 2"], first: Int64[Tensor, " masks"], count: int, cells: int, dtype: torch.dtype
) -> Float[Tensor, "masks count cells"]:
    """Weights along one axis: of each cell of a grid over `edges` in each of `count` pixels from `first` on."""
    start, end = edges.double().unsqueeze(2).unbind(1)
    centres = first.unsqueeze(1) + torch.arange(count, device=edges.device) + 0.5
    return _weights_at(centres, start, end, cells, dtype)


def _weights_at(centres: Tensor, start: Tensor, end: Tensor, cells: int, dtype: torch.dtype) -> Tensor:
    place = (centres - start) / (end - start) * cells - 0.5  # 0 is the centre of the first cell
    distance = place.to(dtype).unsqueeze(2) - torch.arange(cells, device=centres.device, dtype=dtype)
    return distance.abs_().neg_().add_(1).clamp_(min=0)


def _rounded(
    probabilities: Float[Tensor, "masks rows columns"], boxes: Float[Tensor, "masks 4"], size: tuple[int, int]
) -> Iterator[PastedMask]:
    """Resizes each mask to its box in whole pixels, by the function that torchvision calls."""
    grids, cells = F.pad(probabilities, (1, 1, 1, 1)), probabilities.shape[2]
    centre, half = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((cells + 2) / cells)
    is_box = torch.isfinite(boxes).all(dim=1) & (boxes[:, 2:] >= boxes[:, :2]).all(dim=1)
    corners = torch.where(is_box.unsqueeze(1), torch.cat([centre - half, centre + half], dim=1), -9.0).long().tolist()
    for index, (x1, y1, x2, y2) in enumerate(corners):
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2 + 1, size[1]), min(y2 + 1, size[0])
        if left < right and top < bottom:
            whole = F.interpolate(grids[index, None, None], (y2 - y1 + 1, x2 - x1 + 1), mode="bilinear")[0, 0]
            yield PastedMask(index, left, top, whole[top - y1 : bottom - y1, left - x1 : right - x1] >= THRESHOLD)
