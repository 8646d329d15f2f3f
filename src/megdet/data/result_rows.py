"""The rows of a COCO result file: detections, as an evaluation, an ensemble or a server takes them."""

from typing import Annotated

import msgspec

from megdet.data.coco_rows import Length, Number

Box = tuple[Number, Number, Length, Length]
"""x, y, width, height in pixels."""
Id = int | str | float  # some tools write 3.0

_Side = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class Rle(msgspec.Struct, gc=False):
    """A mask as the lengths of its runs, packed into a text or not; `size` is height and width in pixels."""

    size: tuple[_Side, _Side]
    counts: str | list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]]


class Detection(msgspec.Struct, gc=False, kw_only=True):
    """One entry of the COCO result format: a box, a mask or both."""

    image_id: Id
    category_id: Id
    bbox: Box | None = None
    score: Number
    segmentation: Rle | None = None
