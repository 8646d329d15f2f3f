"""RoIAlign in an exported graph: the same RoIs on the same levels, computed by one operator."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megdet.model.detector import Detector
from megdet.model.pooling import POOLED_LEVELS, PositionSensitivePooling, RoiPooling
from megdet.ops.graph_operators import roi_align
from megdet.ops.roi_align import FeatureTable

_NAME = "pooling"
"""The attribute names under which parts of a detector keep their pooling."""


@dataclass
class LevelMaps(FeatureTable):
    """A pyramid kept as maps (images, channels, height, width); heads pass it on to the pooling like a table."""

    maps: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, levels: Sequence[Tensor]) -> "LevelMaps":
        """A table without rows: only `GraphPooling` may read it."""
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
    """Pools every bin as a RoI with a single bin, from an image that has only the bin's channels."""

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
    """Replace the pooling in all parts of a detector by the pooling for graphs."""
    for module in detector.modules():
        own = getattr(module, _NAME, None)
        if type(own) is RoiPooling:
            setattr(module, _NAME, GraphPooling(**vars(own)))
        elif type(own) is PositionSensitivePooling:
            setattr(module, _NAME, GraphPositionSensitivePooling(**vars(own)))
