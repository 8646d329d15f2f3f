"""The focal loss (Lin et al., 2017) summed over all anchors and classes of an image, without a target for each pair.

With 200,000 anchors and 80 classes, a target, a probability and a weight for each pair would take 64 MB each, for every
image. So every pair is first counted as negative, some rows of anchors at a time, and then only the pairs of positive
anchors with their own class are replaced. Only the logits are kept; the backward computes the slopes again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

_ANCHORS_AT_ONCE = 1 << 14
"""Rows of anchors that are computed at a time."""


def focal_loss(
    logits: Float[Tensor, "images anchors classes"],
    labels: Int64[Tensor, "images anchors"],
    is_counted: Bool[Tensor, "images anchors"],
    alpha: float,
    gamma: float,
) -> Float[Tensor, " images"]:
    """The sum over each image's anchors and all classes of -alpha_t (1 - p_t)^gamma log p_t (Eq. 5), in float32.

    Args:
        logits: before the sigmoid; float64 logits are summed in float64.
        labels: the class of each anchor, -1 for negatives.
        is_counted: false for anchors without a loss.
        alpha: weight of an anchor's own class; all other pairs have 1 - alpha.
        gamma: 0 makes it a weighted cross-entropy.
    """
    return _FocalLoss.apply(logits, labels, is_counted, alpha, gamma)  # type: ignore[no-any-return]  # `apply` of torch's


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, is_counted: Tensor, alpha: float, gamma: float) -> Tensor:
        ctx.save_for_backward(logits, labels, is_counted)
        ctx.alpha, ctx.gamma = alpha, gamma
        total = logits.new_zeros(len(logits), dtype=_working_dtype(logits))
        for _, x, label, weight in _parts(logits, labels, is_counted):
            values = _negative(x, gamma).mul_(1 - alpha)
            own = x.gather(2, label.clamp(min=0))
            exchanged = alpha * _negative(-own, gamma)
            values = _with_own(values, label, exchanged)
            total += (values.sum(2) * weight).sum(1)
        return total

    @staticmethod
    def backward(ctx: Any, *of_total: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, labels, is_counted = ctx.saved_tensors
        alpha, gamma = ctx.alpha, ctx.gamma
        slopes = torch.empty_like(logits)
        factor = of_total[0].reshape(-1, 1, 1)
        for rows, x, label, weight in _parts(logits, labels, is_counted):
            own = x.gather(2, label.clamp(min=0))
            slope = _negative_slope(x, gamma).mul_(1 - alpha)
            slope = _with_own(slope, label, -alpha * _negative_slope(-own, gamma))
            slopes[:, rows] = slope.mul_(factor * weight.unsqueeze(2))
        return slopes, None, None, None, None


def _parts(logits: Tensor, labels: Tensor, is_counted: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Some rows of anchors at a time: their slice, logits, labels (images, rows, 1) and weights."""
    dtype = _working_dtype(logits)
    for start in range(0, logits.shape[1], _ANCHORS_AT_ONCE):
        rows = slice(start, start + _ANCHORS_AT_ONCE)
        yield rows, logits[:, rows].to(dtype), labels[:, rows].unsqueeze(2), is_counted[:, rows].to(dtype)


def _negative(x: Tensor, gamma: float) -> Tensor:
    """p^gamma (-log(1 - p)): the term of a class that is not the anchor's; with -x, the term of its own class."""
    return F.softplus(x).mul_(x.sigmoid().pow_(gamma))


def _negative_slope(x: Tensor, gamma: float) -> Tensor:
    """The derivative of `_negative` by x: p^gamma (p + gamma (1 - p) (-log(1 - p)))."""
    p = x.sigmoid()
    slope = F.softplus(x).mul_(1 - p).mul_(gamma).add_(p)
    return slope.mul_(p.pow_(gamma))


def _with_own(values: Tensor, label: Tensor, own: Tensor) -> Tensor:
    """`values` with the entries of the anchors' own classes replaced by `own`; rows without a class stay."""
    place = label.clamp(min=0)
    return values.scatter_(2, place, own.where(label >= 0, values.gather(2, place)))


def _working_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
