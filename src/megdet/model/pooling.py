"""Pooling: the features of every RoI, on a grid of the same size whatever the RoI's."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from megdet.model.anchors import LEVEL_STRIDES
from megdet.ops.roi_align import FeatureTable, roi_align, roi_levels

POOLED_LEVELS = 4
"""P2 to P5."""


@dataclass(frozen=True)
class RoiPooling:
    """RoIAlign (He et al., 2017) from the level of the pyramid that fits the RoI's size (Lin et al., 2017, Eq. 1)."""

    pool_size: int
    """bins along each edge"""
    sampling_ratio: int
    """sampling points of a bin along each edge"""
    aligned: bool
    """shift coordinates by half a pixel, as they should be"""
    canonical_size: float
    """edge in pixels of the RoI that is pooled from P4"""
    strides: tuple[int, ...] = LEVEL_STRIDES
    """of the levels of the pyramid"""

    def __call__(
        self, table: FeatureTable, rois: Float[Tensor, "images rois 4"]
    ) -> Float[Tensor, "all_rois bins channels"]:
        """The pooled features of the RoIs of all images, one after the other, bin by bin."""
        images, count = rois.shape[:2]
        flat = rois.reshape(-1, 4)
        image_index = torch.arange(images, device=rois.device).repeat_interleave(count)
        levels = roi_levels(flat, POOLED_LEVELS, self.canonical_size)
        return roi_align(
            table,
            self.strides,
            flat,
            image_index,
            levels,
            self.pool_size,
            self.sampling_ratio,
            aligned=self.aligned,
        )
