"""Checks that the tensors of a file are those needed, before any is copied."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megdet.errors import InputError


def check_tensors(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, *, converts: bool = False
) -> None:
    """Refuse tensors whose names, shapes and dtypes are not exactly those of `wanted`, which may be on the meta device.

    Messages begin with `source`; with `converts` floating-point numbers may have another width. Raises InputError with
    the first tensor that does not fit.
    """
    for name, tensor in wanted.items():
        if name not in found:
            raise InputError(f"{source}: no tensor {name}, which the recipe asks for")
        own = found[name]
        if own.shape != tensor.shape:
            raise InputError(
                f"{source}: {name} has shape {tuple(own.shape)}, the recipe asks for {tuple(tensor.shape)}"
            )
        is_converted = converts and own.is_floating_point() and tensor.is_floating_point()
        if own.dtype != tensor.dtype and not is_converted:
            raise InputError(f"{source}: {name} is {_name(own)}, the recipe asks for {_name(tensor)}")
    left = sorted(set(found) - set(wanted))
    if left:
        raise InputError(f"{source}: tensor {left[0]} has no place in what the recipe asks for")


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights with a value that is not finite. Raises InputError with the first tensor that has one."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{source}: {name} has values that are not finite: such weights detect nothing")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
