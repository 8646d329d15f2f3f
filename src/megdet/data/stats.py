"""Statistics of a data set."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.data.coco import CocoDataset

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""the fractions at which quantiles are given: minimum, 5%, quartiles, 95%, maximum"""

_SPREADS = ("boxes_per_image", "box_sizes", "aspect_ratios", "mask_fractions")


@dataclass(frozen=True)
class Statistics:
    """Numbers of a data set; crowds are counted only in `num_crowds`."""

    num_images: int
    num_empty_images: int
    """without a box"""
    num_boxes: int
    num_crowds: int
    num_dropped: int
    """boxes without area, which `load_coco` leaves out"""
    class_counts: dict[str, int]
    """boxes of each class, in the order of the category ids; classes of the same name are counted together"""
    boxes_per_image: NDArray[np.int64]
    """(images,)"""
    box_sizes: NDArray[np.float64]
    """(boxes,): square root of width * height, in pixels"""
    aspect_ratios: NDArray[np.float64]
    """(boxes,): width over height"""
    box_images: NDArray[np.int64]
    """(boxes,): the image that a box is in, a row of `image_sizes`"""
    box_classes: NDArray[np.int64]
    """(boxes,): the class of a box, an index into the names of `class_counts`"""
    image_sizes: NDArray[np.int64]
    """(images, 2): height, width in pixels"""
    num_small: int
    """boxes whose area (of the mask, where the file has it) is below 32 squared, as COCO counts"""
    num_medium: int
    """from 32 to 96 squared"""
    num_large: int
    """96 squared and more"""
    mask_fractions: NDArray[np.float64] | None
    """(boxes that have a mask,): area of the mask over that of the box; None where the set was read without masks"""

    def quantiles(self, values: NDArray[Any]) -> tuple[float, ...]:
        """The `QUANTILES` of one of the arrays above; NaN where it is empty."""
        if not values.size:
            return (float("nan"),) * len(QUANTILES)
        return tuple(float(value) for value in np.quantile(values, QUANTILES))

    def as_dict(self) -> dict[str, Any]:
        """The numbers for JSON; arrays of one dimension become their quantiles."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        spreads = {name: values[name] for name in _SPREADS if values[name] is not None}
        counts = {name: own for name, own in values.items() if isinstance(own, int | dict)}
        return {**counts, "quantiles": {name: self.quantiles(own) for name, own in spreads.items()}}


def dataset_statistics(dataset: CocoDataset) -> Statistics:
    """Count the images and boxes of a data set."""
    none = [np.zeros((0, 4), np.float32)]
    crowd = np.concatenate([np.zeros(0, np.bool_), *(one.is_crowd for one in dataset.annotations)])
    boxes = np.concatenate(none + [one.boxes for one in dataset.annotations])[~crowd].astype(np.float64)
    labels = np.concatenate([np.zeros(0, np.int64), *(one.labels for one in dataset.annotations)])[~crowd]
    areas = np.concatenate([np.zeros(0, np.float32), *(one.areas for one in dataset.annotations)])[~crowd]
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    names = list(dict.fromkeys(dataset.class_names))
    classes = np.array([names.index(name) for name in dataset.class_names], np.int64)[labels]
    counts = dict(zip(names, np.bincount(classes, minlength=len(names)).tolist(), strict=True))
    boxes_per_image = np.array([int((~one.is_crowd).sum()) for one in dataset.annotations], np.int64)
    num_small, num_up_to_medium = int((areas < 32**2).sum()), int((areas < 96**2).sum())
    return Statistics(
        num_images=len(dataset),
        num_empty_images=int((boxes_per_image == 0).sum()),
        num_boxes=len(boxes),
        num_crowds=int(crowd.sum()),
        num_dropped=dataset.num_dropped,
        class_counts=counts,
        boxes_per_image=boxes_per_image,
        box_sizes=np.sqrt(width * height),
        aspect_ratios=width / height,
        box_images=np.repeat(np.arange(len(dataset)), boxes_per_image),
        box_classes=classes,
        image_sizes=dataset.sizes,
        num_small=num_small,
        num_medium=num_up_to_medium - num_small,
        num_large=len(boxes) - num_up_to_medium,
        mask_fractions=_mask_fractions(dataset, ~crowd, width * height),
    )


def _mask_fractions(
    dataset: CocoDataset, is_box: NDArray[np.bool_], box_areas: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    found, places = dataset.annotations.segmentations, dataset.annotations.places
    if found is None or places is None:
        return None
    has_mask = ~found.is_missing[places[is_box]]
    return np.asarray(found.areas()[places[is_box]] / box_areas)[has_mask]
