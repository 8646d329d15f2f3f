"""What travels between data, model and losses: batches of images and their targets."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

_R = TypeVar("_R", bound="Rows")


@dataclass
class Rows:
    """Fields with a row an image: tensors, tuples and other Rows. They are moved and cut together."""

    def map(self: _R, fn: Callable[[Tensor], Tensor]) -> _R:
        """The same with `fn` of every tensor."""
        return replace(self, **{name: _mapped(value, fn) for name, value in vars(self).items()})

    def __getitem__(self: _R, images: slice) -> _R:
        """The rows of some images."""
        return replace(self, **{name: value[images] for name, value in vars(self).items()})

    def tensors(self) -> list[Tensor]:
        """All of them."""
        found: list[Tensor] = []
        for value in vars(self).values():
            found += [value] if isinstance(value, Tensor) else value.tensors() if isinstance(value, Rows) else []
        return found

    def to(self: _R, device: torch.device) -> _R:
        """A copy on a device; from page-locked memory it goes on while the program does."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: _R) -> _R:
        """A copy in page-locked memory; torch's loader calls it."""
        return self.map(Tensor.pin_memory)


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    return value.map(fn) if isinstance(value, Rows) else value


@dataclass
class Targets(Rows):
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


@dataclass
class Batch(Rows):
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


@dataclass
class Detections(Rows):
    """What a detector found in a batch, best first, padded to the most it may find.

    A row whose `labels` entry is -1 stands for nothing. Boxes are x1, y1, x2, y2 in pixels of the canvas.
    """

    boxes: Float[Tensor, "images detections 4"]
    scores: Float[Tensor, "images detections"]
    labels: Int64[Tensor, "images detections"]
