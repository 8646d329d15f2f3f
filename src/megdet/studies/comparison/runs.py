"""Runs that were evaluated on the same images, read for a comparison or a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megdet.errors import InputError
from megdet.evaluation.coco_numbers import Evaluation, evaluate_task
from megdet.evaluation.counting import Kind, TruthColumns
from megdet.evaluation.matches import ClassMatches, match
from megdet.evaluation.task import Sides, Task, read_task
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.run_folder.folder import RunFolder, not_a_run


@dataclass(frozen=True)
class ScoredRun:
    """A run with the ground truth and the detections of its last evaluation."""

    folder: RunFolder
    recipe: Recipe
    task: Task

    @property
    def name(self) -> str:
        """The path of its folder, as it was given."""
        return str(self.folder.path)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The COCO numbers of the detections."""
        return evaluate_task(self.task)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What can be evaluated: boxes, and masks if the run has any."""
        return ("bbox",) if self.task.masks is None else ("bbox", "segm")

    def sides(self, kind: Kind) -> Sides:
        """Ground truth and detections of boxes or of masks. Raises InputError if the run has no masks."""
        if kind == "bbox":
            return self.task.boxes
        if self.task.masks is None:
            raise InputError(f"{self.name}: its detections have no masks; compare boxes")
        return self.task.masks

    def matches(self, kind: Kind) -> list[ClassMatches]:
        """The matched detections of every class; matching is done once."""
        if kind not in self._matched:
            self._matched[kind] = match(self.sides(kind), len(self.task.image_ids), len(self.task.class_names), kind)
        return self._matched[kind]

    @cached_property
    def _matched(self) -> dict[Kind, list[ClassMatches]]:
        return {}


def recipe_of(folder: RunFolder) -> Recipe:
    """The complete recipe of a run. Raises InputError if the folder is not a run."""
    if not folder.path.exists():
        raise InputError(f"{folder.path}: no such folder")
    if not folder.recipe.is_file():
        raise not_a_run(folder)
    return load_recipe(str(folder.recipe))


def read_scored_run(folder: RunFolder, annotations: Path | None = None) -> ScoredRun:
    """A run with its detections and the ground truth of its recipe; `annotations` is that file at another place.

    Raises InputError if the folder is not a run, the run has no detections, or a file is missing or does not fit.
    """
    recipe = recipe_of(folder)
    if not folder.detections.is_file():
        raise InputError(
            f"{folder.path}: there is no {folder.detections.name} in this folder; `megdet evaluate {folder.path}` "
            "writes it"
        )
    truth = annotations or Path(recipe.data.val_annotations)
    if not truth.is_file():
        raise InputError(
            f"{folder.path}: {truth}, its validation annotations, is not there: start in the folder that the path "
            "counts from, or name the file with --annotations"
        )
    return ScoredRun(folder, recipe, read_task(truth, folder.detections))


def check_same_images(runs: Sequence[ScoredRun]) -> None:
    """Raise InputError for runs whose ground truth differs: their scores cannot be compared."""
    first = runs[0]
    for other in runs[1:]:
        ours, theirs = first.task, other.task
        is_same = (
            ours.image_ids == theirs.image_ids
            and ours.category_ids == theirs.category_ids
            and ours.class_names == theirs.class_names
            and _same_truth(ours.boxes.truth, theirs.boxes.truth)
        )
        if not is_same:
            raise InputError(
                f"{other.name} is evaluated on other images, classes or boxes "
                f"({other.recipe.data.val_annotations}) than {first.name} ({first.recipe.data.val_annotations}): "
                "evaluate both on one file with `megdet evaluate --data`, or compare runs of the same data"
            )


def _same_truth(ours: TruthColumns, theirs: TruthColumns) -> bool:
    names = ("images", "classes", "boxes", "is_crowd")
    return all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in names)
