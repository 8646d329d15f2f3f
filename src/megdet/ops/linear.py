"""The fully connected layer by oneDNN, for float32 on CPUs that are not Intel's.

torch sends float32 matrix products to MKL, which is a little faster than oneDNN on Intel's processors and half as fast
on others (`bench/linear.py`). The operator is private to torch, so where a version of torch lacks it the layer is
torch's own.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from megdet import runtime

_HAS_ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "rows outputs"]:
    """x @ weight.T + bias; torch's own layer under autocast, in another dtype, in an exported graph, on a GPU."""
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if torch.compiler.is_exporting():
        return F.linear(x, weight, bias)
    if _HAS_ONEDNN and is_plain and len(x) and not runtime.is_intel_processor():
        return _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = gradients[0].contiguous()
        needs_x, needs_weight, _ = ctx.needs_input_grad
        weight_gradient = _product(dy.t(), x.t()) if needs_weight else None
        # free the input before its gradient is made: a step's memory peaks here
        ctx.maybe_clear_saved_tensors()
        del x
        x_gradient = _product(dy, weight.t()) if needs_x else None
        return x_gradient, weight_gradient, dy.sum(0) if ctx.has_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
