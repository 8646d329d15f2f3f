"""Norm layers by name, and the exchange of the norm layers of any model."""

from collections.abc import Callable
from typing import Any

from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from megdet.distributed.world import SINGLE_LANE, Lane
from megdet.errors import InputError
from megdet.layers.batch_norm import (
    BatchNormAct,
    CrossDeviceBatchNorm,
    FrozenBatchNorm,
    FrozenBatchNormAct,
)
from megdet.recipe import NormKind

NormFactory = Callable[[int], nn.Module]
GROUP_NORM_GROUPS = 32


def norm_factory(kind: NormKind, bn_size: int, lane: Lane = SINGLE_LANE) -> NormFactory:
    """A function from channels to a norm layer; `batch` is frozen where `bn_size` is 0."""
    if kind == "none":
        return lambda _channels: nn.Identity()
    if kind == "group":
        return lambda channels: nn.GroupNorm(_groups_for(channels), channels)
    if kind == "batch" and bn_size:
        return lambda channels: CrossDeviceBatchNorm(channels, lane=lane)
    return FrozenBatchNorm


def convert_batch_norm(model: nn.Module, kind: NormKind, bn_size: int, lane: Lane = SINGLE_LANE) -> nn.Module:
    """Replace every batch norm of a model by the kind asked for, keeping its tensors, eps and fused activation.

    Returns the model, or the new layer if the model is itself a batch norm. Raises InputError for a batch norm of a
    class that is not known, whose extra behaviour would be lost.
    """
    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        return _converted(model, kind, bn_size, lane)
    for name, child in model.named_children():
        new = convert_batch_norm(child, kind, bn_size, lane)
        if new is not child:
            setattr(model, name, new)
    return model


def _converted(old: Any, kind: NormKind, bn_size: int, lane: Lane) -> nn.Module:
    fused = type(old) is BatchNormAct2d
    if type(old) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d):
        raise InputError(f"cannot convert the norm layer {type(old).__name__}: its own behaviour would be lost")
    if old.weight is None or old.running_mean is None:
        raise InputError(f"cannot convert a {type(old).__name__} without weights or without running statistics")
    new: nn.Module
    if kind == "none":
        new = nn.Sequential(old.drop, old.act) if fused else nn.Identity()
    elif kind == "group":
        norm = nn.GroupNorm(_groups_for(old.num_features), old.num_features, old.eps)
        norm.load_state_dict({"weight": old.weight, "bias": old.bias})
        new = nn.Sequential(norm, old.drop, old.act) if fused else norm
    else:
        if kind == "batch" and bn_size:
            new = (
                BatchNormAct(old.num_features, old.eps, old.act, old.drop, lane=lane)
                if fused
                else CrossDeviceBatchNorm(old.num_features, old.eps, lane=lane)
            )
        else:
            new = (
                FrozenBatchNormAct(old.num_features, old.eps, old.act, old.drop)
                if fused
                else FrozenBatchNorm(old.num_features, old.eps)
            )
        new.load_state_dict(old.state_dict())
    new.train(old.training)
    return new


def _groups_for(channels: int) -> int:
    """The largest number of groups up to 32 that divides the channels."""
    return next(groups for groups in range(min(GROUP_NORM_GROUPS, channels), 0, -1) if channels % groups == 0)
