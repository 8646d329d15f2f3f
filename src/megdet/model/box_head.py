"""The second stage (Fast R-CNN on a pyramid): which class each proposal shows, and a better box for it."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture import BoxHead as BoxHeadRecipe
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.convert import NormFactory
from megdet.layers.recompute import plainly
from megdet.model.roi_head import DELTA_WEIGHTS, RoiHead
from megdet.ops.boxes import Weights
from megdet.ops.linear import linear


class BoxHead(RoiHead):
    """Two fully connected layers, a classifier (background last) and a box regressor for every class or one for all.

    The first layer takes the pooled features bin by bin, each with its channels.
    """

    recipe: BoxHeadRecipe

    def __init__(
        self,
        recipe: BoxHeadRecipe,
        in_channels: int,
        num_classes: int,
        norm: NormFactory,
        *,
        delta_weights: Weights = DELTA_WEIGHTS,
        is_class_agnostic: bool = False,
    ) -> None:
        super().__init__(recipe, num_classes, delta_weights=delta_weights, is_class_agnostic=is_class_agnostic)
        bias = recipe.norm == "none"
        self.fc1 = nn.Linear(in_channels * recipe.pool_size**2, recipe.channels, bias=bias)
        self.norm1 = norm(recipe.channels)
        self.fc2 = nn.Linear(recipe.channels, recipe.channels, bias=bias)
        self.norm2 = norm(recipe.channels)
        self.classes = nn.Linear(recipe.channels, num_classes + 1)
        self.deltas = nn.Linear(recipe.channels, 4 * self.num_regressed)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for layer in (self.fc1, self.fc2, self.classes, self.deltas):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        pool: Callable[[], Float[Tensor, "all_rois bins channels"]],
        is_valid: Bool[Tensor, "images rois"],
        recompute: Callable[..., Any] = plainly,
    ) -> tuple[Float[Tensor, "images rois classes_and_background"], Float[Tensor, "images rois regressed 4"]]:
        """Class logits, background last, and the deltas of every class, or of all; rows of invalid RoIs mean nothing.

        Args:
            pool: makes the pooled features of all RoIs, image by image.
            is_valid: which RoIs stand for something.
            recompute: `recompute(function)` may call `pool` again in the backward instead of keeping what it made.
        """
        images, count = is_valid.shape

        def pooled_through_fc1() -> Tensor:  # together, or the pooled features would be kept as what fc1 was given
            return linear(pool().flatten(1), self.fc1.weight, self.fc1.bias)

        hidden = F.relu(normalized_rois(self.norm1, recompute(pooled_through_fc1), is_valid))
        hidden = F.relu(normalized_rois(self.norm2, linear(hidden, self.fc2.weight, self.fc2.bias), is_valid))
        logits = self.classes(hidden).reshape(images, count, self.num_classes + 1)
        deltas = self.deltas(hidden).reshape(images, count, self.num_regressed, 4)
        return logits, deltas


def normalized_rois(
    norm: nn.Module, features: Float[Tensor, "all_rois channels *map"], is_valid: Bool[Tensor, "images rois"]
) -> Float[Tensor, "all_rois channels *map"]:
    """Through a norm layer; padded RoIs must not enter batch statistics."""
    if isinstance(norm, CrossDeviceBatchNorm):
        return norm(features, is_valid.flatten())  # type: ignore[no-any-return]
    return norm(features)  # type: ignore[no-any-return]
