"""Training and evaluating, as the command line does it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megdet.api.detector import LoadedDetector
from megdet.api.loading import load
from megdet.distributed.failures import stop_together
from megdet.distributed.world import World, start_world
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.evaluation.exported_file import evaluate_exported_file
from megdet.exported.detector import ExportedDetector
from megdet.exported.programs import is_exported
from megdet.inference.fold import fold_batch_norms
from megdet.inference.trained import load_detector, precision_here
from megdet.recipe import Recipe
from megdet.recipe_check import flat_keys
from megdet.recipe_file import load_recipe, recipe_name
from megdet.report.report import write_report
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_path import run_of, suffix_of
from megdet.runtime import default_workers
from megdet.studies.evaluated_run import evaluate_run
from megdet.terminal import Terminal
from megdet.training.loop import train as train_recipe
from megdet.training.run import RunOptions
from megdet.training.trackers.trackers import send_files


@dataclass(frozen=True)
class TrainedRun:
    """A run that is done."""

    folder: Path
    """what it left: docs/run_folder.md tells"""
    evaluation: Evaluation
    """of its last weights; `evaluation.bbox.AP` is the mmAP, 0 to 1"""
    pictures: list[Path] = field(default_factory=list)
    """its course and some detections; of rank 0"""
    report: Path | None = None
    """one page of all of it, for a browser; of rank 0"""

    def load(self, **options: Any) -> LoadedDetector:
        """The trained detector; the options are those of `megdet.load`."""
        return load(self.folder, **options)


def train(
    recipe: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    run: str | Path | None = None,
    device: str = "",
    workers: int | None = None,
    **options: Any,
) -> TrainedRun:
    """Train a detector, or go on with a run that has been started, as `megdet train` does; it prints its progress.

    Call it in one process, or in each of those that torchrun starts.

    Args:
        recipe: the name of a packaged recipe (`megdet recipes` lists them), or a YAML file.
        overrides: keys of the recipe to change, dotted, {"schedule.epochs": 3}, or nested, {"schedule": {"epochs": 3}}.
        run: the run folder; default runs/ and the name of the recipe. If it holds a run, that goes on.
        device: cpu or cuda; empty is a GPU where there is one.
        workers: processes that load images; default one less than the cores.
        options: of `megdet.training.run.RunOptions`, such as `lane_width`.

    Raises:
        InputError: everything that a user can mend, before the first step where possible.
        DivergedError: the loss or gradient is not finite, or explodes.
    """
    own = load_recipe(str(recipe), _dotted(overrides))
    world = start_world(device)
    folder = RunFolder(Path("runs") / recipe_name(str(recipe)) if run is None else run)
    return trained_run(own, folder, RunOptions(_number_of(workers), **options), world)


def trained_run(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> TrainedRun:
    """Train, evaluate and, on rank 0, draw pictures and write the report; the trackers get both."""
    if folder.path == Path():
        raise InputError("the run folder has an empty name: choose one (--run)")
    evaluation = train_recipe(recipe, folder, options, world)
    if not world.is_first:
        return TrainedRun(folder.path, evaluation)
    from megdet.studies.run_pictures import draw_run  # here, because only one rank needs matplotlib

    pictures = draw_run(load_detector(folder, world.device), folder)
    report = write_report([folder.path])
    send_files(recipe, folder, pictures, [report], Terminal(stderr=True).print)
    return TrainedRun(folder.path, evaluation, pictures, report)


def evaluate(
    run: str | Path,
    data: tuple[str | Path, str | Path] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    device: str = "",
    workers: int | None = None,
    fold: bool = False,
) -> Evaluation:
    """The COCO numbers of a run's newest weights, which are written with the detections, as `megdet evaluate` does.

    Args:
        run: a run folder, one of its checkpoints (`runs/a/checkpoints/best`), or a file of `megdet export`, which takes
            only `data` and `out` besides.
        data: annotations and image folder; default those that the run is validated on.
        overrides: keys of its recipe to change, dotted, {"evaluation.flip": True}, or nested.
        out: where `evaluation.json` and `detections.json` are written; default the run folder, or a folder in it where
            data, recipe or weights are changed, or a folder beside the file.
        device: cpu or cuda; empty is a GPU where there is one.
        workers: processes that load images; default one less than the cores.
        fold: fold the batch norms into the convolutions before them.

    Raises:
        InputError: everything that a user can mend.
    """
    if data is not None and (isinstance(data, str | Path) or len(data) != 2):
        raise InputError(f"data is {data!r}: give two, the annotations and the folder of their images")
    if is_exported(run):
        if device or overrides or fold:
            raise InputError(f"{run}: an exported file is as it is: leave out device, overrides and fold")
        return evaluate_exported_file(ExportedDetector(run), data, None if out is None else Path(out)).numbers
    num_workers, world = _number_of(workers), start_world(device)
    with stop_together(world):
        folder, step = world.on_first(lambda: run_of(run))
        changed, _ = world.on_first(lambda: precision_here(folder, _dotted(overrides), world.device))
        trained = load_detector(folder, world.device, changed, step=step, world=world)
        if fold:
            fold_batch_norms(trained.model)
        is_own = data is None and not overrides and not fold and step is None
        return evaluate_run(
            trained,
            folder,
            world,
            data,
            workers=num_workers,
            out=None if out is None else Path(out),
            is_own=is_own,
            suffix=suffix_of(step),
        ).numbers


def _number_of(workers: int | None) -> int:
    if workers is not None and workers < 0:
        raise InputError(f"workers is {workers}: it is a number of processes, 0 for none")
    return default_workers() if workers is None else workers


def _dotted(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    return flat_keys(dict(overrides or {}))
