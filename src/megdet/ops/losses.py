"""Loss terms: the sum over an image's samples divided by that image's own number of samples (Eq. 1)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from megdet.architecture_parts import BoxLossKind
from megdet.ops.boxes import Weights, box_area, decode_boxes, paired_intersection

_GIOU_EPS = 1e-7
"""Keeps the quotients of boxes of no area finite, as in `torchvision.ops.generalized_box_iou_loss`."""


def mean_per_image(
    values: Float[Tensor, "images samples"], is_valid: Bool[Tensor, "images samples"]
) -> Float[Tensor, " images"]:
    """Sum of each image's values over max(1, the number of its valid samples); values of invalid samples must be 0."""
    return values.sum(1) / is_valid.sum(1).clamp(min=1)


def masked_cross_entropy_logits(
    logits: Float[Tensor, "images samples"],
    is_positive: Bool[Tensor, "images samples"],
    is_valid: Bool[Tensor, "images samples"],
) -> Float[Tensor, "images samples"]:
    """Binary cross-entropy of logits, 0 for samples that are not valid."""
    loss = F.binary_cross_entropy_with_logits(logits, is_positive.to(logits.dtype), reduction="none")
    return loss * is_valid


def smooth_l1(values: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"], beta: float) -> Float[Tensor, "*shape"]:
    """|d| - beta / 2 where |d| > beta, d^2 / (2 beta) below (Fast R-CNN); beta 0 is |d|."""
    return F.smooth_l1_loss(values, wanted, reduction="none", beta=beta)


def giou_loss(boxes: Float[Tensor, "*batch 4"], wanted: Float[Tensor, "*batch 4"]) -> Float[Tensor, " *batch"]:
    """1 - GIoU of each pair of boxes, 0 to 2 (Rezatofighi et al., 2019): IoU less the empty part of their hull."""
    intersection = paired_intersection(boxes, wanted)
    union = box_area(boxes) + box_area(wanted) - intersection
    low, high = torch.minimum(boxes[..., :2], wanted[..., :2]), torch.maximum(boxes[..., 2:], wanted[..., 2:])
    hull = (high - low).prod(dim=-1)
    return 1 - intersection / (union + _GIOU_EPS) + (hull - union) / (hull + _GIOU_EPS)


def box_loss(
    kind: BoxLossKind,
    deltas: Float[Tensor, "images samples 4"],
    wanted: Float[Tensor, "images samples 4"],
    references: Float[Tensor, "images samples 4"],
    weights: Weights,
    beta: float,
) -> Float[Tensor, "images samples"]:
    """The loss of each regressed box: `deltas` against the target deltas `wanted`, both relative to `references`."""
    if kind == "smooth_l1":
        return smooth_l1(deltas, wanted, beta).sum(2)
    return giou_loss(decode_boxes(deltas, references, weights), decode_boxes(wanted, references, weights))
