"""LARS and LAMB: the step of a layer is proportional to the length of its weights.

A layer is one tensor of weights. Groups with "adapts" False (norm layers and biases) step without a trust ratio, as in
the published runs of both: the length of their few numbers says nothing about a step. A layer whose weights or step
have length 0 has the ratio 1. Nothing here waits for the device. As in torch's fused optimizers, a step changes nothing
if the attribute `found_inf`, a number on the device, is not 0.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Lars(torch.optim.Optimizer):
    """You, Gitman and Ginsburg 2017, "Large Batch Training of Convolutional Networks", Algorithm 1.

    r = trust_coefficient * |w| / (|g| + weight_decay * |w|);   v <- momentum * v + lr * r * (g + weight_decay * w);
    w <- w - v. The rate is inside the momentum, as in the paper; in torch's SGD it is outside.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, trust_coefficient: float) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Make one step."""
        for group in self.param_groups:
            (weights, gradients), decay = _moving(group), group["weight_decay"]
            if not weights:
                continue
            steps = list(torch._foreach_add(gradients, weights, alpha=decay))
            if group["adapts"]:
                lengths, slopes = _norms(weights), _norms(gradients)
                trust = group["trust_coefficient"] * lengths / (slopes + decay * lengths)
                _multiply(steps, torch.where((lengths > 0) & (slopes > 0), trust, 1.0))
            before = _state(self, "momentum_buffer", weights)
            momenta = list(torch._foreach_mul(before, group["momentum"]))
            torch._foreach_add_(momenta, steps, alpha=group["lr"])
            _replace(self, weights, torch._foreach_sub(weights, momenta))
            _replace(self, before, momenta)


class Lamb(torch.optim.Optimizer):
    """You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", Algorithm 2.

    m and v are Adam's moments, freed of their bias; u = m / (sqrt(v) + eps) + weight_decay * w;
    w <- w - lr * |w| / |u| * u. The paper's phi, which may bound |w|, is the identity.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Make one step."""
        for group in self.param_groups:
            weights, gradients = _moving(group)
            if not weights:
                continue
            first, second = group["betas"]
            kept_means, kept_squares = _state(self, "exp_avg", weights), _state(self, "exp_avg_sq", weights)
            means = list(torch._foreach_lerp(kept_means, gradients, 1 - first))
            squares = list(torch._foreach_mul(kept_squares, second))
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
            number = _count(self, weights)
            divisors = torch._foreach_div(squares, (1 - second**number).to(weights[0].dtype))
            torch._foreach_sqrt_(divisors)
            torch._foreach_add_(divisors, group["eps"])
            torch._foreach_mul_(divisors, (1 - first**number).to(weights[0].dtype))
            steps = list(torch._foreach_div(means, divisors))
            torch._foreach_add_(steps, weights, alpha=group["weight_decay"])
            if group["adapts"]:
                lengths, strides = _norms(weights), _norms(steps)
                _multiply(steps, torch.where((lengths > 0) & (strides > 0), lengths / strides, 1.0))
            _replace(self, weights, torch._foreach_add(weights, steps, alpha=-group["lr"]))
            _replace(self, kept_means, means)
            _replace(self, kept_squares, squares)


def _moving(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of a group that have a gradient, and their gradients."""
    weights = [parameter for parameter in group["params"] if parameter.grad is not None]
    return weights, [weight.grad for weight in weights]


def _state(optimizer: torch.optim.Optimizer, kind: str, weights: list[Tensor]) -> list[Tensor]:
    """The state of this name for every weight, zeros at the start."""
    for weight in weights:
        if kind not in optimizer.state[weight]:
            optimizer.state[weight][kind] = torch.zeros_like(weight)
    return [optimizer.state[weight][kind] for weight in weights]


def _count(optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> Tensor:
    """Count this step in every weight's state, as torch's Adam does; returns the count, the same for all."""
    for weight in weights:
        if "step" not in optimizer.state[weight]:
            optimizer.state[weight]["step"] = torch.zeros((), dtype=torch.float64, device=weight.device)
    numbers: list[Tensor] = [optimizer.state[weight]["step"] for weight in weights]
    counted = numbers[0] + 1.0
    is_left_out = _is_left_out(optimizer)
    one = torch.ones_like(counted) if is_left_out is None else (~is_left_out).to(counted.dtype)
    torch._foreach_add_(numbers, [one] * len(numbers))  # with one tensor for all torch would wait for its value
    return counted


def _is_left_out(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """A flag on the device that says whether this step changes nothing; None if `found_inf` is not set."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return None if found is None else found.bool()


def _replace(optimizer: torch.optim.Optimizer, tensors: list[Tensor], values: Iterable[Tensor]) -> None:
    """Give tensors their values after the step, unless it is left out."""
    is_left_out = _is_left_out(optimizer)
    for tensor, value in zip(tensors, values, strict=True):
        if is_left_out is None:
            tensor.copy_(value)
        else:
            torch.where(is_left_out, tensor, value, out=tensor)


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors))


def _multiply(tensors: list[Tensor], factors: Tensor) -> None:
    torch._foreach_mul_(tensors, list(factors.unbind()))
