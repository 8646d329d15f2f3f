"""The detections of one image for users of the Python interface: on the CPU, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray

from megdet.addresses import is_address
from megdet.data.image import read_image
from megdet.data.rle import Rle, decode_mask
from megdet.drawing import draw_detections
from megdet.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

SHOWN_SCORE = 0.5
"""Least score of the detections that `draw` and a notebook show."""


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The objects found in one image, best first. `len` counts them; an index, a slice or a mask chooses some."""

    boxes: Float[np.ndarray, "detections 4"]
    """x1, y1, x2, y2 in pixels of the image"""
    scores: Float[np.ndarray, " detections"]
    """0 to 1"""
    labels: Int64[np.ndarray, " detections"]
    """indices into `class_names`"""
    class_names: tuple[str, ...]
    """all classes that the detector knows"""
    category_ids: tuple[int, ...]
    """the number of each class in the COCO file that the detector was trained on"""
    size: tuple[int, int]
    """height and width of the image in pixels"""
    masks: tuple[Rle, ...] | None = None
    """the mask of each object as COCO RLE; None if the detector finds no masks"""
    source: str = ""
    """where the image came from: a path or an address; empty if unknown"""
    pixels: NDArray[np.uint8] | None = field(default=None)
    """the image, height x width x RGB; None if it is read from `source` when needed"""

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: Any) -> "Detections":
        chosen = np.atleast_1d(np.arange(len(self))[rows])
        masks = None if self.masks is None else tuple(self.masks[row] for row in chosen.tolist())
        return replace(
            self, boxes=self.boxes[chosen], scores=self.scores[chosen], labels=self.labels[chosen], masks=masks
        )

    def __repr__(self) -> str:
        counts = [(int((self.labels == label).sum()), name) for label, name in enumerate(self.class_names)]
        found = ", ".join(f"{count} {name}" for count, name in sorted(counts, key=lambda own: -own[0]) if count)
        where = f" in {self.source}" if self.source else ""
        return f"<Detections{where}: {found or 'nothing'}>"

    @property
    def names(self) -> list[str]:
        """The class of each detection."""
        return [self.class_names[label] for label in self.labels.tolist()]

    @property
    def image(self) -> NDArray[np.uint8]:
        """The image, height x width x RGB; read again if it came from a file. Raises InputError if there is none."""
        if self.pixels is not None:
            return self.pixels
        if not self.source:
            raise InputError("these detections have no image: call the detector with the image")
        return read_image(Path(self.source), size=self.size)

    def above(self, score: float) -> "Detections":
        """The detections of at least this score."""
        return self[self.scores >= score]

    def mask(self, row: int) -> Bool[np.ndarray, "height width"]:
        """The mask of one object as pixels of the image. Raises InputError if the detector finds no masks."""
        if self.masks is None:
            raise InputError("this detector finds boxes but no masks: train one of model.kind mask_rcnn")
        return decode_mask(self.masks[row])

    def draw(self, score: float = SHOWN_SCORE) -> "Image.Image":
        """The image with its detections of at least this score drawn, as a Pillow image; small images are enlarged."""
        shown = self.above(score)
        masks = None if shown.masks is None or not len(shown) else [shown.mask(row) for row in range(len(shown))]
        return draw_detections(self.image, shown.boxes, shown.names, shown.scores, shown.labels.tolist(), masks)

    def to_coco(
        self, image_id: int | str | None = None, category_ids: Sequence[int | None] | None = None
    ) -> list[dict[str, Any]]:
        """The rows of a COCO result file: image_id, category_id, bbox (x, y, width, height), score, segmentation.

        Args:
            image_id: the image id of all rows; by default the name of the image's file.
            category_ids: the category id of each class, by default `self.category_ids`; None leaves a class out.
        """
        ids = self.category_ids if category_ids is None else category_ids
        inside = self.source.partition("::")[0] if is_address(self.source) else self.source  # of an archive
        name = Path(inside).name if image_id is None else image_id
        rows = []
        for row, ((x1, y1, x2, y2), score, label) in enumerate(
            zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        ):
            if ids[label] is None:
                continue
            box = [round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)]
            rows.append({"image_id": name, "category_id": ids[label], "bbox": box, "score": round(score, 6)})
            if self.masks is not None:
                rows[-1]["segmentation"] = self.masks[row]
        return rows

    def to_torchvision(self) -> dict[str, Any]:
        """`boxes`, `labels`, `scores` and `masks` as torchvision's detectors return them: tensors, labels from 1."""
        import torch

        found = {
            "boxes": torch.from_numpy(self.boxes).float(),
            "labels": torch.from_numpy(self.labels) + 1,
            "scores": torch.from_numpy(self.scores).float(),
        }
        if self.masks is not None:
            found["masks"] = torch.from_numpy(self._stacked_masks()[:, None]).float()
        return found

    def to_supervision(self) -> Any:
        """The detections as `supervision.Detections`. Raises InputError if that package is not installed."""
        try:
            import supervision
        except ImportError:
            raise InputError("supervision is not installed: pip install supervision") from None
        masks = None if self.masks is None or not len(self) else self._stacked_masks()
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=masks,
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.names)},
        )

    def _stacked_masks(self) -> Bool[np.ndarray, "detections height width"]:
        masks = [self.mask(row) for row in range(len(self))]
        return np.stack(masks) if masks else np.zeros((0, *self.size), np.bool_)

    def _repr_png_(self) -> bytes:
        """The picture that a notebook shows."""
        file = BytesIO()
        self.draw().save(file, "png")
        return file.getvalue()
