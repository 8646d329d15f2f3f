"""The data passed between loader, model and losses: batches of images, targets and detections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

_R = TypeVar("_R", bound="Rows")


@dataclass
class Rows:
    """Fields with one row an image: tensors, tuples, other Rows, or None. They are moved and sliced together."""

    def map(self: _R, fn: Callable[[Tensor], Tensor]) -> _R:
        """A copy with `fn` applied to every tensor."""
        return replace(self, **{name: _mapped(value, fn) for name, value in vars(self).items()})

    def __getitem__(self: _R, images: slice) -> _R:
        """The rows of some images."""
        cut = {name: value if value is None else value[images] for name, value in vars(self).items()}
        return replace(self, **cut)

    def tensors(self) -> list[Tensor]:
        """All tensors among the fields."""
        found: list[Tensor] = []
        for value in vars(self).values():
            found += [value] if isinstance(value, Tensor) else value.tensors() if isinstance(value, Rows) else []
        return found

    def to(self: _R, device: torch.device) -> _R:
        """A copy on a device; from page-locked memory the copy is asynchronous."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: _R) -> _R:
        """A copy in page-locked memory; torch's DataLoader calls this."""
        return self.map(Tensor.pin_memory)


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    return value.map(fn) if isinstance(value, Rows) else value


@dataclass
class Masks(Rows):
    """The masks of the objects of a batch, each stored as a frame of pixels around its object, one bit a pixel.

    A full-size mask an object would be a hundred times as large.
    """

    bits: UInt8[Tensor, "images bytes"]
    """row by row of a frame, the highest bit of a byte first, the frames of an image one after another without gaps"""
    frames: Int64[Tensor, "images max_boxes 5"]
    """first bit, x1, y1, width and height in pixels of the canvas; width 0 if there is no mask"""


@dataclass
class Targets(Rows):
    """The ground truth of a batch, padded to the most boxes of an image.

    A row whose `labels` entry is -1 is empty. Boxes are x1, y1, x2, y2 in pixels of the canvas.
    """

    boxes: Float[Tensor, "images max_boxes 4"]
    labels: Int64[Tensor, "images max_boxes"]
    image_seeds: Int64[Tensor, " images"]
    """one 64-bit number for each image and epoch, the seed of all its sampling"""
    masks: Masks | None = None
    """the masks of the same rows; None if the detector does not use masks"""

    @property
    def is_box(self) -> Bool[Tensor, "images max_boxes"]:
        """Which rows are boxes."""
        return self.labels >= 0


@dataclass
class Batch(Rows):
    """Images on one canvas, each in its upper left corner, with their targets."""

    pixels: UInt8[Tensor, "images 3 height width"] | Float32[Tensor, "images 3 height width"]
    """0 to 255; float32 if `data.resize` is torchvision"""
    sizes: Int64[Tensor, "images 2"]
    """height and width in pixels of each image within the canvas"""
    targets: Targets
    image_index: tuple[int, ...]
    """index of each image in its data set"""
    scales: Float[Tensor, "images 2"]
    """pixels of the canvas for one pixel of the file, in y and x"""


@dataclass
class BatchDetections(Rows):
    """What a detector found in a batch, best first, padded to the most it may find.

    A row whose `labels` entry is -1 is empty. Boxes are x1, y1, x2, y2 in pixels of the canvas.
    """

    boxes: Float[Tensor, "images detections 4"]
    scores: Float[Tensor, "images detections"]
    labels: Int64[Tensor, "images detections"]
    masks: Float[Tensor, "images detections rows columns"] | None = None
    """probability that a cell of a grid over the box belongs to the object; None without a mask head"""

    @classmethod
    def of_batches(cls, batches: "Sequence[BatchDetections]") -> "BatchDetections":
        """The rows of several batches, one after another."""
        most = max(own.labels.shape[1] for own in batches)

        def rows(values: Sequence[Tensor], nothing: int) -> Tensor:
            return torch.cat([_filled_up(own, most, nothing) for own in values])

        masks = [own.masks for own in batches if own.masks is not None]
        return cls(
            rows([own.boxes for own in batches], 0),
            rows([own.scores for own in batches], 0),
            rows([own.labels for own in batches], -1),
            rows(masks, 0) if masks else None,
        )


def _filled_up(values: Tensor, columns: int, nothing: int) -> Tensor:
    missing = values.new_full((len(values), columns - values.shape[1], *values.shape[2:]), nothing)
    return torch.cat([values, missing], 1)
