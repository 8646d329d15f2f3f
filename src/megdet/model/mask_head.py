"""The mask branch of the second stage (Mask R-CNN, Sec. 3): which part of a box its object fills, for every class."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture_heads import BoxHead as BoxHeadRecipe
from megdet.architecture_heads import MaskHead as MaskHeadRecipe
from megdet.layers.convert import NormFactory
from megdet.layers.recompute import plainly
from megdet.model.pooling import RoiPooling
from megdet.model.proposals import filled_columns
from megdet.model.roi_blocks import normalized_rois
from megdet.model.roi_head import SampledRois
from megdet.ops.linear import linear
from megdet.ops.losses import mean_per_image
from megdet.ops.mask_targets import mask_targets
from megdet.ops.roi_align import FeatureTable
from megdet.structures import BatchDetections, Masks


class MaskHead(nn.Module):
    """Convolutions, a transposed convolution that doubles height and width, and a mask for every class.

    Only the mask of a RoI's own class is computed: training and detection use no other.

    Args:
        recipe: the section of the mask head.
        box_head: the section of the box head, whose positive samples the mask head learns from.
        in_channels: channels of the pyramid.
        num_classes: without the background.
        norm: makes the norm layers.
        strides: strides of the levels of the pyramid.
    """

    def __init__(
        self,
        recipe: MaskHeadRecipe,
        box_head: BoxHeadRecipe,
        in_channels: int,
        num_classes: int,
        norm: NormFactory,
        strides: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.recipe, self.num_classes = recipe, num_classes
        part = 1.0 if box_head.sampling == "hard" else box_head.positive_fraction
        self.most_positives = max(1, int(box_head.samples * part))
        self.pooling = RoiPooling(
            recipe.pool_size, recipe.sampling_ratio, recipe.aligned, box_head.canonical_size, strides
        )
        widths = [in_channels, *[recipe.channels] * recipe.convolutions]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=recipe.norm == "none") for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(norm(recipe.channels) for _ in self.convolutions)
        self.upsample = nn.ConvTranspose2d(recipe.channels, recipe.channels, 2, stride=2)
        self.logits = nn.Linear(recipe.channels, num_classes)
        for layer in (*self.convolutions, self.upsample):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.logits.weight, std=0.001)
        for layer in (*self.convolutions, self.upsample, self.logits):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        pool: Callable[[], Float[Tensor, "all_rois bins channels"]],
        labels: Int64[Tensor, "images rois"],
        is_valid: Bool[Tensor, "images rois"],
        recompute: Callable[..., Any] = plainly,
    ) -> Float[Tensor, "images rois rows columns"]:
        """The logits of each RoI's mask for the class in `labels`; rows of invalid RoIs are meaningless.

        Args:
            pool: makes the pooled features of all RoIs, image by image.
            labels: a class for each RoI; any number for invalid ones.
            is_valid: which RoIs are not padding.
            recompute: `recompute(function)` may call `pool` again in the backward instead of keeping its output.
        """
        logits: Tensor = recompute(self._own_logits, pool, labels, is_valid)
        return logits.reshape(*labels.shape, *logits.shape[1:])

    def _own_logits(self, pool: Callable[[], Tensor], labels: Tensor, is_valid: Tensor) -> Tensor:
        size = self.recipe.pool_size
        pooled = pool()
        hidden = pooled.reshape(pooled.shape[0], size, size, pooled.shape[2]).permute(
            0, 3, 1, 2
        )  # channels last, as in memory
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = F.relu_(normalized_rois(norm, convolution(hidden), is_valid))
        count, channels = hidden.shape[:2]
        # with stride 2 and kernel 2, a transposed convolution is a linear layer that makes 2 x 2 pixels of each pixel
        weight, bias = self.upsample.weight.permute(2, 3, 1, 0).flatten(0, 2), self.upsample.bias
        assert bias is not None
        pixels = hidden.permute(0, 2, 3, 1).flatten(0, 2)
        quarters = F.relu_(linear(pixels, weight, bias.repeat(4)))
        is_own = labels.reshape(-1, 1) == torch.arange(self.num_classes, device=labels.device)
        own = is_own.to(self.logits.weight.dtype)  # a product, since the gradient of an index has no fixed order
        logits = torch.bmm(quarters.reshape(count, 4 * size**2, channels), (own @ self.logits.weight).unsqueeze(2))
        logits = logits.squeeze(2) + (own @ self.logits.bias).unsqueeze(1)
        return logits.reshape(count, size, size, 2, 2).transpose(2, 3).reshape(count, 2 * size, 2 * size)

    def losses(
        self,
        table: FeatureTable,
        sampled: SampledRois,
        masks: Masks,
        sizes: Int64[Tensor, "images 2"],
        recompute: Callable[..., Any],
    ) -> dict[str, Float[Tensor, " images"]]:
        """Binary cross-entropy of each image: the mean over the cells of a mask, then over its positive RoIs (Eq. 1).

        RoIs of objects without a mask are left out. Targets are covered fractions of cells, as in torchvision;
        detectron2 rounds them to 0 or 1, so that the last digit of a box could decide.
        Differs from torchvision in a batch of several images: there the mean is over the RoIs of all images.
        """
        width = filled_columns(sampled.is_positive, least=1)
        width = min(width, self.most_positives, sampled.boxes.shape[1])
        rois, labels, box_index = sampled.boxes[:, :width], sampled.labels[:, :width], sampled.box_index[:, :width]
        is_valid = sampled.is_positive[:, :width]
        if masks.frames.shape[1]:
            is_valid = is_valid & (masks.frames[..., 3].gather(1, box_index) > 0)
        logits = self(partial(self.pooling, table, rois), labels, is_valid, recompute).to(rois.dtype)
        stride = self.pooling.strides[0]
        canvas = table.heights[0] * stride, table.widths[0] * stride
        wanted = mask_targets(masks, box_index, rois, sizes, canvas, logits.shape[-1])
        values = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((2, 3)) * is_valid
        return {"mask_head": mean_per_image(values, is_valid)}

    def masks(self, table: FeatureTable, found: BatchDetections) -> Float[Tensor, "images detections rows columns"]:
        """The mask probabilities of each detection's class on a grid over its box; 0 in empty rows."""
        is_found = found.labels >= 0
        width = filled_columns(is_found, least=1)
        pool = partial(self.pooling, table, found.boxes[:, :width])
        logits = self(pool, found.labels[:, :width], is_found[:, :width]).to(found.boxes.dtype)
        probabilities = logits.sigmoid() * is_found[:, :width, None, None]
        return F.pad(probabilities, (0, 0, 0, 0, 0, is_found.shape[1] - width))
