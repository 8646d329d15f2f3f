"""The rows of a COCO result file: detections in the form for evaluation, ensembles and the COCO server."""

from typing import Annotated

import msgspec

from megdet.data.coco_rows import Length, Number

Box = tuple[Number, Number, Length, Length]
"""x, y, width, height in pixels."""
Id = int | str | float  # some tools write 3.0

MOST_PIXELS = (1 << 32) - 1
"""Largest number of pixels of a mask: its runs are counted in 32 bits."""

_Side = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class Rle(msgspec.Struct, gc=False):
    """A mask as run lengths, a list or compressed text; `size` is height and width in pixels."""

    size: tuple[_Side, _Side]
    counts: str | list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]]

    def __post_init__(self) -> None:
        if self.size[0] * self.size[1] > MOST_PIXELS:
            raise ValueError(f"a mask of {self.size[0]} x {self.size[1]} pixels, more than {MOST_PIXELS}")


class Detection(msgspec.Struct, gc=False, kw_only=True):
    """One entry of the COCO result format: a box, a mask or both."""

    image_id: Id
    category_id: Id
    bbox: Box | None = None
    score: Number
    segmentation: Rle | None = None
