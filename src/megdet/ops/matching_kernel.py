"""The overlaps by which candidates are matched to boxes on a GPU, without a table of all pairs (Triton).

Imported only for boxes on a GPU; `ops/matching.py` has the plain form, against which this one is tested.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512
"""Candidates of one program, which goes through the boxes of its image one by one."""
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def overlaps(candidates: Tensor, boxes: Tensor, is_box: Tensor, *, keep_best: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Each candidate's largest IoU, its box, and whether no candidate has a larger IoU with one of the boxes.

    The arguments are those of `match_boxes`, the results those of its `_overlaps`. The second pass computes the
    overlaps again: they cost less than writing and reading them.
    """
    images, count, width = boxes.shape[0], candidates.shape[-2], boxes.shape[1]
    largest = boxes.new_full((images, count), -1.0)
    index = torch.zeros((images, count), dtype=torch.int64, device=boxes.device)
    is_best = torch.zeros((images, count), dtype=torch.bool, device=boxes.device)
    # as integers: the bits of numbers from 0 on have the order of the numbers, and a GPU can take the largest of many
    largest_of_box = torch.zeros((images, width), dtype=_BITS[boxes.dtype], device=boxes.device)
    if not (images and count and width):
        return largest, index, is_best
    candidates, boxes, is_box = candidates.contiguous(), boxes.contiguous(), is_box.contiguous()
    of_image = 0 if candidates.dim() == 2 or candidates.shape[0] == 1 < images else count
    grid = (triton.cdiv(count, _BLOCK), images)
    shared = (candidates, of_image, boxes, count, width)
    # no fusion: x * y + z must round twice, as in the plain form
    options = {"KEEP_BEST": keep_best, "BLOCK": _BLOCK, "enable_fp_fusion": False}
    _match[grid](*shared, is_box, largest, index, largest_of_box, **options)
    if keep_best:
        _find_best[grid](*shared, largest_of_box, is_best, BLOCK=_BLOCK, enable_fp_fusion=False)
    return largest, index, is_best


@triton.jit
def _iou(x1, y1, x2, y2, box):
    """With the box at a pointer; a coordinate that is not a number makes it not a number, as in the plain form."""
    all_nan: tl.constexpr = tl.PropagateNan.ALL
    box_x1, box_y1, box_x2, box_y2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    width = tl.minimum(x2, box_x2, all_nan) - tl.maximum(x1, box_x1, all_nan)
    height = tl.minimum(y2, box_y2, all_nan) - tl.maximum(y1, box_y1, all_nan)
    both = tl.maximum(width, 0.0, all_nan) * tl.maximum(height, 0.0, all_nan)
    union = (x2 - x1) * (y2 - y1) + (box_x2 - box_x1) * (box_y2 - box_y1) - both
    if both.dtype == tl.float32:
        return tl.div_rn(both, tl.maximum(union, 1.1754943508222875e-38, all_nan))  # float32's smallest normal number
    return both / tl.maximum(union, 2.2250738585072014e-308, all_nan)


@triton.jit
def _corners(own, is_candidate):
    """Of the candidates at some pointers; zeros where there is none."""
    x1 = tl.load(own, mask=is_candidate, other=0.0)
    y1 = tl.load(own + 1, mask=is_candidate, other=0.0)
    x2 = tl.load(own + 2, mask=is_candidate, other=0.0)
    y2 = tl.load(own + 3, mask=is_candidate, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _match(
    candidates,
    of_image,
    boxes,
    count,
    width,
    is_box,
    largest,
    index,
    largest_of_box,
    KEEP_BEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_candidate = place < count
    x1, y1, x2, y2 = _corners(candidates + 4 * (image * of_image + place), is_candidate)
    most = tl.full([BLOCK], -1.0, x1.dtype)
    its_box = tl.zeros([BLOCK], tl.int64)
    for number in range(width):
        row = image * width + number
        if tl.load(is_box + row):
            iou = _iou(x1, y1, x2, y2, boxes + 4 * row)
            is_better = iou > most  # of equal ones the first
            most = tl.where(is_better, iou, most)
            its_box = tl.where(is_better, number, its_box)
            if KEEP_BEST:
                comparable = tl.where(is_candidate & (iou == iou), iou, 0.0)
                bits = tl.int32 if iou.dtype == tl.float32 else tl.int64
                tl.atomic_max(largest_of_box + row, tl.max(comparable, 0).to(bits, bitcast=True))
    tl.store(largest + image * count + place, most, mask=is_candidate)
    tl.store(index + image * count + place, its_box, mask=is_candidate)


@triton.jit
def _find_best(candidates, of_image, boxes, count, width, largest_of_box, is_best, BLOCK: tl.constexpr):
    image = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_candidate = place < count
    x1, y1, x2, y2 = _corners(candidates + 4 * (image * of_image + place), is_candidate)
    found = tl.zeros([BLOCK], tl.int1)
    for number in range(width):
        row = image * width + number
        best = tl.load(largest_of_box + row)
        if best > 0:
            iou = _iou(x1, y1, x2, y2, boxes + 4 * row)
            found = found | (iou == best.to(iou.dtype, bitcast=True))
    tl.store(is_best + image * count + place, found, mask=is_candidate)
