"""What travels between data, model and losses: batches of images and their targets."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor


@dataclass
class Targets:
    """The ground truth of a batch, padded to the most boxes of an image.

    A row whose `labels` entry is -1 stands for nothing. Boxes are x1, y1, x2, y2 in pixels of the canvas.
    """

    boxes: Float[Tensor, "images max_boxes 4"]
    labels: Int64[Tensor, "images max_boxes"]
    image_seeds: Int64[Tensor, " images"]
    """one 64-bit number an image and epoch, from which all its sampling is drawn"""

    @property
    def is_box(self) -> Bool[Tensor, "images max_boxes"]:
        """Which rows are boxes."""
        return self.labels >= 0

    def to(self, device: torch.device, *, non_blocking: bool = True) -> "Targets":
        """A copy on a device."""
        return Targets(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def pin_memory(self) -> "Targets":
        """A copy in page-locked memory, from which copies to a GPU run on their own."""
        return Targets(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


@dataclass
class Batch:
    """Images on one canvas, each in its upper left corner, and what is known of them."""

    pixels: UInt8[Tensor, "images 3 height width"] | Float32[Tensor, "images 3 height width"]
    """0 to 255; no whole numbers where `data.resize` is torchvision"""
    sizes: Int64[Tensor, "images 2"]
    """height and width in pixels of each image within the canvas"""
    targets: Targets
    image_index: tuple[int, ...]
    """place of each image in its data set"""
    scales: Float[Tensor, "images 2"]
    """pixels of the canvas for one of the file, in y and x"""

    def tensors(self) -> list[Tensor]:
        """All of them."""
        targets = self.targets
        return [self.pixels, self.sizes, self.scales, targets.boxes, targets.labels, targets.image_seeds]

    def to(self, device: torch.device, *, non_blocking: bool = True) -> "Batch":
        """A copy on a device."""
        return Batch(
            self.pixels.to(device, non_blocking=non_blocking),
            self.sizes.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.image_index,
            self.scales.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory; the loader calls it."""
        return Batch(
            self.pixels.pin_memory(),
            self.sizes.pin_memory(),
            self.targets.pin_memory(),
            self.image_index,
            self.scales.pin_memory(),
        )


@dataclass
class Detections:
    """What a detector found in a batch, best first, padded to the most it may find.

    A row whose `labels` entry is -1 stands for nothing. Boxes are x1, y1, x2, y2 in pixels of the canvas.
    """

    boxes: Float[Tensor, "images detections 4"]
    scores: Float[Tensor, "images detections"]
    labels: Int64[Tensor, "images detections"]
