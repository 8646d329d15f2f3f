"""The COCO numbers of a trained detector, written beside its detections."""

from dataclasses import dataclass, replace
from pathlib import Path

from megdet.data.classes import category_ids_for
from megdet.data.coco import validation_set
from megdet.data.shared import once_a_host
from megdet.distributed.world import World
from megdet.evaluation.coco_numbers import Evaluation, evaluate_detections
from megdet.files import write_result
from megdet.inference.predict import detect_dataset
from megdet.inference.trained import TrainedDetector
from megdet.run_folder.folder import RunFolder


@dataclass(frozen=True)
class Evaluated:
    """The numbers, the same on every rank, and their files."""

    numbers: Evaluation
    evaluation: Path
    detections: Path


def evaluate_run(
    trained: TrainedDetector,
    folder: RunFolder,
    world: World,
    data: tuple[str | Path, str | Path] | None = None,
    *,
    workers: int,
    out: Path | None = None,
    is_own: bool = True,
    suffix: str = "",
) -> Evaluated:
    """Detect a data set and compute the numbers; every rank calls it, rank 0 writes.

    Args:
        trained: the detector.
        folder: the detector's run folder.
        world: all ranks.
        data: annotations and image folder; by default those that the run is validated on.
        workers: loading processes of this rank.
        out: where the two files are written; by default the run folder or, if data, recipe or weights are not the
            run's own, a folder in its `evaluations/`.
        is_own: whether recipe and weights are the run's own.
        suffix: suffix of the name of that folder.

    Raises:
        InputError: the data cannot be read or have classes that the detector does not know.
    """
    annotations, images = data or (trained.recipe.data.val_annotations, trained.recipe.data.val_images)
    own = replace(trained.recipe.data, val_annotations=str(annotations), val_images=str(images))
    dataset = once_a_host(world, lambda: validation_set(own, with_masks=trained.model.has_masks))
    ids = category_ids_for(trained.class_names, dataset)
    results = detect_dataset(trained.model, trained.recipe, dataset, ids, world, workers=workers)
    if out is None:
        out = folder.path if is_own else folder.path / "evaluations" / f"{Path(annotations).stem}{suffix}"
    evaluation, detections = out / folder.evaluation.name, out / folder.detections.name

    def count() -> Evaluation:
        numbers = evaluate_detections(dataset.annotations_file, results, has_masks=trained.model.has_masks)
        write_result(detections, results)
        write_result(evaluation, numbers.as_dict())
        return numbers

    return Evaluated(world.on_first(count), evaluation, detections)
