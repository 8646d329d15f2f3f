"""One run as the page shows it."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megdet.data.far.folder import ImageFolder, folder_of
from megdet.errors import printable
from megdet.evaluation.coco_numbers import Evaluation
from megdet.files import read_json
from megdet.recipe import Recipe
from megdet.report.analysis import analysis_of
from megdet.report.course import course_of
from megdet.report.machine import Session, machine_facts, sessions_of
from megdet.report.pictures import pictures_of
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.run_length import decay_of
from megdet.studies.comparison.recipes import departures, value_text
from megdet.studies.comparison.runs import ScoredRun, read_scored_run, recipe_of


@dataclass(frozen=True)
class Places:
    """Where the validation data are, if not where the recipe says."""

    annotations: Path | None = None
    images: ImageFolder | None = None


def run_page(folder: RunFolder, places: Places, resamples: int) -> tuple[dict[str, Any], ScoredRun | None]:
    """What the page has of a run, and the run with its detections where they and the ground truth are there.

    A run without an evaluation, or whose validation data are elsewhere now, has fewer sections, and `notes` say why.
    Raises InputError where the folder is no run or a file of it is damaged.
    """
    recipe, notes = recipe_of(folder), []
    metrics = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    sessions = sessions_of(folder)
    out_of = sessions[-1].training.positive_out_of if sessions else {}
    course = course_of(metrics, recipe, str(folder.metrics), out_of)
    evaluated, why = _evaluated(folder, recipe, places)
    if why:
        notes.append(why)
    numbers = _numbers(folder, evaluated)
    if outdated := _outdated(numbers, course):
        notes.append(outdated)
    page: dict[str, Any] = {
        "name": printable(str(folder.path)),
        "facts": _facts(recipe, course, metrics, sessions),
        "recipe": [[key, value_text(value), value_text(usual)] for key, (value, usual) in departures(recipe).items()],
        "course": course,
        "numbers": numbers,
        "analysis": {},
        "pictures": {},
        "notes": notes,
    }
    if evaluated is not None:
        annotations = places.annotations or Path(recipe.data.val_annotations)
        images = folder_of(places.images or recipe.data.val_images, recipe.data)
        missing: list[str] = []
        for kind in evaluated.kinds:
            own = page["analysis"][kind] = analysis_of(evaluated, kind, resamples)
            page["pictures"][kind], faults = pictures_of(evaluated, kind, annotations, images, own["threshold"])
            missing += [fault for fault in faults if fault not in missing]
        notes += [missing[0], *([f"So are {len(missing) - 1} others."] if len(missing) > 1 else [])] if missing else []
    return page, evaluated


def _evaluated(folder: RunFolder, recipe: Recipe, places: Places) -> tuple[ScoredRun | None, str]:
    """The detections on their ground truth, or why there are none."""
    if not folder.detections.is_file():
        return None, (
            f"This run has no evaluation yet; `megdet evaluate {printable(str(folder.path))}` makes one, then report "
            "again."
        )
    truth = places.annotations or Path(recipe.data.val_annotations)
    if places.annotations is None and not truth.is_file():
        return None, (
            f"The validation annotations {printable(str(truth))} are not here, so there are scores but no curves, "
            "mistakes and pictures; name them with --annotations and --images."
        )
    return read_scored_run(folder, places.annotations), ""


def _numbers(folder: RunFolder, evaluated: ScoredRun | None) -> dict[str, Any]:
    """The COCO numbers by kind, without the classes; empty without an evaluation."""
    if evaluated is not None:
        return evaluated.evaluation.totals()
    if not folder.evaluation.is_file():
        return {}
    return Evaluation.from_dict(read_json(folder.evaluation), str(folder.evaluation)).totals()


def _outdated(numbers: dict[str, Any], course: dict[str, Any]) -> str:
    """A sentence where the run has gone on since the evaluation that the scores are from; else nothing."""
    if not numbers or not course["evaluations"] or not course["epochs"]:
        return ""
    last, reached = course["evaluations"][-1], course["reached"]
    if last["epoch"] >= reached or last["mmAP"] != numbers["bbox"]["AP"]:  # `megdet evaluate` may have made others
        return ""
    return f"The scores are those after epoch {last['epoch']:.3g}; the run has gone on to epoch {reached:.3g} since."


def _facts(
    recipe: Recipe, course: dict[str, Any], metrics: list[dict[str, Any]], sessions: list[Session]
) -> list[tuple[str, str]]:
    """What one wants to know first, as (what, value)."""
    backbone = getattr(recipe.model, "backbone", None)
    steps = [line for line in metrics if "loss" in line]
    done = f"{steps[-1]['epoch']:.3g} of {decay_of(recipe.schedule).epochs:g} epochs" if steps else "no step yet"
    facts = [
        ("detector", recipe.model.kind.replace("_", " ") + (f", {backbone.name}" if backbone is not None else "")),
        ("mini-batch", f"{recipe.batch_size} images, batch norm over {recipe.bn_size or 'none (frozen)'}"),
        ("trained", f"{done}, {len(steps)} steps"),
        ("time", str(timedelta(seconds=round(course["seconds"])))),
    ]
    if course["images_per_second"]:
        facts.append(("speed", f"{course['images_per_second']:.3g} images a second"))
    facts += [("rate", f"{recipe.optimizer.base_lr:g} for 16 images, {recipe.optimizer.kind}")]
    facts += [("precision", recipe.precision), ("seed", str(recipe.seed))]
    return [(what, printable(value)) for what, value in facts + machine_facts(sessions)]
