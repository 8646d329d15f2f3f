"""Matrix products of float32 on a CPU, by oneDNN where that is faster than torch's own choice.

Where torch is built with MKL, it sends float32 matrix products there, which is a little faster than oneDNN on Intel's
processors and half as fast on AMD's (`bench/linear.py`). The operator is private to torch, so where a version of torch
lacks it all products are torch's own.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from megdet import runtime

HAS_ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than torch's own choice on this processor."""
    return HAS_ONEDNN and torch._C.has_mkl and not runtime.is_intel_processor()


def by_onednn(
    x: Float[Tensor, "rows inner"], y: Float[Tensor, "columns inner"], bias: Float[Tensor, " columns"] | None = None
) -> Float[Tensor, "rows columns"]:
    """x @ y.T + bias, for float32 on a CPU; neither may be empty. Ask `onednn_is_faster` first."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")
    return found


def gradient_of_weights(
    upstream: Float[Tensor, "rows outputs"], x: Float[Tensor, "rows inputs"]
) -> Float[Tensor, "outputs inputs"]:
    """upstream.T @ x by oneDNN, contiguous."""
    if upstream.shape[1] <= x.shape[1]:
        return by_onednn(upstream.t(), x.t())
    return by_onednn(x.t(), upstream.t()).t().contiguous()  # up to twice as fast with the smaller one first


def product(x: Float[Tensor, "rows inner"], y: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """x @ y for float32 on a CPU; neither is empty."""
    return by_onednn(x, y.t()) if onednn_is_faster() else torch.mm(x, y)


def products(
    x: Float[Tensor, "pairs rows inner"],
    y: Float[Tensor, "pairs inner columns"],
    onto: Float[Tensor, "pairs rows columns"] | None = None,
) -> Float[Tensor, "pairs rows columns"]:
    """x[i] @ y[i] for all pairs, float32 on a CPU; neither is empty. They are added to `onto` in place, if given.

    Otherwise they may replace `x`, which saves memory: do not read it again.
    """
    if not onednn_is_faster():
        return torch.bmm(x, y) if onto is None else onto.baddbmm_(x, y)
    shape = (*x.shape[:2], y.shape[2])
    places = x if x.shape == shape else x.new_empty(shape)
    if onto is not None:
        places = onto
    for own, other, place in zip(x.unbind(0), y.unbind(0), places.unbind(0), strict=True):
        found = by_onednn(own, other.t())
        if onto is None:
            place.copy_(found)
        else:
            place.add_(found)
    return places
