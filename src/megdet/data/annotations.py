"""The objects of all images in columns; the objects of one image are cut out on demand.

Python objects, one an image, would be pickled one by one for each loading process, and a forked process would copy the
memory of every object that it reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from megdet.data.segmentations import Segmentation, Segmentations


@dataclass(frozen=True, slots=True)
class Annotations:
    """The objects of one image, clipped to it, in the order of the file."""

    boxes: NDArray[np.float32]
    """(n, 4): x1, y1, x2, y2 in pixels"""
    labels: NDArray[np.int64]
    """(n,): 0 .. num_classes - 1, an index into `class_names`"""
    is_crowd: NDArray[np.bool_]
    """(n,): one box around many objects; never a training target"""
    areas: NDArray[np.float32]
    """(n,): square pixels: the file's `area` (of the mask), or width * height if the file has none"""
    annotation_ids: tuple[int | str, ...]
    """as in the file"""


class AnnotationTable(Sequence[Annotations]):
    """The annotations of every image, by its place in the data set.

    Args:
        counts: (images,) objects of each image.
        boxes, labels, is_crowd, areas: as in `Annotations`, image after image.
        annotation_ids: as in the file, in the same order; 64-bit integers or objects.
        segmentations: of all objects of the file; None if they were not asked for.
        places: (objects,) index of each object's segmentation in `segmentations`; None without them.
    """

    def __init__(
        self,
        counts: NDArray[np.int64],
        boxes: NDArray[np.float32],
        labels: NDArray[np.int64],
        is_crowd: NDArray[np.bool_],
        areas: NDArray[np.float32],
        annotation_ids: NDArray[Any],
        segmentations: Segmentations | None = None,
        places: NDArray[np.int64] | None = None,
    ) -> None:
        self.counts, self.boxes, self.labels, self.is_crowd, self.areas = counts, boxes, labels, is_crowd, areas
        self.annotation_ids, self.segmentations, self.places = annotation_ids, segmentations, places
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Annotations: ...

    @overload
    def __getitem__(self, index: slice) -> list[Annotations]: ...

    def __getitem__(self, index: int | slice) -> Annotations | list[Annotations]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        own = self._rows(index)
        return Annotations(
            boxes=self.boxes[own],
            labels=self.labels[own],
            is_crowd=self.is_crowd[own],
            areas=self.areas[own],
            annotation_ids=tuple(self.annotation_ids[own].tolist()),
        )

    def segmentations_of(self, index: int) -> list[Segmentation]:
        """The segmentations of one image, in the order of its `Annotations`. Raises ValueError if not read."""
        if self.segmentations is None or self.places is None:
            raise ValueError("the data set was read without masks")
        return [self.segmentations[place] for place in self.places[self._rows(index)].tolist()]

    def _rows(self, index: int) -> slice:
        place = range(len(self))[index]
        return slice(self._ends[place - 1] if place else 0, self._ends[place])
