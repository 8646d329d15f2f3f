"""The stages of a backbone, counted from 1 (the stem): which are frozen, and which have deformable convolutions."""

from typing import Any

from torch import nn

from megdet.architecture_parts import Backbone as BackboneRecipe
from megdet.errors import InputError
from megdet.layers.convert import exchange_norms
from megdet.layers.deformable import DeformableConv2d


def freeze_stages(body: nn.Module, stages: int) -> None:
    """Freeze the parameters and batch statistics of the first stages of timm's feature network.

    Raises InputError if the stages are not known.
    """
    if not stages:
        return
    for name, module, stage in _by_stage(body, f"frozen_stages {stages}", "0"):
        if stage <= stages:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                body.set_submodule(name, exchange_norms(module, "frozen"))


def deform_stages(body: nn.Module, recipe: BackboneRecipe) -> None:
    """Replace the 3 x 3 convolutions of the recipe's deformable stages by deformable ones with the same weights.

    Raises InputError for a stage without 3 x 3 convolutions, or with one that is not a plain zero-padded convolution.
    """
    if not recipe.deformable_stages:
        return
    key = f"deformable_stages {list(recipe.deformable_stages)}"
    found = [
        (name, module, stage)
        for name, module, stage in _by_stage(body, key, "[]")
        if stage in recipe.deformable_stages and isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    for missing in sorted({*recipe.deformable_stages} - {stage for _, _, stage in found}):
        raise InputError(f"model.backbone.{key}: stage {missing} of {recipe.name} has no 3 x 3 convolution")
    for name, module, _ in found:
        if type(module) is not nn.Conv2d or isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise InputError(
                f"model.backbone.{key}: {name} of {recipe.name} is not a plain convolution with zero padding "
                f"({type(module).__name__}): choose another backbone"
            )
        body.set_submodule(name, DeformableConv2d(module, modulated=recipe.deformable_modulated))


def _by_stage(body: Any, key: str, none: str) -> list[tuple[str, nn.Module, int]]:
    """Every module with its name and stage; an error says to set the recipe key `key` to `none`."""
    modules = list(body.named_modules())
    names = [name for name, _ in modules]
    ends = []
    for info in body.feature_info.info:
        module = info["module"].replace(".", "_") if info["module"] not in names else info["module"]
        inside = [i for i, name in enumerate(names) if name == module or name.startswith(f"{module}.")]
        if not inside:
            raise InputError(f"model.backbone.{key}: the stages of this backbone are not known; set it to {none}")
        ends.append(inside[-1])
    return [
        (name, module, 1 + sum(end < position for end in ends))
        for position, (name, module) in enumerate(modules)
        if name
    ]
