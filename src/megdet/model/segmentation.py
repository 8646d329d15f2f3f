"""Segmentation supervision: a branch that learns the class of every cell and feeds its features back to the pyramid.

After StuffNet (Brahmbhatt et al., 2017) and Mao et al. ("What Can Help Pedestrian Detection?", CVPR 2017), who feed the
features of such a branch back into a detector. Differs from theirs: it works on a pyramid, in the form of HTC's
semantic branch (Chen et al., 2019, Sec. 3.3), and adds its features to the levels instead of concatenating channels.
Since RoIAlign is linear, this adds them to the features of every RoI; the RPN gets them too.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture_parts import Segmentation as SegmentationRecipe
from megdet.layers.convert import NormFactory
from megdet.ops.losses import mean_per_image
from megdet.ops.semantic_targets import semantic_targets
from megdet.structures import Targets

GRID_LEVEL = 1
"""The level of the pyramid on whose grid the branch works: P3."""


class Segmentation(nn.Module):
    """The mean of all levels on one grid, 3 x 3 convolutions, and two 1 x 1: to class logits and back to the pyramid.

    Args:
        recipe: the section of the branch.
        channels: channels of every level.
        strides: strides of the levels.
        num_classes: without the background.
        norm: makes the norm layer after each 3 x 3 convolution.
    """

    def __init__(
        self,
        recipe: SegmentationRecipe,
        channels: int,
        strides: tuple[int, ...],
        num_classes: int,
        norm: NormFactory,
    ) -> None:
        super().__init__()
        self.recipe, self.strides, self.num_classes = recipe, strides, num_classes
        bias = recipe.norm == "none"
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=bias), norm(channels))
            for _ in range(recipe.convolutions)
        )
        self.classes = nn.Conv2d(channels, num_classes + 1, 1)
        self.feedback = nn.Conv2d(channels, channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.classes.weight, std=0.01)

    @property
    def stride(self) -> int:
        """The stride of the map of class logits."""
        return self.strides[GRID_LEVEL]

    def forward(
        self, pyramid: list[Float[Tensor, "images channels _ _"]]
    ) -> tuple[list[Float[Tensor, "images channels _ _"]], Float[Tensor, "images height width classes_and_background"]]:
        """The levels with the branch's features added, and the class logits, background last."""
        height, width = pyramid[GRID_LEVEL].shape[2:]
        total = torch.zeros_like(pyramid[GRID_LEVEL])
        for level, stride in zip(pyramid, self.strides, strict=True):  # a stack of all would take five times the memory
            total = total + resized(level, stride, self.stride, (height, width))
        hidden = total / len(pyramid)
        for convolution in self.convolutions:
            hidden = F.relu(convolution(hidden))
        seen = self.feedback(hidden)
        told = [
            level + resized(seen, self.stride, stride, (level.shape[2], level.shape[3]))
            for level, stride in zip(pyramid, self.strides, strict=True)
        ]
        return told, self.classes(hidden).permute(0, 2, 3, 1)

    def loss(
        self,
        logits: Float[Tensor, "images height width classes_and_background"],
        targets: Targets,
        sizes: Int64[Tensor, "images 2"],
    ) -> Float[Tensor, " images"]:
        """Cross-entropy of each image: the mean over the image's cells, without padding (Eq. 1), times the weight."""
        logits = logits.to(targets.boxes.dtype)
        grid = (logits.shape[1], logits.shape[2])
        wanted = semantic_targets(targets, sizes, grid, self.stride, self.num_classes).flatten(1)
        is_own = wanted >= 0
        terms = F.cross_entropy(logits.flatten(0, 2), wanted.clamp(min=0).flatten(), reduction="none")
        return self.recipe.loss_weight * mean_per_image(terms.view_as(wanted) * is_own, is_own)


def resized(
    maps: Float[Tensor, "images channels _ _"], stride: int, wanted: int, size: tuple[int, int]
) -> Float[Tensor, "images channels _ _"]:
    """A map resized to another stride: means over cells for a coarser grid, repeated cells for a finer one.

    Unlike bilinear interpolation, both have a deterministic backward on a GPU.
    """
    if wanted > stride:
        maps = F.avg_pool2d(maps, wanted // stride, ceil_mode=True, count_include_pad=False)
    elif wanted < stride:
        maps = F.interpolate(maps, scale_factor=stride // wanted, mode="nearest")[:, :, : size[0], : size[1]]
    return maps if maps.shape[2:] == size else F.interpolate(maps, size=size, mode="nearest")
