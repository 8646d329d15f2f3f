"""Weighted sums of the rows of a table, whose gradients have one order of addition on every device."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


def weighted_bags(
    rows: Float[Tensor, "rows channels"], index: Int64[Tensor, "bags taps"], weights: Float[Tensor, "bags taps"]
) -> Float[Tensor, "bags channels"]:
    """Row b is the sum over t of weights[b, t] * rows[index[b, t]]; both the rows and the weights may get gradients.

    The backward sorts the taps by row, stably, so there is no scatter with atomics.
    """
    return _WeightedBags.apply(rows, index, weights)  # type: ignore[no-any-return]  # `apply` of torch's has no types


class _WeightedBags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.weights_dtype, ctx.num_rows = weights.dtype, rows.shape[0]
        weights = weights.to(rows.dtype)
        ctx.save_for_backward(index, weights, rows if ctx.needs_input_grad[2] else None)
        if index.shape[0] == 0:
            return rows.new_zeros(0, rows.shape[1])
        return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        index, weights, rows = ctx.saved_tensors
        of_rows = of_weights = None
        gradient = gradient.contiguous()
        if ctx.needs_input_grad[0]:
            of_rows = _gradient_of_rows(gradient, index, weights, ctx.num_rows)
        if ctx.needs_input_grad[2]:
            taps = [(rows[own] * gradient).sum(1, dtype=ctx.weights_dtype) for own in index.unbind(1)]
            of_weights = torch.stack(taps, 1)
        return of_rows, None, of_weights


def _gradient_of_rows(gradient: Tensor, index: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    if index.shape[0] == 0:
        return gradient.new_zeros(num_rows, gradient.shape[1])
    taps = index.shape[1]
    sorted_rows, order = index.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(sorted_rows, torch.arange(num_rows, device=index.device))
    bags = order // taps if taps & (taps - 1) else order >> int(math.log2(taps))
    return F.embedding_bag(bags, gradient, offsets, mode="sum", per_sample_weights=weights.reshape(-1)[order])
