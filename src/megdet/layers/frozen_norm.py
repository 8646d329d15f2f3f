"""Batch norm with frozen statistics (BN size 0, the usual fine-tuning)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn import functional as F


class _FixedNorm(torch.autograd.Function):
    """Batch norm by fixed numbers that get no gradient. torch's own keeps its input, which the backward never reads."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        _, mean, var, weight, _, ctx.eps = inputs
        ctx.save_for_backward(mean, var, weight)
        ctx.save_for_forward(mean, var, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, weight = ctx.saved_tensors
        dy = gradients[0]  # in place of the input too, which is not read
        dx, _, _ = torch.ops.aten.native_batch_norm_backward(
            dy, dy, weight, mean, var, mean, var, False, ctx.eps, (True, False, False)
        )
        return dx, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_of_numbers: Tensor | None) -> Tensor:
        mean, var, weight = ctx.saved_tensors
        return F.batch_norm(dx, torch.zeros_like(mean), var, weight, None, False, 0.0, ctx.eps)


@fx.wrap  # one step of a graph that torch.fx traces, which cannot follow its choice
def fixed_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, by channel, without keeping x for the backward."""
    wants_gradient = torch.is_grad_enabled() and x.requires_grad and x.numel() > 0
    # torch's own, which its stubs do not list; a traced file could not hold a function of ours
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    is_read = torch.compiler.is_compiling() or is_traced
    if not wants_gradient or is_read or weight.requires_grad or bias.requires_grad:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    y: Tensor = _FixedNorm.apply(x, mean, var, weight, bias, eps)
    return y


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics and fixed weight and bias: BN size 0 (the usual fine-tuning)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Float[Tensor, "n channels *rest"]) -> Float[Tensor, "n channels *rest"]:
        """Scale and shift every channel."""
        return fixed_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Size and eps, for print()."""
        return f"{self.channels}, eps={self.eps}"


class FrozenBatchNormAct(FrozenBatchNorm):
    """Frozen batch norm followed by an activation, for timm's fused `BatchNormAct2d`."""

    def __init__(self, channels: int, eps: float, act: nn.Module, drop: nn.Module) -> None:
        super().__init__(channels, eps)
        self.act, self.drop = act, drop

    def forward(self, x: Float[Tensor, "n channels *rest"]) -> Float[Tensor, "n channels *rest"]:
        """Scale, shift, apply the model's dropout if it has one, and activate."""
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y
