"""Arithmetic of boxes (x1, y1, x2, y2) in pixels; width is x2 - x1."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megdet.ops.constants import constant

LARGEST_LOG_SCALE = math.log(1000.0 / 16)
"""Largest dw and dh, so that exp() stays finite at the start of training."""

Weights = tuple[float, float, float, float]


def box_area(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, " *batch"]:
    """Areas in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(a: Float[Tensor, "*#batch m 4"], b: Float[Tensor, "*#batch n 4"]) -> Float[Tensor, "*joined m n"]:
    """Intersection over union of every pair, 0 if both are empty. Batch dimensions broadcast."""
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    intersection = width.clamp_(min=0) * height.clamp_(min=0)
    union = box_area(a) + box_area(b) - intersection
    return intersection / union.clamp_(min=torch.finfo(union.dtype).tiny)


def paired_intersection(a: Float[Tensor, "*batch 4"], b: Float[Tensor, "*batch 4"]) -> Float[Tensor, " *batch"]:
    """The area of the intersection of each pair of boxes, in square pixels."""
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    return width.clamp(min=0) * height.clamp(min=0)


def encode_boxes(
    boxes: Float[Tensor, "*batch 4"], references: Float[Tensor, "*batch 4"], weights: Weights
) -> Float[Tensor, "*batch 4"]:
    """The regression targets (dx, dy, dw, dh) that turn `references` into `boxes` (R-CNN, Appendix C).

    References of zero size, which padding has, give finite numbers.
    """
    size = (references[..., 2:] - references[..., :2]).clamp(min=1e-6)
    center = references[..., :2] + 0.5 * size
    box_size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    box_center = boxes[..., :2] + 0.5 * box_size
    deltas = torch.cat([(box_center - center) / size, (box_size / size).log()], dim=-1)
    return deltas * constant(weights, deltas.dtype, deltas.device)


def decode_boxes(
    deltas: Float[Tensor, "*batch 4"], references: Float[Tensor, "*batch2 4"], weights: Weights
) -> Float[Tensor, "*batch3 4"]:
    """The boxes that `deltas` make of `references`; the inverse of `encode_boxes`. Leading dimensions broadcast."""
    deltas = deltas / constant(weights, deltas.dtype, deltas.device)
    size = references[..., 2:] - references[..., :2]
    center = references[..., :2] + 0.5 * size
    box_center = center + deltas[..., :2] * size
    half = 0.5 * size * deltas[..., 2:].clamp(max=LARGEST_LOG_SCALE).exp()
    return torch.cat([box_center - half, box_center + half], dim=-1)


def mirrored_boxes(
    boxes: Float[Tensor, "*#batch 4"], width: int | Float[Tensor, "*#batch"] | Int64[Tensor, "*#batch"]
) -> Float[Tensor, "*batch 4"]:
    """Boxes in an image of this width in pixels after it is mirrored left to right; its own inverse."""
    return torch.stack([width - boxes[..., 2], boxes[..., 1], width - boxes[..., 0], boxes[..., 3]], dim=-1)


def clip_boxes(
    boxes: Float[Tensor, "images *boxes 4"], sizes: Int64[Tensor, "images 2"]
) -> Float[Tensor, "images *boxes 4"]:
    """Boxes clipped to their images; `sizes` are (height, width) in pixels."""
    limits = sizes.to(boxes.dtype).flip(1).repeat(1, 2)
    limits = limits.reshape(limits.shape[0], *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)
