"""1 x 1 convolutions as matrix products of oneDNN's, for float32 on a CPU.

With one thread and fewer than 16 images torch computes them in a form of its own, by MKL: two to three times as slowly
on processors that are not Intel's (`bench/pointwise.py`).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megdet.ops.products import by_onednn, gradient_of_weights


def convolve_1x1(
    x: Float[Tensor, "images inputs height width"],
    weight: Float[Tensor, "outputs inputs 1 1"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "images outputs height width"]:
    """The convolution of stride 1 of a map that is not empty, channels last. Ask `products.onednn_is_faster` first."""
    found: Tensor = _Pointwise.apply(x, weight, bias)
    return found


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # the map as it came, not its rows: so it is recognised as one that need not be kept (`recomputed_outputs.py`)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _as_map(by_onednn(_rows(x), weight.flatten(1), bias), x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = _rows(gradients[0])
        needs_x, needs_weight, _ = ctx.needs_input_grad
        weight_gradient = gradient_of_weights(dy, _rows(x)).view_as(weight) if needs_weight else None
        x_gradient = _as_map(by_onednn(dy, weight.flatten(1).t()), x) if needs_x else None
        return x_gradient, weight_gradient, dy.sum(0) if ctx.has_bias else None


def _rows(maps: Tensor) -> Float[Tensor, "pixels channels"]:
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """The map of the rows, with as many pixels as another.

    It is no view of them: torch forbids to change in place, as activations do, a view that a function of ours returns.
    """
    images, _, height, width = like.shape
    view = rows.view(images, height, width, -1).permute(0, 3, 1, 2)
    return rows.new_empty(0).set_(rows.untyped_storage(), 0, view.shape, view.stride())
