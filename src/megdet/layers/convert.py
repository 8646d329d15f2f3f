"""Norm layers by name, and replacing the norm layers of any model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from megdet.architecture_parts import NormKind
from megdet.distributed.lane import SINGLE_LANE, Lane, lane_of_images
from megdet.errors import InputError
from megdet.layers.batch_norm import BatchNormAct, CrossDeviceBatchNorm
from megdet.layers.frozen_norm import FrozenBatchNorm, FrozenBatchNormAct

NormFactory = Callable[[int], nn.Module]
GROUP_NORM_GROUPS = 32


class GroupNorm(nn.GroupNorm):
    """As torch's, but one image of 1 x 1 pixels with a channel a group is the bias, as two are, and is not refused."""

    def forward(self, input: Float[Tensor, "images channels *_"]) -> Float[Tensor, "images channels *_"]:
        """Normalise each image over the channels of a group and its pixels."""
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def norm_factory(kind: NormKind, lane: Lane | None = SINGLE_LANE) -> NormFactory:
    """A function from channels to a norm layer; without a lane, `batch` has frozen statistics."""
    if kind == "none":
        return lambda _channels: nn.Identity()
    if kind == "group":
        return lambda channels: GroupNorm(_groups_for(channels), channels)
    if kind == "batch" and lane is not None:
        return lambda channels: CrossDeviceBatchNorm(channels, lane=lane)
    return FrozenBatchNorm


def convert_batch_norm(model: nn.Module, bn_size: int, *, images_per_device: int) -> nn.Module:
    """Replace every batch norm of a model by one over `bn_size` images, however many devices carry them.

    Three lines in any program, alone or under torchrun, with or without DistributedDataParallel:

        distributed.init_process_group("gloo")
        model = convert_batch_norm(model, bn_size=32, images_per_device=8)
        model = DistributedDataParallel(model)

    In each forward a process carries `images_per_device` images of one group, and bn_size / images_per_device
    neighbouring processes carry the group together. Every forward folds the plain mean over the groups of all processes
    into the running statistics with the layer's own momentum, so they are equal in all processes. Where gradients are
    accumulated, each forward of a step folds, and the statistics depend on how many a step has.
    DistributedDataParallel does not need to send its buffers: `forward_sync_buffers=False`, before torch 2.13
    `broadcast_buffers=False`.

    Every process must call it, after the process group is made, and all must call the model in training equally often.
    Parameters stay the same objects, so an optimizer may be made before or after; buffers, eps, momentum, mode and
    fused activations are kept, and a layer that is used twice stays one layer. With a `bn_size` of 0 the statistics,
    weights and biases are frozen. Returns the model, or the new layer if the model is itself a batch norm. Raises
    InputError if the images do not make whole groups, and for a batch norm of an unknown class.
    """
    if bn_size == 0:
        return exchange_norms(model, "frozen")
    return exchange_norms(model, "batch", lane_of_images(bn_size, images_per_device), folds_at_once=True)


def exchange_norms(
    model: nn.Module, kind: NormKind, lane: Lane | None = SINGLE_LANE, *, folds_at_once: bool = False
) -> nn.Module:
    """Replace every batch norm of a model by the kind asked for, keeping its parameters, eps and fused activation.

    Without a lane, `batch` has frozen statistics. Returns the model, or the new layer if the model is itself a batch
    norm. Raises InputError for a batch norm of an unknown class, whose extra behaviour would be lost.
    """
    new = {
        old: _exchanged(old, kind, lane, folds_at_once)
        for old in model.modules()
        if isinstance(old, nn.modules.batchnorm._BatchNorm)
    }
    for module in list(model.modules()):
        for name, child in module._modules.items():  # named_children lists a layer that is used twice only once
            if child in new:
                module.register_module(name, new[child])
    found: nn.Module = new[model] if isinstance(model, nn.modules.batchnorm._BatchNorm) else model
    return found


def _exchanged(old: Any, kind: NormKind, lane: Lane | None, folds_at_once: bool) -> nn.Module:
    fused = type(old) is BatchNormAct2d
    if type(old) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d):
        raise InputError(f"cannot convert the norm layer {type(old).__name__}: its own behaviour would be lost")
    if old.weight is None or old.running_mean is None:
        raise InputError(f"cannot convert a {type(old).__name__} without weights or without running statistics")
    if folds_at_once and old.momentum is None:
        raise InputError(f"cannot convert a {type(old).__name__} of momentum None: give it a number, such as 0.1")
    activation = (old.act, old.drop) if fused else ()
    new: Any
    if kind == "none":
        new = nn.Sequential(old.drop, old.act) if fused else nn.Identity()
    elif kind == "group":
        norm = GroupNorm(_groups_for(old.num_features), old.num_features, old.eps)
        norm.weight, norm.bias = old.weight, old.bias
        new = nn.Sequential(norm, old.drop, old.act) if fused else norm
    elif kind == "batch" and lane is not None:
        momentum = old.momentum if folds_at_once else None
        layer = partial(BatchNormAct if fused else CrossDeviceBatchNorm, lane=lane, fold_momentum=momentum)
        new = layer(old.num_features, old.eps, *activation).to(old.running_mean)
        new.load_state_dict(old.state_dict())
        new.weight, new.bias = old.weight, old.bias
    else:
        new = (FrozenBatchNormAct if fused else FrozenBatchNorm)(old.num_features, old.eps, *activation)
        new.to(old.running_mean).load_state_dict(old.state_dict())
    new.train(old.training)
    made: nn.Module = new
    return made


def _groups_for(channels: int) -> int:
    """The largest number of groups up to 32 that divides the channels."""
    return next(groups for groups in range(min(GROUP_NORM_GROUPS, channels), 0, -1) if channels % groups == 0)
