"""Matches candidates to ground-truth boxes, and samples candidates for the loss."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megdet.ops.boxes import box_iou
from megdet.ops.gpu_kernels import kernels_build
from megdet.ops.integer_hash import hash_integers
from megdet.ops.ordering import NEVER, hash64, top

_BOXES_AT_ONCE = 16
"""Boxes that are compared with all candidates at a time; limits the memory of crowded images."""


@dataclass
class Matches:
    """The ground-truth box of every candidate, and whether the candidate is positive or negative (or neither)."""

    box_index: Int64[Tensor, "images candidates"]
    is_positive: Bool[Tensor, "images candidates"]
    is_negative: Bool[Tensor, "images candidates"]


@dataclass
class Sample:
    """A fixed number of candidates an image: first the positives, then the negatives, then padding."""

    index: Int64[Tensor, "images samples"]
    is_positive: Bool[Tensor, "images samples"]
    is_valid: Bool[Tensor, "images samples"]


def match_boxes(
    candidates: Float[Tensor, "*images candidates 4"],
    boxes: Float[Tensor, "images max_boxes 4"],
    is_box: Bool[Tensor, "images max_boxes"],
    positive_iou: float,
    negative_iou: float,
    *,
    keep_best: bool,
) -> Matches:
    """Match candidates to the box they overlap most, ties to the first box.

    `candidates` are one set for all images or one set each. With `keep_best` the candidates with the largest overlap
    with a box are positive too, however small it is (anchors; Faster R-CNN, Sec. 3.1.2). An image without boxes has
    only negatives. On a GPU the overlaps are one kernel, which keeps none of them; without Triton it is the loop below.
    """
    compare = _overlaps
    if boxes.is_cuda and kernels_build(boxes.device):
        from megdet.ops.matching_kernel import overlaps as compare
    largest, box_index, is_best = compare(candidates, boxes, is_box, keep_best=keep_best)
    is_positive = (largest >= positive_iou) | is_best
    is_negative = (largest < negative_iou) & ~is_best
    return Matches(box_index, is_positive, is_negative)


def _overlaps(
    candidates: Tensor, boxes: Tensor, is_box: Tensor, *, keep_best: bool
) -> tuple[Float[Tensor, "images candidates"], Int64[Tensor, "images candidates"], Bool[Tensor, "images candidates"]]:
    """The largest IoU of each candidate, -1 without boxes; its box; with `keep_best` whether it is a box's largest."""
    shape = (boxes.shape[0], candidates.shape[-2])
    best_iou = boxes.new_full(shape, -1.0)
    box_index = torch.zeros(shape, dtype=torch.int64, device=boxes.device)
    is_best = torch.zeros(shape, dtype=torch.bool, device=boxes.device)
    for start in range(0, boxes.shape[1], _BOXES_AT_ONCE):
        some = slice(start, start + _BOXES_AT_ONCE)
        iou = box_iou(candidates, boxes[:, some]).masked_fill_(~is_box[:, some].unsqueeze(1), -1.0)
        best, index = iou.max(dim=2)
        is_better = best > best_iou
        best_iou = torch.where(is_better, best, best_iou)
        box_index = torch.where(is_better, index + start, box_index)
        if keep_best and iou.shape[1]:
            best_of_box = iou.amax(dim=1, keepdim=True)
            is_best |= ((iou == best_of_box) & (best_of_box > 0)).any(dim=2)
    return best_iou, box_index, is_best


def sample_matches(
    matches: Matches,
    identities: Int64[Tensor, "*images candidates"],
    image_seeds: Int64[Tensor, " images"],
    samples: int,
    positive_fraction: float,
    purpose: int = 0,
) -> Sample:
    """At most `samples` candidates an image, at most `positive_fraction` of them positive, the rest negative.

    The choice is drawn by a hash of (image seed, identity), so it does not change when candidates are listed in
    another order or images are spread over devices in another way. Draws of another `purpose` are independent.
    """
    keys = hash64(image_seeds.unsqueeze(1) ^ hash_integers(purpose), identities)
    most_positives = int(samples * positive_fraction)
    positive_keys, positives = top(keys.masked_fill(~matches.is_positive, NEVER), most_positives)
    negative_keys, negatives = top(keys.masked_fill(~matches.is_negative, NEVER), samples)
    num_positives = (positive_keys != NEVER).sum(dim=1, keepdim=True)
    num_negatives = (negative_keys != NEVER).sum(dim=1, keepdim=True)
    place = torch.arange(samples, device=keys.device).unsqueeze(0).expand(keys.shape[0], -1)
    is_positive = place < num_positives
    is_valid = place < (num_positives + num_negatives).clamp(max=samples)
    joined = torch.cat([positives, negatives], dim=1)
    if joined.shape[1] == 0:
        return Sample(torch.zeros_like(place), is_positive, is_valid)
    slot = torch.where(is_positive, place, positives.shape[1] + place - num_positives)
    index = joined.gather(1, slot.clamp(max=joined.shape[1] - 1))
    return Sample(index.masked_fill(~is_valid, 0), is_positive, is_valid)
