"""An exported detector as a function of images, with onnxruntime, NumPy and Pillow alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.data.classes import category_ids_for
from megdet.data.coco import CocoDataset
from megdet.data.far.folder import ImageFile
from megdet.data.image import read_image
from megdet.data.plan import evaluation_plan
from megdet.data.planned import PlannedGroup
from megdet.detections import Detections
from megdet.exported.masks import pasted
from megdet.exported.programs import open_program
from megdet.exported.resizing import RESIZE
from megdet.recipe import Recipe


def on_canvas(group: PlannedGroup, images: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Images resized onto their canvas, and their sizes there: what a graph takes."""
    resized = [RESIZE[own.resize](pixels, own.size) for own, pixels in zip(group.images, images, strict=True)]
    canvas = np.zeros((len(resized), *group.canvas, 3), resized[0].dtype)
    for row, small in enumerate(resized):
        canvas[row, : small.shape[0], : small.shape[1]] = small
    sizes = np.array([own.size for own in group.images], dtype=np.int64)
    return np.ascontiguousarray(canvas.transpose(0, 3, 1, 2)), sizes


class ExportedDetector:
    """Finds objects in images as the run does that it was exported from, to rounding.

    Args:
        path: a file that `megdet export` wrote: .onnx, which needs no torch, or .pt2.

    Raises:
        InputError: it is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.program, self.description = open_program(self.path)
        self.recipe: Recipe = self.description.parsed

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that it knows, in the order of their labels."""
        return self.description.class_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The number of each class in the COCO file that it was trained on."""
        return self.description.category_ids

    @property
    def has_masks(self) -> bool:
        """Whether it finds the pixels of an object, not its box alone."""
        return self.description.has_masks

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """What is found in images, each (height, width, 3) RGB of 8 bits, in their order.

        Images of one canvas are looked at together, up to `evaluation.batch_size` of the recipe.
        """
        sizes = np.array([pixels.shape[:2] for pixels in images], dtype=np.int64).reshape(-1, 2)
        found: dict[int, Detections] = {}
        for group in evaluation_plan(sizes, self.recipe):
            own = [images[image.index] for image in group.images]
            for image, pixels, detections in zip(group.images, own, self.detect_group(group, own), strict=True):
                found[image.index] = replace(detections, pixels=pixels)
        return [found[index] for index in range(len(images))]

    def detect_group(self, group: PlannedGroup, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """What is found in images that share a canvas."""
        pixels, sizes = on_canvas(group, images)
        outputs = self.program(pixels, sizes)
        return self.detections_of(outputs, sizes, [image.shape[:2] for image in images])

    def detections_of(
        self, outputs: Sequence[NDArray[Any]], sizes: NDArray[np.int64], file_sizes: Sequence[tuple[int, ...]]
    ) -> list[Detections]:
        """What the outputs of the graph say of each image; its sizes are those on the canvas and in its file."""
        return [
            self._of_image([output[row] for output in outputs], size, file_size)
            for row, (size, file_size) in enumerate(zip(sizes, file_sizes, strict=True))
        ]

    def _of_image(self, outputs: list[NDArray[Any]], size: NDArray[np.int64], file_size: tuple[int, ...]) -> Detections:
        is_found = outputs[2] >= 0
        boxes, scores, labels, *grids = (output[is_found] for output in outputs)
        height, width = file_size
        edges = size.astype(np.float32) / np.array([height, width], dtype=np.float32)
        boxes = boxes.astype(np.float64) / np.tile(edges[::-1].astype(np.float64), 2)
        masks = None
        if self.has_masks:
            exact = self.description.exact_paste
            masks = tuple(
                pasted(grid, box, (height, width), exact=exact) for grid, box in zip(grids[0], boxes, strict=True)
            )
        ids, names = self.category_ids, self.class_names
        return Detections(boxes, scores.astype(np.float64), labels.astype(np.int64), names, ids, (height, width), masks)

    def detect_file(self, file: ImageFile) -> Detections:
        """What is found in an image file. Raises InputError."""
        pixels = read_image(file, max_pixels=self.recipe.data.max_pixels)
        return replace(self.detect([pixels])[0], source=str(file))

    def detect_dataset(
        self, dataset: CocoDataset, progress: Callable[[int], None] | None = None
    ) -> list[dict[str, Any]]:
        """All detections of a data set as rows of a COCO result file, in the order of the evaluation plan.

        `progress` is called with the images done. Raises InputError for classes that the detector does not know, and
        for an image that cannot be read.
        """
        ids, rows, done = category_ids_for(self.class_names, dataset), list[dict[str, Any]](), 0
        for group in evaluation_plan(dataset.sizes, self.recipe):
            indices = [image.index for image in group.images]
            images = [
                read_image(dataset.image_path(index), size=tuple(dataset.sizes[index].tolist())) for index in indices
            ]
            for index, found in zip(indices, self.detect_group(group, images), strict=True):
                rows += found.to_coco(dataset.image_ids[index], ids)
            done += len(indices)
            if progress is not None:
                progress(done)
        return rows

    def __repr__(self) -> str:
        return f"<ExportedDetector {self.path.name}: {self.recipe.model.kind} of {len(self.class_names)} classes>"
