"""RoIAlign in an exported graph: the same RoIs on the same levels, by one operator."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megdet.model.detector import Detector
from megdet.model.pooling import POOLED_LEVELS, PositionSensitivePooling, RoiPooling
from megdet.ops.graph_operators import roi_align
from megdet.ops.roi_align import FeatureTable

_NAME = "pooling"
"""What the parts of a detector that pool call it."""


@dataclass
class LevelMaps(FeatureTable):
    """A pyramid that stays maps (images, channels, height, width), for the heads that pass a table on to pooling."""

    maps: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, levels: Sequence[Tensor]) -> "LevelMaps":
        """Without any row: only `GraphPooling` may read it."""
        return cls(levels[0].new_zeros(0, 1), (), (), (), tuple(levels[:POOLED_LEVELS]))


@dataclass(frozen=True)
class GraphPooling(RoiPooling):
    """Pools from `LevelMaps`."""

    def align(
        self,
        table: FeatureTable,
        rois: Tensor,
        image_index: Tensor,
        levels: Tensor,
        sampling_ratio: int,
        *,
        aligned: bool,
    ) -> Tensor:
        """The features of RoIs on given levels."""
        assert isinstance(table, LevelMaps)
        strides = list(self.strides[:POOLED_LEVELS])
        pooled: Tensor = roi_align(
            list(table.maps), strides, rois, image_index, levels, self.pool_size, sampling_ratio, aligned
        )
        return pooled


@dataclass(frozen=True)
class GraphPositionSensitivePooling(PositionSensitivePooling):
    """Every bin is a RoI of its own with one bin, in an image that has the bin's channels."""

    def align(self, maps: Tensor, rois: Tensor, image_index: Tensor) -> Tensor:
        """The features of RoIs."""
        size = self.pool_size
        bins = size * size
        number = torch.arange(bins, device=rois.device)
        corner = torch.stack([number % size, torch.div(number, size, rounding_mode="floor")], 1).to(rois.dtype)
        low, edges = rois[:, None, :2], (rois[:, None, 2:] - rois[:, None, :2]) / size
        first = low + edges * corner
        parts = torch.cat([first, first + edges], 2)
        own_maps = torch.unflatten(maps, 1, (bins, -1)).flatten(0, 1)
        own_image = (image_index.unsqueeze(1) * bins + number).flatten()
        level = torch.zeros_like(own_image)
        pooled: Tensor = roi_align(
            [own_maps], [self.stride], parts.flatten(0, 1), own_image, level, 1, self.sampling_ratio, True
        )
        return torch.unflatten(pooled.squeeze(1), 0, (-1, bins))


def pool_maps(detector: Detector) -> None:
    """Exchange the pooling of all parts of a detector for that of a graph."""
    for module in detector.modules():
        own = getattr(module, _NAME, None)
        if type(own) is RoiPooling:
            setattr(module, _NAME, GraphPooling(**vars(own)))
        elif type(own) is PositionSensitivePooling:
            setattr(module, _NAME, GraphPositionSensitivePooling(**vars(own)))
