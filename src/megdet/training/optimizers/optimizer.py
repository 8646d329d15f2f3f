"""The optimizer of a recipe, its state by name, and the moving average of the weights."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.recipe import Optimizer as OptimizerRecipe
from megdet.training.optimizers.layerwise import Lamb, Lars
from megdet.training.optimizers.parts import module_of

_MOMENTUM = "momentum_buffer"
_OTHER_STATE = ("exp_avg", "exp_avg_sq", "step")


def make_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters; each module has a group of weights and one of norms and biases.

    Norm layers and biases have no decay if the recipe says so, and no trust ratio in LARS and LAMB.
    """
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for path, module in model.named_modules():
        is_norm = isinstance(module, (CrossDeviceBatchNorm, nn.GroupNorm, nn.LayerNorm))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                key = module_of(path or name), is_norm or name == "bias"
                members.setdefault(key, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": own,
            "module": module,
            "adapts": not is_exempt,
            "weight_decay": 0.0 if is_exempt and not recipe.decay_norm_and_bias else recipe.weight_decay,
        }
        for (module, is_exempt), own in members.items()
    ]
    match recipe.kind:
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=True)
        case "lars":
            return Lars(groups, recipe.momentum, recipe.trust_coefficient)
        case "lamb":
            return Lamb(groups, recipe.betas, recipe.eps)


def step_unless(optimizer: torch.optim.Optimizer, unless: Bool[Tensor, ""]) -> None:
    """Make a step, or change nothing if the flag `unless` on the device is true; does not wait for the device."""
    is_first = not optimizer.state
    optimizer.found_inf = unless.float()  # type: ignore[attr-defined]  # where torch's fused kernels look for it
    optimizer.step()
    if is_first:  # torch's SGD leaves new momentum uninitialised if it makes no step
        for state in optimizer.state.values():
            if _MOMENTUM in state:
                state[_MOMENTUM].masked_fill_(unless, 0.0)


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of the optimizer for every parameter that has moved, for a checkpoint.

    Momentum has the name of its parameter; other kinds of state (Adam's moments and steps) have their own name
    appended.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            if tensor is not None:
                found[name if kind == _MOMENTUM else f"{name}.{kind}"] = tensor
    return found


def restore_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Restore what `state_by_name` returned."""
    for name, parameter in model.named_parameters():
        keys = {_MOMENTUM: name, **{kind: f"{name}.{kind}" for kind in _OTHER_STATE}}
        for kind, key in keys.items():
            if key in saved:
                optimizer.state[parameter][kind] = like_parameter(saved[key], parameter)


def state_layout(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Names, shapes and dtypes of what `state_by_name` returns after any step, as tensors without values."""
    steps: dict[str, torch.dtype] = {}
    match optimizer:
        case torch.optim.SGD():
            kinds = [_MOMENTUM] if optimizer.defaults["momentum"] else []
        case Lars():
            kinds = [_MOMENTUM]
        case torch.optim.AdamW():
            kinds, steps = ["exp_avg", "exp_avg_sq"], {"step": torch.float32}  # as torch counts in its fused form
        case Lamb():
            kinds, steps = ["exp_avg", "exp_avg_sq"], {"step": torch.float64}
        case _:
            raise TypeError(f"the state of a {type(optimizer).__name__} is not known")
    layout: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for kind in kinds:
                key = name if kind == _MOMENTUM else f"{name}.{kind}"
                layout[key] = torch.empty_like(parameter, device="meta", requires_grad=False)
            for kind, dtype in steps.items():
                layout[f"{name}.{kind}"] = torch.empty((), dtype=dtype, device="meta")
    return layout


def like_parameter(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy on the device of a parameter, and in its memory format if it has the same shape."""
    copy = tensor.to(parameter.device, copy=True)
    return torch.empty_like(parameter).copy_(copy) if copy.shape == parameter.shape else copy
