"""Blocks on the pooled map of each RoI: convolutions of two kinds, and norms that exclude padded RoIs.

Convolutions on pooled maps before the fully connected layers are the Networks on Convolutional feature maps of Ren et
al. (2015).
"""

from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture_heads import INCEPTION_BRANCHES
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.convert import NormFactory


def normalized_rois(
    norm: nn.Module, features: Float[Tensor, "all_rois channels *map"], is_valid: Bool[Tensor, "images rois"]
) -> Float[Tensor, "all_rois channels *map"]:
    """The features after a norm layer, whose batch statistics exclude padded RoIs."""
    if isinstance(norm, CrossDeviceBatchNorm):
        return norm(features, is_valid.flatten())  # type: ignore[no-any-return]  # a module of torch's has no types
    return norm(features)  # type: ignore[no-any-return]  # the same


class Convolution(nn.Sequential):
    """A convolution that keeps the size of the map, its norm, and a ReLU."""

    def __init__(self, in_channels: int, channels: int, norm: NormFactory, *, bias: bool, kernel: int = 3) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=bias), norm(channels))

    def forward(  # type: ignore[override]  # takes which RoIs are valid, unlike nn.Sequential
        self, maps: Float[Tensor, "all_rois _ height width"], is_valid: Bool[Tensor, "images rois"]
    ) -> Float[Tensor, "all_rois channels height width"]:
        """The maps of all RoIs, image by image; batch statistics exclude invalid RoIs."""
        convolution, norm = self
        return F.relu(normalized_rois(norm, convolution(maps), is_valid))


class Inception(nn.Module):
    """Four branches over the same map, whose outputs are joined: 1 x 1, 3 x 3, two times 3 x 3, and a mean (Szegedy).

    The branches are those of Inception with batch norm (Ioffe and Szegedy, 2015), each with a quarter of the channels:
    the 3 x 3 ones begin with a 1 x 1 convolution, the one of the mean over 3 x 3 ends with one. Differs from the
    paper's [36] (Inception-v4), whose blocks are for larger maps: 7 x 7 bins have no room for its 7 x 1 convolutions.
    """

    def __init__(self, in_channels: int, channels: int, norm: NormFactory, *, bias: bool) -> None:
        super().__init__()
        width = channels // INCEPTION_BRANCHES
        point = partial(Convolution, in_channels, width, norm, bias=bias, kernel=1)
        square = partial(Convolution, width, width, norm, bias=bias)
        self.branches = nn.ModuleList(
            nn.ModuleList(branch)
            for branch in ([point()], [point(), square()], [point(), square(), square()], [point()])
        )

    def forward(
        self, maps: Float[Tensor, "all_rois _ height width"], is_valid: Bool[Tensor, "images rois"]
    ) -> Float[Tensor, "all_rois channels height width"]:
        """The maps of all RoIs, image by image; batch statistics exclude invalid RoIs."""
        means = F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)
        found = []
        for hidden, branch in zip((maps, maps, maps, means), self.branches, strict=True):
            for convolution in cast("nn.ModuleList", branch):
                hidden = convolution(hidden, is_valid)
            found.append(hidden)
        return torch.cat(found, 1)


BLOCKS: dict[str, Any] = {"convolution": Convolution, "inception": Inception}
"""The kinds of `model.box_head.block`."""
