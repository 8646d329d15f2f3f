"""Folds batch norms into the convolutions before them, for deployment: the same detections in less time."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from megdet.layers.batch_norm import BatchNormAct, CrossDeviceBatchNorm
from megdet.layers.frozen_norm import FrozenBatchNorm, FrozenBatchNormAct
from megdet.model.detector import Detector

_NORMS = (CrossDeviceBatchNorm, FrozenBatchNorm)
_SMALL = 64


@torch.no_grad()
def fold_batch_norms(model: Detector) -> int:
    """Fold in place every batch norm that is the only user of a convolution's output; returns their number.

    The detector must be in evaluation mode. Results differ by rounding only; afterwards the model cannot be trained or
    saved as a checkpoint. One forward of a small image shows which norm follows which convolution.
    """
    if model.training:
        raise ValueError("fold_batch_norms: the running statistics are those of evaluation; call model.eval() first")
    pairs = _pairs(model)
    names = {module: name for name, module in model.named_modules()}
    for convolution, norm in pairs:
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        convolution.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        convolution.bias = nn.Parameter(bias, requires_grad=False)
        activation = norm.act if isinstance(norm, (BatchNormAct, FrozenBatchNormAct)) else nn.Identity()
        model.set_submodule(names[norm], activation)
    return len(pairs)


def _pairs(model: Detector) -> list[tuple[nn.Conv2d, Any]]:
    """Pairs of a convolution and the norm that is the only user of its output."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    taken: Counter[int] = Counter()
    found: dict[int, tuple[nn.Conv2d, Any]] = {}
    runs: Counter[nn.Module] = Counter()

    def before(module: nn.Module, given: tuple[Any, ...]) -> None:
        for tensor in given:
            is_norm = isinstance(module, _NORMS)
            if id(tensor) in made and (is_norm or not list(module.children())):
                taken[id(tensor)] += 1
                if is_norm:
                    found[id(tensor)] = made[id(tensor)][0], module

    def after(module: nn.Module, _given: Any, output: Any) -> None:
        runs[module] += 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = module, output  # kept alive, so that no other tensor gets its address

    hooks = [module.register_forward_pre_hook(before) for module in model.modules()]
    hooks += [module.register_forward_hook(after) for module in model.modules()]
    parameter = next(model.parameters())
    small = torch.zeros(1, 3, _SMALL, _SMALL, device=parameter.device, dtype=parameter.dtype)
    try:
        model.features(small)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (convolution, norm)
        for key, (convolution, norm) in found.items()
        if taken[key] == 1 and runs[convolution] == runs[norm] == 1
    ]
