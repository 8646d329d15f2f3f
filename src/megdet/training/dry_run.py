"""Checks before the first step that the plan's largest micro-batch fits the devices, and makes it fit if possible.

Every rank alone makes one forward and backward of a micro-batch of that size, with as many boxes as any image has, and
no update. If it does not fit, more is recomputed in the backward, or images are taken one by one (without batch
statistics), or wider lanes make smaller shares; none of this changes the result. The check costs one micro-batch. It is
skipped if a generous estimate is far below the free memory, as on most CPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from megdet.data.coco import CocoDataset
from megdet.data.masks import PlacedMask
from megdet.data.plan import TrainingPlan
from megdet.data.transforms import make_masks
from megdet.distributed.lane import SINGLE_LANE, Lane, make_lane
from megdet.distributed.layout import Layout, smaller_shares
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.layers.batch_norm import CrossDeviceBatchNorm, step_sums
from megdet.memory import free_bytes, give_memory_back, is_out_of_memory, within_bytes
from megdet.recipe import Data
from megdet.runtime import num_ranks_here
from megdet.structures import Batch, Targets
from megdet.training.pieces import Pieces, accumulate, smallest_pieces
from megdet.training.trainer import Trainer

BYTES_PER_PIXEL = 24 << 10
"""Bytes that a step keeps for a pixel in float32, a generous estimate; float64 takes twice as much."""
_SURE = 0.5
"""If the estimate is below this part of the free memory, nothing is tried."""
_SLOWER = (1.0, 1.25, 1.5)
"""Relative time of a step by the size of its pieces (`Pieces.size_of`; docs/training.md)."""
_MULTIPLE, _EDGE = 8, 16


class MemoryTrial:
    """Tries shares of groups on this rank; every rank makes one and calls the same methods.

    Args:
        trainer: its state is not changed.
        plan: the plan of the run.
        dataset: the images that the run trains on.
        world: all ranks.
    """

    def __init__(self, trainer: Trainer, plan: TrainingPlan, dataset: CocoDataset, world: World) -> None:
        self.trainer, self.plan, self.dataset, self.world = trainer, plan, dataset, world
        self._known: dict[int, int | None] = {}

    def fitting(self, layout: Layout, lane_width: int | None, max_images: int | None) -> tuple[Layout, str]:
        """A layout that fits, the given one if possible, and a sentence if something had to change.

        Sets the trainer's lane and pieces. Raises InputError on every rank if nothing fits.
        """
        if not any(self.world.gather_objects(self._is_needed(layout))):
            return layout, ""
        canvas = self.plan.largest_canvas()
        found: list[tuple[float, int, Layout, int]] = []
        for other in self._layouts(layout, lane_width, max_images):
            size = self._fits(other.largest_share, canvas)
            if size is not None:
                found.append((other.busiest_images * _SLOWER[size], other.lane_width, other, size))
            if other == layout and size == 0:
                return layout, ""
        where = f"a micro-batch of {layout.largest_share} images on a canvas of {canvas[0]} x {canvas[1]} pixels"
        if not found:
            raise InputError(
                f"{where} does not fit {self.world.device}, nor does a part of it: use more devices, a smaller bn_size "
                "or smaller data.short_edges"
            )
        _, _, chosen, size = min(found, key=lambda own: own[:2])
        pixels = chosen.largest_share * canvas[0] * canvas[1]
        self.trainer.pieces.limits = [pixels // 2] * size
        if chosen != layout:
            lane = make_lane(self.world, chosen)
            for norm in self._norms():
                norm.lane = lane
        changes = [f"lanes of {chosen.lane_width} instead of {layout.lane_width}"] if chosen != layout else []
        changes += ["recompute block where micro-batches are large"] if size else []
        changes += ["images one by one there"] if size > 1 else []
        return chosen, f"{where} does not fit {self.world.device}: {', '.join(changes)}; the result is the same"

    def _layouts(self, first: Layout, lane_width: int | None, max_images: int | None) -> Iterator[Layout]:
        """The given layout, then others with smaller shares."""
        yield first
        yield from smaller_shares(first, lane_width, max_images)

    def _is_needed(self, layout: Layout) -> bool:
        free = free_bytes(self.world.device, num_ranks_here())
        if free is None:
            return False
        height, width = self.plan.canvas_bound()
        per_pixel = BYTES_PER_PIXEL * (2 if self.plan.recipe.precision == "float64" else 1)
        return layout.largest_share * height * width * per_pixel > _SURE * free

    def _fits(self, images: int, canvas: tuple[int, int]) -> int | None:
        """The size of the pieces in which so many images fit on every rank; None if they do not fit."""
        if images not in self._known:
            own = self.world.gather_objects(self._fits_here(images, canvas))
            sizes = [size for size in own if size is not None]
            self._known[images] = max(sizes) if len(sizes) == len(own) else None
        return self._known[images]

    def _fits_here(self, images: int, canvas: tuple[int, int]) -> int | None:
        device, smallest = self.world.device, smallest_pieces(self.trainer.model, self.trainer.recipe)
        for size in range(smallest + 1):
            with self._alone(), within_bytes(free_bytes(device, num_ranks_here()), device):
                try:
                    self._try(images, canvas, size)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                else:
                    return size
            give_memory_back(device)
        return None

    def _try(self, images: int, canvas: tuple[int, int], size: int) -> None:
        trainer, device = self.trainer, self.world.device
        held = self._memory_of_later()
        trainer.buckets.zero()
        batch = largest_batch(self.dataset, images, canvas, trainer.recipe.data).to(device)
        pieces, apart = Pieces([0] * size), trainer.apart
        accumulate(trainer.model, trainer.recipe, trainer.buckets, pieces, [batch], 0, device, apart=apart)
        held.clear()

    def _memory_of_later(self) -> list[torch.Tensor]:
        """As much memory as the optimizer takes in its first step, and on a CPU the copy that checkpoints are of."""
        kinds = 2 if self.trainer.recipe.optimizer.kind in ("adamw", "lamb") else 1
        count = 0 if self.trainer.optimizer.state else kinds
        if self.world.is_first and self.world.device.type == "cpu":
            count += 1 + kinds
        return [torch.zeros_like(own) for own in self.trainer.buckets.parameters for _ in range(count)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A context without collectives of the lane, which restores all state afterwards."""
        lanes: list[tuple[CrossDeviceBatchNorm, Lane]] = [(norm, norm.lane) for norm in self._norms()]
        for norm, _ in lanes:
            norm.lane = SINGLE_LANE
        try:
            yield
        finally:
            for norm, lane in lanes:
                norm.lane = lane
            self.trainer.buckets.zero()
            if self.trainer.apart is not None:
                self.trainer.apart.rows.clear()
            for total in step_sums(self.trainer.model.modules()):
                total.zero_()
            self.trainer.model.set_recompute(self.trainer.recipe.recompute)

    def _norms(self) -> list[CrossDeviceBatchNorm]:
        return [own for own in self.trainer.model.modules() if isinstance(own, CrossDeviceBatchNorm)]


def largest_batch(dataset: CocoDataset, images: int, canvas: tuple[int, int], data: Data) -> Batch:
    """Made-up images that fill a canvas, each with the most boxes that an image may have."""
    count, num_classes = max(1, int(dataset.annotations.counts.max())), len(dataset.class_names)
    count *= (4 if data.mosaic else 1) + (1 if data.copy_paste else 0)  # of all images that a picture is made of
    rows = -(-count // _MULTIPLE) * _MULTIPLE
    dtype = torch.float32 if data.resize == "torchvision" else torch.uint8
    stripes = (torch.arange(canvas[1] * 3) % 251).to(dtype).reshape(1, 1, canvas[1], 3)
    pixels = stripes.repeat(images, canvas[0], 1, 1).permute(0, 3, 1, 2)
    most_y, most_x = (max(1, edge - _EDGE) for edge in canvas)
    corners = [(number * 37 % most_x, number * 53 % most_y) for number in range(count)]
    boxes, labels = torch.zeros(images, rows, 4), torch.full((images, rows), -1)
    boxes[:, :count] = torch.tensor([(x, y, x + _EDGE, y + _EDGE) for x, y in corners], dtype=torch.float32)
    labels[:, :count] = torch.arange(count) % num_classes
    masks = None
    if dataset.has_mask_targets:
        placed = [PlacedMask(x, y, np.ones((_EDGE, _EDGE), np.bool_)) for x, y in corners]
        masks = make_masks([placed] * images, rows)
    targets = Targets(boxes, labels, torch.arange(images), masks)
    return Batch(pixels, torch.tensor([canvas] * images), targets, tuple(range(images)), torch.ones(images, 2))
