"""The two halves of a mini-batch, and scalar products of gradients by module of the detector.

A half is half of the plan's groups, on any ranks, so it does not depend on the devices. AGVM (`agvm.py`) and the
gradient noise scale (`noise_scale.py`) compare the gradients of the two halves.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

Parts = dict[str, list[int]]
"""Module of the detector -> the places of its parameters in the list of all trained ones."""


def num_in_first_half(groups: Iterable[int], num_groups: int) -> int:
    """How many of a rank's groups, given by their numbers, are in the first half of the step's groups.

    With an odd number of groups the first half has one more.
    """
    return sum(2 * group < num_groups for group in groups)


def module_of(name: str) -> str:
    """The module of the detector that has a parameter: the first part of its name."""
    return name.split(".", 1)[0]


def parts_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Parts:
    """The modules in the order of the detector, each with the places of its parameters in `parameters`."""
    places = {parameter: place for place, parameter in enumerate(parameters)}
    parts: Parts = {}
    for name, parameter in model.named_parameters():
        if parameter in places:
            parts.setdefault(module_of(name), []).append(places[parameter])
    return parts


def chosen(tensors: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """The tensors of one module."""
    return [tensors[place] for place in places]


def dot(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """The scalar product of two lists of tensors, added up in float64, without waiting for the device."""
    products = torch._foreach_mul(list(ours), list(theirs))
    return torch.stack([product.sum(dtype=torch.float64) for product in products]).sum()


def dots(parts: Parts, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """The scalar product of two gradients module by module, (modules,)."""
    return torch.stack([dot(chosen(ours, places), chosen(theirs, places)) for places in parts.values()])
