"""Weighted sums of the rows of a table, with gradients that are added in one order on every device."""

import math
from functools import reduce
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
    if torch.compiler.is_exporting():  # ONNX has no embedding bag
        taps = zip(index.unbind(1), weights.to(rows.dtype).unbind(1), strict=True)
        return reduce(torch.add, (rows[own] * weight.unsqueeze(1) for own, weight in taps))
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
        if ctx.needs_input_grad[2]:
            by_tap = [(rows[own] * gradient).sum(1, dtype=ctx.weights_dtype) for own in index.unbind(1)]
            of_weights = torch.stack(by_tap, 1)
        if ctx.needs_input_grad[0]:
            taps = index.shape[1]
            # what is no longer needed is freed at once: a step's memory peaks here
            if not torch.compiler.is_compiling():  # a compiler that reads this has no such method
                ctx.maybe_clear_saved_tensors()
            offsets, order = _by_row(index, ctx.num_rows)
            del index, rows
            weights = weights.reshape(-1)[order]
            if torch.is_grad_enabled():
                order = order.clone()  # for a second derivative the line above has kept it
            bags = order.floor_divide_(taps) if taps & (taps - 1) else order.bitwise_right_shift_(int(math.log2(taps)))
            of_rows = _sums_between(gradient, bags, weights, offsets)
        return of_rows, None, of_weights


def _by_row(index: Tensor, num_rows: int) -> tuple[Int64[Tensor, " rows"], Int64[Tensor, " taps"]]:
    """For each row the start of its taps in their order by row, and that order."""
    numbers, order = stably_sorted(index.reshape(-1), num_rows)
    return _starts(numbers, num_rows), order


def _starts(numbers: Int64[Tensor, " taps"], limit: int) -> Int64[Tensor, " limit"]:
    """For each number below `limit` the place of the first that is as large; `numbers` rise."""
    return torch.searchsorted(numbers, torch.arange(limit, device=numbers.device))


def stably_sorted(index: Int64[Tensor, " taps"], limit: int) -> tuple[Int64[Tensor, " taps"], Int64[Tensor, " taps"]]:
    """What `index.sort(stable=True)` gives, for numbers from 0 to below `limit`.

    On a CPU each number takes its place along as its lower bits: plain integers, none of them equal, which NumPy sorts
    with vector instructions, several times as fast as torch sorts pairs (`bench/sorting.py`).
    """
    bits = len(index).bit_length()
    is_plain = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if not is_plain or (limit - 1).bit_length() + bits > 63:
        numbers, places = index.sort(stable=True)
        return numbers, places
    keys = (index << bits).add_(torch.arange(len(index)))
    keys.numpy().sort()
    return keys >> bits, keys & ((1 << bits) - 1)


def ragged_bags(
    rows: Float[Tensor, "rows channels"],
    index: Int64[Tensor, " taps"],
    weights: Float[Tensor, " taps"],
    bags: Int64[Tensor, " taps"],
    num_bags: int,
) -> Float[Tensor, "bags channels"]:
    """`weighted_bags` with a different number of taps in each bag: tap t is in bag `bags[t]`, and `bags` rise.

    The weights get no gradient.
    """
    return _RaggedBags.apply(rows, index, weights, bags, num_bags)  # type: ignore[no-any-return]  # as above


class _RaggedBags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weights: Tensor, bags: Tensor, num_bags: int) -> Tensor:
        weights = weights.to(rows.dtype)
        ctx.save_for_backward(index, weights, bags)
        ctx.num_rows = rows.shape[0]
        return _sums_between(rows, index, weights, _starts(bags, num_bags))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        index, weights, bags = ctx.saved_tensors
        offsets, order = _by_row(index, ctx.num_rows)
        of_rows = _sums_between(gradient.contiguous(), bags[order], weights[order], offsets)
        return of_rows, None, None, None, None


def _sums_between(rows: Tensor, index: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """The weighted sums of the rows `index` from each start to the next one."""
    if not len(index):
        return rows.new_zeros(len(starts), rows.shape[1])
    return F.embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weights)
