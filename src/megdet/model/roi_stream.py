"""From pooled features to the output of the first fully connected layer, for the RoI and the regions around it."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from megdet.architecture_heads import BoxHead as BoxHeadRecipe
from megdet.layers.convert import NormFactory
from megdet.model.roi_blocks import BLOCKS
from megdet.ops.linear import linear


def roi_convolutions(recipe: BoxHeadRecipe, in_channels: int, norm: NormFactory) -> nn.ModuleList:
    """The convolutions on pooled maps that a recipe asks for."""
    widths = [in_channels, *[recipe.convolution_channels] * recipe.convolutions]
    block, bias = BLOCKS[recipe.block], recipe.norm == "none"
    return nn.ModuleList(block(before, after, norm=norm, bias=bias) for before, after in pairwise(widths))


def num_inputs(recipe: BoxHeadRecipe, in_channels: int) -> int:
    """Values of a RoI that the first fully connected layer takes."""
    return (recipe.convolution_channels if recipe.convolutions else in_channels) * recipe.pool_size**2


def through_first_layer(
    convolutions: nn.ModuleList,
    layer: nn.Linear,
    pool: Callable[[], Float[Tensor, "pooled_rois bins channels"]],
    is_valid: Bool[Tensor, "images rois"],
    recompute: Callable[..., Any],
    *,
    pool_size: int,
    scales: int,
) -> Float[Tensor, "all_rois outputs"]:
    """Pooled features through all convolutions, then, bin by bin, through a layer; no norm or activation follows.

    Args:
        convolutions: convolutions on the pooled map; may be empty.
        layer: the fully connected layer, on the output of the convolutions.
        pool: makes the pooled features of all RoIs, image by image; with two scales, all from the first come first.
        is_valid: which RoIs are not padding.
        recompute: calls a function and keeps only its input and output for the backward.
        pool_size: bins along each edge.
        scales: 2 takes the maximum over two scales (the maxout of Ren et al., 2015): after the first convolution, whose
            weights they share, or at once if there is no convolution.
    """
    if not convolutions:

        def pooled_through_layer() -> Tensor:  # one function, or the pooled features would be kept as its input
            return linear(_largest(pool(), scales).flatten(1), layer.weight, layer.bias)

        return recompute(pooled_through_layer)  # type: ignore[no-any-return]  # `recompute` has no types

    def pooled_through(block: nn.Module) -> Tensor:
        pooled = pool()
        maps = pooled.reshape(pooled.shape[0], pool_size, pool_size, pooled.shape[2]).permute(0, 3, 1, 2)
        return _largest(block(maps, is_valid.repeat(scales, 1)), scales)

    first, *others = convolutions
    maps = recompute(pooled_through, first)
    for block in others:
        maps = recompute(block, maps, is_valid)
    return linear(maps.permute(0, 2, 3, 1).flatten(1), layer.weight, layer.bias)


def _largest(rows: Tensor, scales: int) -> Tensor:
    if scales == 1:
        return rows
    one, other = rows.reshape(scales, rows.shape[0] // scales, *rows.shape[1:])
    return torch.maximum(one, other)


class RoiStream(nn.Module):
    """The layers for the features of one region around a RoI, or of the whole image, with weights of their own.

    The output is added to the first layer's output for the RoI itself, as if the features of all regions were
    concatenated into one input of that layer.
    """

    def __init__(self, recipe: BoxHeadRecipe, in_channels: int, norm: NormFactory, *, scales: int) -> None:
        super().__init__()
        self.pool_size, self.scales = recipe.pool_size, scales
        self.convolutions = roi_convolutions(recipe, in_channels, norm)
        self.fc1 = nn.Linear(num_inputs(recipe, in_channels), recipe.channels, bias=False)

    def forward(
        self,
        pool: Callable[[], Float[Tensor, "pooled_rois bins channels"]],
        is_valid: Bool[Tensor, "images rois"],
        recompute: Callable[..., Any],
    ) -> Float[Tensor, "all_rois outputs"]:
        """The term to add for each RoI; the arguments are those of `through_first_layer`."""
        return through_first_layer(
            self.convolutions, self.fc1, pool, is_valid, recompute, pool_size=self.pool_size, scales=self.scales
        )
