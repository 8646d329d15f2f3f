"""The fully connected layer, by the faster library for float32 on a CPU (`products.py`)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from megdet.ops.products import by_onednn, gradient_of_weights, onednn_is_faster


def linear(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "rows outputs"]:
    """x @ weight.T + bias; torch's own layer under autocast, in another dtype, in an exported graph, on a GPU."""
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if torch.compiler.is_exporting():
        return F.linear(x, weight, bias)
    if is_plain and len(x) and onednn_is_faster():
        return _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = gradients[0].contiguous()
        needs_x, needs_weight, _ = ctx.needs_input_grad
        weight_gradient = gradient_of_weights(dy, x) if needs_weight else None
        # free the input before its gradient is made: a step's memory peaks here
        ctx.maybe_clear_saved_tensors()
        del x
        x_gradient = by_onednn(dy, weight.t()) if needs_x else None
        return x_gradient, weight_gradient, dy.sum(0) if ctx.has_bias else None
