"""The COCO numbers of an exported file, written beside it; without torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megdet.data.coco import validation_set
from megdet.evaluation.coco_numbers import Evaluation, evaluate_detections
from megdet.exported.detector import ExportedDetector
from megdet.files import write_result


@dataclass(frozen=True)
class EvaluatedFile:
    """The numbers, and the files they are in."""

    numbers: Evaluation
    evaluation: Path
    detections: Path


def evaluate_exported_file(
    detector: ExportedDetector,
    data: tuple[str | Path, str | Path] | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluatedFile:
    """Detect a data set and count.

    Args:
        detector: the file.
        data: annotations and image folder; default those that its run was validated on.
        out: where the two files are written; default a folder beside it, named after it.
        progress: called with the images done and all of them.

    Raises:
        InputError: the data cannot be read or have classes that the detector does not know.
    """
    own = detector.recipe.data
    if data is not None:
        own = replace(own, val_annotations=str(data[0]), val_images=str(data[1]))
    dataset = validation_set(own, with_masks=detector.has_masks)
    rows = detector.detect_dataset(dataset, lambda done: progress(done, len(dataset)) if progress else None)
    numbers = evaluate_detections(dataset.annotations_file, rows, has_masks=detector.has_masks)
    folder = out or detector.path.with_name(f"{detector.path.stem}_evaluation")
    evaluation, detections = folder / "evaluation.json", folder / "detections.json"
    write_result(detections, rows)
    write_result(evaluation, numbers.as_dict())
    return EvaluatedFile(numbers, evaluation, detections)
