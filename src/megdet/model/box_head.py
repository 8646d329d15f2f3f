"""The second stage (Fast R-CNN on a pyramid): which class each proposal shows, and a better box for it."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture import BoxHead as BoxHeadRecipe
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.convert import NormFactory, norm_factory
from megdet.layers.recompute import plainly
from megdet.model.roi_head import DELTA_WEIGHTS, RoiHead
from megdet.ops.boxes import Weights
from megdet.ops.linear import linear


class BoxHead(RoiHead):
    """Fully connected layers, a classifier (background last) and a box regressor for every class or one for all.

    The first layer takes the pooled features bin by bin, each with its channels; 3 x 3 convolutions may come before.
    Norms follow the convolutions, or where there are none the fully connected layers.
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
        self.convolutions = nn.ModuleList()
        for _ in range(recipe.convolutions):
            width = recipe.convolution_channels
            self.convolutions.append(nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=bias), norm(width)))
            in_channels = width
        if recipe.convolutions:
            bias, norm = True, norm_factory("none")
        num_inputs = in_channels * recipe.pool_size**2
        for number in range(1, recipe.layers + 1):
            self.add_module(f"fc{number}", nn.Linear(num_inputs, recipe.channels, bias=bias))
            self.add_module(f"norm{number}", norm(recipe.channels))
            num_inputs = recipe.channels
        self.classes = nn.Linear(recipe.channels, num_classes + 1)
        self.deltas = nn.Linear(recipe.channels, 4 * self.num_regressed)
        for module in self.convolutions.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for layer, _ in self._connected():
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def _connected(self) -> list[tuple[Any, Any]]:
        """The fully connected layers and their norms."""
        numbers = range(1, self.recipe.layers + 1)
        return [(getattr(self, f"fc{number}"), getattr(self, f"norm{number}")) for number in numbers]

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
        (first, first_norm), *others = self._connected()

        def pooled_through_first() -> Tensor:  # together, or the pooled features would be kept as what it was given
            return linear(pool().flatten(1), first.weight, first.bias)

        if self.recipe.convolutions:
            hidden = linear(self._convolved(pool, is_valid, recompute), first.weight, first.bias)
        else:
            hidden = recompute(pooled_through_first)
        hidden = F.relu(normalized_rois(first_norm, hidden, is_valid))
        for layer, norm in others:
            hidden = F.relu(normalized_rois(norm, linear(hidden, layer.weight, layer.bias), is_valid))
        logits = self.classes(hidden).reshape(images, count, self.num_classes + 1)
        deltas = self.deltas(hidden).reshape(images, count, self.num_regressed, 4)
        return logits, deltas

    def _convolved(
        self,
        pool: Callable[[], Float[Tensor, "all_rois bins channels"]],
        is_valid: Bool[Tensor, "images rois"],
        recompute: Callable[..., Any],
    ) -> Float[Tensor, "all_rois inputs"]:
        """The pooled features through all convolutions, bin by bin; of each one only the result may be kept."""
        edge = self.recipe.pool_size

        def through(block: Any, maps: Tensor) -> Tensor:
            convolution, norm = block
            return F.relu(normalized_rois(norm, convolution(maps), is_valid))

        def pooled_through(block: Any) -> Tensor:
            pooled = pool()
            return through(block, pooled.reshape(len(pooled), edge, edge, pooled.shape[2]).permute(0, 3, 1, 2))

        first, *others = self.convolutions
        maps = recompute(pooled_through, first)
        for block in others:
            maps = recompute(through, block, maps)
        return maps.permute(0, 2, 3, 1).flatten(1)  # type: ignore[no-any-return]  # `recompute` has no types


def normalized_rois(
    norm: nn.Module, features: Float[Tensor, "all_rois channels *map"], is_valid: Bool[Tensor, "images rois"]
) -> Float[Tensor, "all_rois channels *map"]:
    """Through a norm layer; padded RoIs must not enter batch statistics."""
    if isinstance(norm, CrossDeviceBatchNorm):
        return norm(features, is_valid.flatten())  # type: ignore[no-any-return]
    return norm(features)  # type: ignore[no-any-return]
