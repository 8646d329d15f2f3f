"""The objects of all images in columns, from which those of one image are cut when they are asked for.

A Python object for every image would be sent to each loading process one by one, and a forked process would copy the
memory of all it looks at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


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
    """(n,): square pixels, the file's `area` (of the mask) or width * height where it is missing"""
    annotation_ids: tuple[int | str, ...]
    """as they come"""


class AnnotationTable(Sequence[Annotations]):
    """The annotations of every image, by its place in the data set.

    Args:
        counts: (images,) objects of each image.
        boxes, labels, is_crowd, areas: as in `Annotations`, those of the first image first.
        annotation_ids: as they come, in the same order; integers of 64 bits or objects.
    """

    def __init__(
        self,
        counts: NDArray[np.int64],
        boxes: NDArray[np.float32],
        labels: NDArray[np.int64],
        is_crowd: NDArray[np.bool_],
        areas: NDArray[np.float32],
        annotation_ids: NDArray[Any],
    ) -> None:
        self.counts, self.boxes, self.labels, self.is_crowd, self.areas = counts, boxes, labels, is_crowd, areas
        self.annotation_ids = annotation_ids
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
        place = range(len(self))[index]
        own = slice(self._ends[place - 1] if place else 0, self._ends[place])
        return Annotations(
            boxes=self.boxes[own],
            labels=self.labels[own],
            is_crowd=self.is_crowd[own],
            areas=self.areas[own],
            annotation_ids=tuple(self.annotation_ids[own].tolist()),
        )
