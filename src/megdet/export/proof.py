"""The proof beside an exported file: it finds in the validation images what the detector finds that it was made of."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from megdet.data.classes import category_ids_for
from megdet.data.coco import CocoDataset, validation_set
from megdet.data.loader import group_batches
from megdet.data.plan import evaluation_plan
from megdet.detections import Detections
from megdet.evaluation.coco_numbers import Evaluation, evaluate_detections
from megdet.export.quantized import Quantized
from megdet.exported.detector import ExportedDetector
from megdet.files import read_json
from megdet.inference.predict import at_file_size, detect_batch, detections_of_image
from megdet.inference.trained import TrainedDetector
from megdet.structures import Batch

BATCHES = (1, 2, 8)
"""Images of a batch, each tried on all images."""
MOST_AP = 0.001
"""How far the AP of boxes or of masks may be from that of the detector: 0.1 points."""
MOST_AP_INT8 = 0.01
"""How far it may be where the file computes with 8-bit integers: 1 point."""
_SAME = 0.5
"""Overlap from which two detections of one class may be the same."""


@dataclass
class Difference:
    """What the detections of two detectors in the same images have not in common."""

    matched: int = 0
    """detections of the one that the other has too: the same class, an overlap of at least 0.5"""
    unmatched: int = 0
    """those that only one of them has"""
    box: float = 0.0
    """the largest difference of a coordinate among those that match, in pixels of the file"""
    score: float = 0.0
    """the largest difference of a score among them"""

    def add(self, ours: Detections, theirs: Detections) -> None:
        """Take one more image into account."""
        pairs = matching(ours, theirs)
        self.matched += len(pairs)
        self.unmatched += len(ours) + len(theirs) - 2 * len(pairs)
        for mine, other in pairs:
            self.box = max(self.box, float(np.abs(ours.boxes[mine] - theirs.boxes[other]).max()))
            self.score = max(self.score, float(abs(ours.scores[mine] - theirs.scores[other])))


@dataclass
class Look:
    """The exported file at work in one way, beside the detector."""

    name: str
    """batch 1, 2 or 8: given the same pixels; files: reads and resizes the files itself"""
    difference: Difference = field(default_factory=Difference)
    ap: dict[str, float] = field(default_factory=dict)
    """mmAP of boxes (bbox) and masks (segm), 0 to 1"""


@dataclass
class Proof:
    """What was compared, and how it came out."""

    file: str
    images: int
    of_images: int
    """of the data set"""
    annotations: str
    precision: str
    """in which the detector computed; the file has float32"""
    ours: dict[str, float]
    """mmAP of the detector itself"""
    looks: list[Look]
    allowed: float = MOST_AP
    int8: Quantized | None = None
    """of a file that computes with 8-bit integers"""

    @property
    def worst(self) -> float:
        """The largest difference of an AP from the detector's."""
        return max(abs(look.ap[kind] - ap) for look in self.looks for kind, ap in self.ours.items())

    @property
    def holds(self) -> bool:
        """Whether no AP differs by more than allowed."""
        return self.worst <= self.allowed

    @property
    def warning(self) -> str:
        """Why equal APs prove little here; empty if they prove something."""
        if max(self.ours.values(), default=0.0) > 0.0:
            return ""
        return "The detector finds none of these objects, so equal APs prove little: look at unmatched, box and score."

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"worst_difference_of_AP": self.worst, "holds": self.holds, "warning": self.warning}

    def rows(self) -> list[tuple[str, ...]]:
        """A table: a heading, then a row a look."""
        kinds = list(self.ours)
        named = {"bbox": "mmAP", "segm": "mask mmAP"}
        heading = ("", "same", "unmatched", "box, px", "score", *(named[kind] for kind in kinds))
        rows = [heading, ("the detector", *[""] * 4, *(f"{100 * self.ours[kind]:.2f}" for kind in kinds))]
        for look in self.looks:
            own = look.difference
            numbers = str(own.matched), str(own.unmatched), f"{own.box:.1e}", f"{own.score:.1e}"
            rows.append((look.name, *numbers, *(f"{100 * look.ap[kind]:.2f}" for kind in kinds)))
        return rows


def prove(
    trained: TrainedDetector,
    file: Path,
    *,
    images: int | None = None,
    workers: int = 0,
    allowed: float = MOST_AP,
    progress: Callable[[int, int], None] | None = None,
) -> Proof:
    """Compare a file with the detector that it was made of.

    Args:
        trained: the detector, on the CPU; it computes in float32 here, since the file does.
        file: the exported file.
        images: how many of the validation images, evenly spread; None = all of them.
        workers: processes that load images.
        allowed: difference of an AP, 0 to 1, up to which the proof holds.
        progress: called with the images done and all of them.

    Raises:
        InputError: the validation data cannot be read, or the file is no exported detector.
    """
    exported = ExportedDetector(file)
    whole = validation_set(trained.recipe.data, with_masks=exported.has_masks)
    chosen = some_of(len(whole), images)
    recipe = replace(trained.recipe, evaluation=replace(trained.recipe.evaluation, batch_size=max(BATCHES)))
    plan = evaluation_plan(whole.sizes[chosen], recipe)
    plan = [
        replace(group, images=tuple(replace(own, index=int(chosen[own.index])) for own in group.images))
        for group in plan
    ]
    ids = category_ids_for(exported.class_names, whole)
    looks = [*(Look(f"batch {size}") for size in BATCHES), Look("files")]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *(look.name for look in looks))}
    done = 0
    for batch in group_batches(whole, plan, workers=workers, device=torch.device("cpu")):
        for name, found in _of_batch(trained, exported, whole, batch).items():
            for index, own in zip(batch.image_index, found, strict=True):
                rows[name] += own.to_coco(whole.image_ids[index], ids)
            if name == "ours":
                ours = found
                continue
            look = next(look for look in looks if look.name == name)
            for mine, own in zip(ours, found, strict=True):
                look.difference.add(mine, own)
        done += len(batch.image_index)
        if progress is not None:
            progress(done, len(chosen))
    truth = _truth_of(whole, chosen)
    has_masks = exported.has_masks
    for look in looks:
        look.ap = _aps(evaluate_detections(truth, rows[look.name], has_masks=has_masks))
    own_aps = _aps(evaluate_detections(truth, rows["ours"], has_masks=has_masks))
    place = str(whole.annotations_file)
    return Proof(file.name, len(chosen), len(whole), place, "float32", own_aps, looks, allowed)


def some_of(count: int, wanted: int | None) -> np.ndarray:
    """Places of so many of a number of images, evenly spread."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, wanted).round().astype(np.int64)


def _of_batch(
    trained: TrainedDetector, exported: ExportedDetector, dataset: CocoDataset, batch: Batch
) -> dict[str, list[Detections]]:
    """What is found in a batch by the detector ("ours") and by the file in each way."""
    sizes = [tuple(dataset.sizes[index].tolist()) for index in batch.image_index]
    found = at_file_size(detect_batch(trained.model, batch.pixels, batch.sizes, "float32"), batch.scales)
    exact = trained.model.exact_paste
    result = {"ours": [detections_of_image(found[row : row + 1], size, exact=exact) for row, size in enumerate(sizes)]}
    names, ids = exported.class_names, exported.category_ids
    result["ours"] = [replace(own, class_names=names, category_ids=ids) for own in result["ours"]]
    pixels, on_canvas = batch.pixels.contiguous().numpy(), batch.sizes.numpy()
    for count in BATCHES:
        own: list[Detections] = []
        for first in range(0, len(sizes), count):
            part = slice(first, first + count)
            own += exported.detections_of(exported.program(pixels[part], on_canvas[part]), on_canvas[part], sizes[part])
        result[f"batch {count}"] = own
    result["files"] = [exported.detect_file(dataset.image_path(index)) for index in batch.image_index]
    return result


def matching(ours: Detections, theirs: Detections) -> list[tuple[int, int]]:
    """Pairs of detections of one class, each with the one of the other side that it overlaps most; the best first."""
    overlap = _overlaps(ours.boxes, theirs.boxes)
    overlap[ours.labels[:, None] != theirs.labels[None, :]] = 0
    pairs, is_free = [], np.ones(len(theirs), np.bool_)
    for mine in range(len(ours)):
        own = np.where(is_free, overlap[mine], 0)
        if len(own) and own.max() >= _SAME:
            # of boxes that overlap alike, such as two in the same place, that of the nearest score
            alike = np.flatnonzero(own >= own.max() - 1e-4)
            other = int(alike[np.abs(theirs.scores[alike] - ours.scores[mine]).argmin()])
            is_free[other] = False
            pairs.append((mine, other))
    return pairs


def _overlaps(a: Float[np.ndarray, "ours 4"], b: Float[np.ndarray, "theirs 4"]) -> Float[np.ndarray, "ours theirs"]:
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.maximum(high - low, 0).prod(2)
    areas = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1)[None]
    overlaps: Float[np.ndarray, "ours theirs"] = both / np.maximum(areas - both, 1e-12)
    return overlaps


def _truth_of(dataset: CocoDataset, chosen: np.ndarray) -> Path | dict[str, Any]:
    """The ground truth of some images."""
    if len(chosen) == len(dataset):
        return dataset.annotations_file
    truth: dict[str, Any] = read_json(dataset.annotations_file)
    kept = {dataset.image_ids[index] for index in chosen.tolist()}
    return truth | {
        "images": [image for image in truth["images"] if image["id"] in kept],
        "annotations": [own for own in truth["annotations"] if own["image_id"] in kept],
    }


def _aps(numbers: Evaluation) -> dict[str, float]:
    return {kind: own["AP"] for kind, own in numbers.totals().items()}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the heading."""
    heading, *others = rows
    lines = [heading, ["---"] * len(heading), *others]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
