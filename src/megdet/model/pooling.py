"""Pooling: the features of every RoI, on a grid of fixed size."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megdet.model.anchors import LEVEL_STRIDES
from megdet.ops.constants import constant
from megdet.ops.roi_align import (
    FeatureTable,
    position_sensitive_roi_align,
    roi_align,
    roi_level_pairs,
    roi_levels,
)

POOLED_LEVELS = 4
"""Strides of P2 to P5, the levels that are pooled from."""
_POINTS_OF_IMAGES = 2
"""Sampling points along each edge of a bin of a whole image, if those of RoIs depend on the RoI's size."""


@dataclass(frozen=True)
class RoiPooling:
    """RoIAlign (He et al., 2017) from the level of the pyramid that fits the RoI's size (Lin et al., 2017, Eq. 1)."""

    pool_size: int
    """bins along each edge"""
    sampling_ratio: int
    """sampling points of a bin along each edge"""
    aligned: bool
    """whether coordinates are shifted by half a pixel, the correct form of RoIAlign"""
    canonical_size: float
    """edge in pixels of the RoI that is pooled from P4"""
    strides: tuple[int, ...] = LEVEL_STRIDES
    """strides of the levels of the pyramid"""
    two_levels: bool = False
    """whether to pool from the two neighbouring levels nearest to the RoI's size"""

    def __call__(
        self, table: FeatureTable, rois: Float[Tensor, "images rois 4"]
    ) -> Float[Tensor, "pooled_rois bins channels"]:
        """The pooled features of the RoIs of all images, one after the other, bin by bin.

        With two levels, the features of all RoIs from the finer level come first, then those from the coarser level.
        """
        images, count = rois.shape[:2]
        flat = rois.reshape(-1, 4)
        image_index = torch.arange(images, device=rois.device).repeat_interleave(count)
        if not self.two_levels:
            levels = roi_levels(flat, POOLED_LEVELS, self.canonical_size)
        else:
            levels = roi_level_pairs(flat, POOLED_LEVELS, self.canonical_size).flatten()
            flat, image_index = flat.repeat(2, 1), image_index.repeat(2)
        return self.align(table, flat, image_index, levels, self.sampling_ratio, aligned=self.aligned)

    def of_images(self, table: FeatureTable, sizes: Int64[Tensor, "images 2"]) -> Float[Tensor, "images bins channels"]:
        """The pooled features of whole images, each as one RoI (He et al., 2016, appendix B), without the canvas.

        If an edge has fewer pixels on its level than there are sampling points, the RoI is shrunk so that no sampling
        point reaches beyond the outer pixels. So no value of the canvas around an image is read.
        """
        dtype = torch.float64 if table.rows.dtype == torch.float64 else torch.float32
        edges = sizes.flip(1).to(dtype)
        levels = roi_levels(torch.cat([torch.zeros_like(edges), edges], 1), POOLED_LEVELS, self.canonical_size)
        ratio = self.sampling_ratio or _POINTS_OF_IMAGES
        points = self.pool_size * ratio
        stride = constant(self.strides, dtype, edges.device)[levels].unsqueeze(1)
        margin = ((points * stride - edges) / (2 * max(points - 1, 1))).clamp(min=0).minimum(edges / 2)
        image_index = torch.arange(sizes.shape[0], device=sizes.device)
        rois = torch.cat([margin, edges - margin], 1)
        return self.align(table, rois, image_index, levels, ratio, aligned=True)

    def align(
        self,
        table: FeatureTable,
        rois: Float[Tensor, "pooled_rois 4"],
        image_index: Int64[Tensor, " pooled_rois"],
        levels: Int64[Tensor, " pooled_rois"],
        sampling_ratio: int,
        *,
        aligned: bool,
    ) -> Float[Tensor, "pooled_rois bins channels"]:
        """The features of RoIs on given levels; the arguments are those of `ops.roi_align.roi_align`."""
        return roi_align(
            table, self.strides, rois, image_index, levels, self.pool_size, sampling_ratio, aligned=aligned
        )


@dataclass(frozen=True)
class PositionSensitivePooling:
    """RoIAlign in which each bin has channels of its own (R-FCN, Sec. 3)."""

    pool_size: int
    """bins along each edge"""
    sampling_ratio: int
    """sampling points of a bin along each edge"""
    stride: int
    """stride of the maps"""

    def __call__(
        self, maps: Float[Tensor, "images _ height width"], rois: Float[Tensor, "images rois 4"]
    ) -> Float[Tensor, "all_rois bins channels"]:
        """The pooled features of the RoIs of all images, one after the other."""
        images, count = rois.shape[:2]
        image_index = torch.arange(images, device=rois.device).repeat_interleave(count)
        return self.align(maps, rois.reshape(-1, 4), image_index)

    def align(
        self,
        maps: Float[Tensor, "images _ height width"],
        rois: Float[Tensor, "all_rois 4"],
        image_index: Int64[Tensor, " all_rois"],
    ) -> Float[Tensor, "all_rois bins channels"]:
        """The features of RoIs; the arguments are those of `ops.roi_align.position_sensitive_roi_align`."""
        return position_sensitive_roi_align(maps, self.stride, rois, image_index, self.pool_size, self.sampling_ratio)
