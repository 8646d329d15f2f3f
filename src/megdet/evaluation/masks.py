"""The masks of ground truth and detections: checked, and as run lengths of the size of their image.

The size is that of the image in the file, else that of its first mask. If a detection's mask is turned by 90 degrees
relative to the file, the file has the size before the image's EXIF rotation, and the detection's size is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from hotcoco import mask as coco_masks
from jaxtyping import Float64

from megdet.data.result_rows import MOST_PIXELS, Detection, Rle
from megdet.data.rle import Rle as RunLengths
from megdet.data.rle import packed_pixels
from megdet.data.segmentations import far_fault, outline_fault, rle_size_fault, segmentation_fault
from megdet.errors import InputError, shown
from megdet.evaluation.columns import MaskedAnnotation, MaskedTruth, Numbering
from megdet.evaluation.counting import DetectionColumns, Objects, TruthColumns

_TOGETHER = 1 << 12  # masks that are converted at a time, to limit memory

_Sizes = dict[int, tuple[int, int]]
"""Height and width of images by their numbers."""


@dataclass(frozen=True)
class _Rows:
    """Annotations or detections, and where they come from."""

    rows: Sequence[MaskedAnnotation | Detection]
    objects: Objects
    place: str

    def fault(self, index: int, what: str) -> InputError:
        return InputError(f"{self.place}[{index}] of image {shown(self.rows[index].image_id)}{what}")


@dataclass(frozen=True)
class Masked:
    """Ground truth and detections, ready to evaluate both boxes and masks."""

    truth: TruthColumns
    """with masks; areas missing in the file are those of the masks"""
    found: DetectionColumns
    """with masks and their areas"""
    found_boxes: DetectionColumns
    """boxes of the detections; a missing box is the one around the mask"""


def with_masks(
    truth_rows: MaskedTruth,
    truth: TruthColumns,
    found_rows: Sequence[Detection],
    found: DetectionColumns,
    numbering: Numbering,
    place: str,
) -> Masked:
    """The columns of ground truth and detections with their masks.

    Raises InputError, with the place and the image, for a mask that is missing, broken or of another size than its
    image.
    """
    theirs = _Rows(truth_rows.annotations, truth, f"{numbering.place}: annotations")
    ours = _Rows(found_rows, found, f"{place}: ")
    sizes = _declared_sizes(truth_rows, numbering)
    found_masks, found_areas = _measured(ours, _of_detections(ours, sizes))
    truth_masks, truth_areas = _measured(theirs, _of_annotations(theirs, sizes))
    has_area = np.array([row.area is not None for row in truth_rows.annotations], np.bool_)
    has_box = np.array([row.bbox is not None for row in found_rows], np.bool_)
    boxes = found.boxes.copy()
    for index in np.flatnonzero(~has_box).tolist():
        boxes[index] = coco_masks.to_bbox(found_masks[index])
    return Masked(
        replace(truth, masks=truth_masks, areas=np.where(has_area, truth.areas, truth_areas)),
        replace(found, masks=found_masks, areas=found_areas),
        replace(found, boxes=boxes, areas=np.where(has_box, found.areas, found_areas)),
    )


def _declared_sizes(truth: MaskedTruth, numbering: Numbering) -> _Sizes:
    sizes = {}
    for index, image in enumerate(truth.images):
        if image.height is None or image.width is None:
            continue
        height, width = int(image.height), int(image.width)
        if (height, width) != (image.height, image.width) or not 1 <= min(height, width) * max(
            height, width
        ) <= MOST_PIXELS:
            raise InputError(
                f"{numbering.place}: images[{index}]: {shown(image.width)} x {shown(image.height)} is not a size of "
                "an image in pixels: write its file's width and height"
            )
        sizes[numbering.images[image.id]] = height, width
    return sizes


def _of_detections(found: _Rows, sizes: _Sizes) -> list[Rle]:
    """The masks of detections; the first mask of an image decides the order of its height and width."""
    masks, seen = [], set()
    for index, (row, image) in enumerate(zip(found.rows, found.objects.images.tolist(), strict=True)):
        mask = row.segmentation
        if not isinstance(mask, Rle):
            raise found.fault(index, " has no segmentation, other detections have one: give one to all or to none")
        if image not in seen and sizes.get(image) == mask.size[::-1]:
            sizes[image] = mask.size
        seen.add(image)
        _check_size(found, index, mask, sizes.setdefault(image, mask.size))
        masks.append(mask)
    return masks


def _of_annotations(truth: _Rows, sizes: _Sizes) -> list[Rle]:
    """The masks of annotations, with polygons rasterised."""
    masks = []
    for index, (row, image) in enumerate(zip(truth.rows, truth.objects.images.tolist(), strict=True)):
        mask = row.segmentation
        if not mask:
            raise truth.fault(
                index,
                " has no segmentation, the detections have some: write its polygons or run lengths into the file, or "
                "take the `segmentation` of the detections out",
            )
        if isinstance(mask, Rle):
            _check_size(truth, index, mask, sizes.setdefault(image, mask.size))
        elif image in sizes:
            mask = _painted(truth, index, mask, sizes[image])
        else:
            raise truth.fault(index, ": its polygons cannot be painted, the image has no width and height in the file")
        masks.append(mask)
    return masks


def _check_size(rows: _Rows, index: int, mask: Rle, size: tuple[int, int]) -> None:
    if fault := rle_size_fault(mask.size, size):
        raise rows.fault(index, f": {fault}: make masks of the size of the image's file")


def _painted(truth: _Rows, index: int, polygons: list[list[float]], size: tuple[int, int]) -> Rle:
    for polygon in polygons:
        is_sound = len(polygon) >= 6 and len(polygon) % 2 == 0
        x, y = polygon[0::2], polygon[1::2]
        fault = far_fault([min(x), min(y), max(x), max(y)], size) if is_sound else segmentation_fault([polygon])
        if fault:  # rasterising takes time and memory for every pixel of an edge
            raise truth.fault(index, f": {fault}")
    if fault := outline_fault(polygons):
        raise truth.fault(index, f": {fault}")
    return Rle(size, coco_masks.merge(coco_masks.frPyObjects(polygons, *size))["counts"].decode())


def _measured(rows: _Rows, masks: list[Rle]) -> tuple[list[RunLengths], Float64[np.ndarray, " rows"]]:
    """The masks as hotcoco takes them, and their pixels."""
    found = [{"size": list(mask.size), "counts": mask.counts} for mask in masks]
    areas = [np.zeros(0)]
    for start in range(0, len(masks), _TOGETHER):
        own = masks[start : start + _TOGETHER]
        packed = packed_pixels([mask.counts if isinstance(mask.counts, str) else "" for mask in own]).tolist()
        for index, (mask, pixels) in enumerate(zip(own, packed, strict=True), start):
            told = pixels if isinstance(mask.counts, str) else sum(mask.counts)
            if told != mask.size[0] * mask.size[1]:
                raise _broken(rows, index, mask)
        try:
            areas.append(coco_masks.area(found[start : start + _TOGETHER]).astype(np.float64))
        except ValueError:
            index = next(index for index in range(start, len(found)) if not _is_readable(found[index]))
            raise _broken(rows, index, masks[index]) from None
    return found, np.concatenate(areas)


def _is_readable(mask: RunLengths) -> bool:
    try:
        coco_masks.area(mask)
    except ValueError:
        return False
    return True


def _broken(rows: _Rows, index: int, mask: Rle) -> InputError:
    return rows.fault(index, f": {segmentation_fault({'size': list(mask.size), 'counts': mask.counts})}")
