"""Targets of semantic segmentation: the class of the object at the middle of each cell of a map.

An object covers its mask or, without a mask, its box. Masks are read bit by bit at the middles of cells; neither masks
nor boxes are drawn at full size.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megdet.ops.boxes import box_area
from megdet.structures import Masks, Targets

_PLACES_AT_ONCE = 1 << 21
"""Pairs of an object and a cell that are computed at a time on a CPU, unless a single object has more cells."""
_PLACES_AT_ONCE_ON_GPU = 1 << 23


@torch.no_grad()
def semantic_targets(
    targets: Targets, sizes: Int64[Tensor, "images 2"], grid: tuple[int, int], stride: int, num_classes: int
) -> Int64[Tensor, "images height width"]:
    """The class at the middle of each cell: -1 outside the image, `num_classes` without an object.

    If objects overlap, the object with the smallest box counts, of equal boxes the one with the lower index.

    Args:
        targets: boxes and, if there are any, masks.
        sizes: height and width of each image in pixels.
        grid: cells from top to bottom and from left to right.
        stride: edge of a cell in pixels.
        num_classes: without the background.
    """
    device, (images, count) = targets.labels.device, targets.labels.shape
    y = torch.arange(grid[0], device=device) * stride + stride // 2
    x = torch.arange(grid[1], device=device) * stride + stride // 2
    area = box_area(targets.boxes).masked_fill(~targets.is_box, torch.inf)
    order = area.sort(dim=1, stable=True).indices  # the smallest first
    nobody = torch.full((), count, dtype=torch.int64, device=device)
    on_top = nobody.expand(images, *grid)  # the object's index in this order
    limit = _PLACES_AT_ONCE_ON_GPU if device.type == "cuda" else _PLACES_AT_ONCE
    at_once = max(1, limit // max(1, images * grid[0] * grid[1]))
    for start in range(0, count, at_once):
        some = order[:, start : start + at_once]
        places = torch.arange(start, start + some.shape[1], device=device).reshape(1, -1, 1, 1)
        own = torch.where(_covers(targets, some, y, x), places, nobody).amin(1)
        on_top = torch.minimum(on_top, own)
    background = targets.labels.new_full((images, 1), num_classes)
    labels = torch.cat([targets.labels.gather(1, order), background], 1)
    found = labels.gather(1, on_top.flatten(1)).reshape(images, *grid)
    is_inside = (y < sizes[:, :1]).unsqueeze(2) & (x < sizes[:, 1:]).unsqueeze(1)
    return found.masked_fill(~is_inside, -1)


def _covers(
    targets: Targets, some: Int64[Tensor, "images objects"], y: Int64[Tensor, " height"], x: Int64[Tensor, " width"]
) -> Bool[Tensor, "images objects height width"]:
    """Whether objects cover the points (y, x); a box includes its upper and left edges, not the other two."""
    boxes = targets.boxes.gather(1, some.unsqueeze(2).expand(-1, -1, 4)).unsqueeze(3)
    in_box = _between(y, boxes[:, :, 1], boxes[:, :, 3]).unsqueeze(3) & _between(
        x, boxes[:, :, 0], boxes[:, :, 2]
    ).unsqueeze(2)
    covered = in_box
    if targets.masks is not None:
        frames = targets.masks.frames.gather(1, some.unsqueeze(2).expand(-1, -1, 5))
        has_mask = (frames[..., 3] > 0).unsqueeze(2).unsqueeze(3)
        covered = torch.where(has_mask, _in_mask(targets.masks, frames, y, x), in_box)
    return covered & targets.is_box.gather(1, some).unsqueeze(2).unsqueeze(3)


def _between(
    places: Int64[Tensor, " places"], low: Float[Tensor, "images objects 1"], high: Float[Tensor, "images objects 1"]
) -> Bool[Tensor, "images objects places"]:
    return (places >= low) & (places < high)


def _in_mask(
    masks: Masks, frames: Int64[Tensor, "images objects 5"], y: Int64[Tensor, " height"], x: Int64[Tensor, " width"]
) -> Bool[Tensor, "images objects height width"]:
    """Whether the pixels with upper left corners (y, x) belong to the masks; outside a frame none does."""
    first, left, top, width, height = (column.unsqueeze(2) for column in frames.unbind(2))
    row, column = (y - top).unsqueeze(3), (x - left).unsqueeze(2)
    is_inside = (row >= 0) & (row < height.unsqueeze(3)) & (column >= 0) & (column < width.unsqueeze(3))
    bit = (first.unsqueeze(3) + row * width.unsqueeze(3) + column).masked_fill(~is_inside, 0)
    image = torch.arange(len(frames), device=frames.device).reshape(-1, 1, 1, 1)
    byte = masks.bits[image, bit >> 3].to(torch.int64)
    return is_inside & ((byte >> (7 - (bit & 7)) & 1) > 0)
