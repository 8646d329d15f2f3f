"""The second stage (Fast R-CNN on a pyramid): which class each proposal shows, and a better box for it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture_heads import BoxHead as BoxHeadRecipe
from megdet.layers.convert import NormFactory, norm_factory
from megdet.layers.recompute import plainly
from megdet.model.roi_blocks import normalized_rois
from megdet.model.roi_head import DELTA_WEIGHTS, RoiHead
from megdet.model.roi_stream import RoiStream, num_inputs, roi_convolutions, through_first_layer
from megdet.ops.boxes import Weights
from megdet.ops.linear import linear

Pool = Callable[[], Float[Tensor, "pooled_rois bins channels"]]
IMAGE = "image"
"""The name of the features pooled from the whole image, among the regions around a RoI."""


class BoxHead(RoiHead):
    """Fully connected layers, a classifier (background last) and a box regressor for every class or one for all.

    The first layer takes the pooled features bin by bin, each bin with its channels; convolutions may come before it.
    Norms follow the convolutions or, without convolutions, the fully connected layers. Features of regions around the
    RoI and of the whole image are added in the first layer, each with weights of its own.
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
        self.rois_share_statistics = recipe.norm == "batch"
        self.scales = 2 if recipe.maxout else 1
        self.convolutions = roi_convolutions(recipe, in_channels, norm)
        layer_norm, bias = (norm_factory("none"), True) if recipe.convolutions else (norm, recipe.norm == "none")
        inputs = num_inputs(recipe, in_channels)
        for number in range(1, recipe.layers + 1):
            self.add_module(f"fc{number}", nn.Linear(inputs, recipe.channels, bias=bias))
            self.add_module(f"norm{number}", layer_norm(recipe.channels))
            inputs = recipe.channels
        self.classes = nn.Linear(recipe.channels, num_classes + 1)
        self.deltas = nn.Linear(recipe.channels, 4 * self.num_regressed)
        self.around = nn.ModuleDict(
            {name: RoiStream(recipe, in_channels, norm, scales=self.scales) for name in recipe.regions}
        )
        if recipe.global_context:
            self.around[IMAGE] = RoiStream(recipe, in_channels, norm, scales=1)
        self._start()

    def _start(self) -> None:
        """Draw random weights; the first layers of all regions are initialised as one layer of all their inputs."""
        for module in (*self.convolutions.modules(), *self.around.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for layer, _ in self._connected():
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        first_layers = [stream.fc1 for stream in self._streams().values()]
        for layer in first_layers:
            nn.init.kaiming_uniform_(layer.weight, a=1)
        for layer in (self._connected()[0][0], *first_layers) if first_layers else ():
            with torch.no_grad():
                layer.weight.div_(math.sqrt(1 + len(first_layers)))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def _connected(self) -> list[tuple[Any, Any]]:
        """The fully connected layers and their norms."""
        numbers = range(1, self.recipe.layers + 1)
        return [(getattr(self, f"fc{number}"), getattr(self, f"norm{number}")) for number in numbers]

    def _streams(self) -> dict[str, Any]:
        """The pooled inputs of the first layer, by name."""
        return dict(self.around.items())

    def forward(
        self,
        pool: Pool,
        is_valid: Bool[Tensor, "images rois"],
        recompute: Callable[..., Any] = plainly,
        around: Mapping[str, Pool] | None = None,
    ) -> tuple[Float[Tensor, "images rois classes_and_background"], Float[Tensor, "images rois regressed 4"]]:
        """Class logits, background last, and deltas for each class or for all; rows of invalid RoIs are meaningless.

        Args:
            pool: makes the pooled features of all RoIs, image by image; with maxout first from the finer, then from the
                coarser level.
            is_valid: which RoIs are not padding.
            recompute: `recompute(function)` may call `pool` again in the backward instead of keeping its output.
            around: makes the features of each region around the RoIs, by name, and of the whole images, one an image.
        """
        images, count = is_valid.shape
        (first, first_norm), *others = self._connected()
        keys = {"pool_size": self.recipe.pool_size, "scales": self.scales}
        hidden = through_first_layer(self.convolutions, first, pool, is_valid, recompute, **keys)
        for name, stream in self._streams().items():
            assert around is not None, "the detector pools all inputs that the recipe asks for"
            if name == IMAGE:
                joined = stream(around[name], is_valid.new_ones(images, 1), recompute).unsqueeze(1)
            else:
                joined = stream(around[name], is_valid, recompute).reshape(images, count, self.recipe.channels)
            hidden = (hidden.reshape(images, count, self.recipe.channels) + joined).flatten(0, 1)
        hidden = F.relu(normalized_rois(first_norm, hidden, is_valid))
        for layer, norm in others:
            hidden = F.relu(normalized_rois(norm, linear(hidden, layer.weight, layer.bias), is_valid))
        logits, deltas = (linear(hidden, layer.weight, layer.bias) for layer in (self.classes, self.deltas))
        logits = logits.reshape(images, count, self.num_classes + 1)
        deltas = deltas.reshape(images, count, self.num_regressed, 4)
        return logits, deltas
