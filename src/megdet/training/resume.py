"""Resuming a run: its folder is claimed, its newest checkpoint is checked and restored on every rank."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megdet.data.coco import CocoDataset
from megdet.data.plan import TrainingPlan
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.files import delete_leftovers
from megdet.model.detector import Detector
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe, first_difference, parse_recipe
from megdet.run_folder.checkpoint_files import (
    Checkpoint,
    DamagedError,
    checkpoint_step,
    checkpoints,
    open_checkpoint,
    set_aside,
)
from megdet.run_folder.environment import collect_environment
from megdet.run_folder.folder import FolderLock, RunFolder
from megdet.run_folder.sessions import write_environment
from megdet.run_folder.tensor_check import check_finite, check_tensors
from megdet.run_length import total_steps
from megdet.training.datasets import fingerprint
from megdet.training.position import Position
from megdet.training.trainer import Tensors, Trainer, restore_everywhere


def check_folder(folder: RunFolder, recipe: Recipe) -> None:
    """Refuse a run folder that holds another recipe; writes nothing."""
    text = folder.read_recipe()
    if text is None:
        return
    difference = first_difference(recipe, parse_recipe(text, str(folder.recipe)))
    if difference:
        raise InputError(
            f"{folder.path} holds a run of another recipe ({difference}): choose another --run folder, "
            "or repeat that run's recipe to resume it"
        )


def facts_of_training(model: Detector, plan: TrainingPlan) -> dict[str, Any]:
    """Numbers that follow from recipe and data, for readers of a run folder who have neither."""
    samples = {count.name: count.out_of_samples(model.architecture) for count in model.counts}
    last_step = total_steps(plan.recipe, plan.num_images)
    return {"num_images": plan.num_images, "last_step": last_step, "positive_out_of": samples}


def claim_folder(folder: RunFolder, recipe: Recipe, world: World, training: Mapping[str, Any]) -> FolderLock | None:
    """Make the folder if it is missing, lock it, write the recipe into it and note this start of the run.

    `training` goes into the entry of environment.json for this start.

    Returns the lock on rank 0; closing it releases it. Raises InputError if another run has locked the folder.
    """
    locks: list[FolderLock] = []

    def claim() -> None:
        folder.create()
        locks.append(folder.lock())
        delete_leftovers(folder.path, inside=True)
        folder.write_recipe(dump_recipe(recipe))
        write_environment(folder, {**collect_environment(world.size, str(world.device)), "training": dict(training)})

    world.on_first(claim)
    return locks[0] if locks else None


def resume(trainer: Trainer, folder: RunFolder, dataset: CocoDataset, world: World) -> Position:
    """Go on from rank 0's newest checkpoint, if it has one: only rank 0 reads, every rank gets the tensors.

    A damaged checkpoint is renamed, and the one before is taken. Raises InputError, before any tensor is changed, if
    all are damaged, or if the checkpoint is of other data or of another run.
    """
    tensors: Tensors = {}

    def read() -> Position:
        damage: dict[Path, DamagedError] = {}
        for path in reversed(checkpoints(folder)):
            try:
                position = _read(path, trainer, dataset, tensors)
            except DamagedError as error:
                damage[path] = error
                continue
            warnings = tuple(_do_without(path, error, position.step) for path, error in damage.items())
            unevaluated = tuple(checkpoint_step(own) for own in checkpoints(folder) if not _is_evaluated(own))
            return replace(position, unevaluated=unevaluated, warnings=warnings)
        if damage:
            raise next(iter(damage.values()))
        return Position()

    position = world.on_first(read)
    if position.step:
        restore_everywhere(trainer, tensors, position.step, world)
    return position


def start_at(trainer: Trainer, path: Path, dataset: CocoDataset, world: World) -> Position:
    """Start from one checkpoint, which only rank 0 reads, and change nothing on the disk.

    Raises InputError if it is damaged, of other data or of another run.
    """
    tensors: Tensors = {}
    position = world.on_first(lambda: _read(path, trainer, dataset, tensors))
    restore_everywhere(trainer, tensors, position.step, world)
    return position


def _read(path: Path, trainer: Trainer, dataset: CocoDataset, tensors: Tensors) -> Position:
    """Read a checkpoint into `tensors`; returns its position."""
    checkpoint = open_checkpoint(path)
    _check_data(checkpoint, dataset)
    tensors.update(read_tensors(checkpoint, trainer))
    state = checkpoint.state
    return Position(
        step=state.step,
        numbers=_numbers(checkpoint),
        evaluated_step=state.evaluated_step,
        best_score=state.best_score,
        best_step=state.best_step,
        roll_backs=state.roll_backs,
        rolled_back_to=state.rolled_back_to,
        val_data=state.val_data,
    )


def read_tensors(checkpoint: Checkpoint, trainer: Trainer) -> Tensors:
    """The tensors of a checkpoint, with the names, shapes and dtypes that the trainer has after so many steps.

    A checkpoint from before the gradient watch existed has no norms; the watch then starts empty. Raises InputError for
    a missing, surplus or different tensor, and for weights that are not finite.
    """
    layout = trainer.layout(checkpoint.state.step)
    tensors: Tensors = {}
    if "watch" not in checkpoint.hashes:
        del layout["watch"]
        tensors["watch"] = trainer.watch.state()
    if different := set(layout) ^ set(checkpoint.hashes):
        kind = min(different)
        how = ("lacks", "every") if kind in layout else ("has", "no")
        raise checkpoint.damaged(f"it {how[0]} {kind}.safetensors, which {how[1]} checkpoint of this recipe has")
    for kind, wanted in layout.items():
        tensors[kind] = checkpoint.tensors(kind)
        try:
            check_tensors(tensors[kind], wanted, str(checkpoint.file(kind)))
            if kind in ("model", "averages"):
                check_finite(tensors[kind], str(checkpoint.file(kind)))
        except InputError as error:
            raise checkpoint.damaged(str(error)) from None
    return tensors


def _do_without(path: Path, error: DamagedError, step: int) -> str:
    """Rename a damaged checkpoint; returns the sentence that says so."""
    what = str(error).partition("; delete the folder")[0]
    return f"Warning: {what}; the run goes on from that of step {step}, and the damaged one is now {set_aside(path)}"


def _check_data(checkpoint: Checkpoint, dataset: CocoDataset) -> None:
    state = checkpoint.state
    if state.num_images != len(dataset) or state.class_names != dataset.class_names:
        raise InputError(
            f"{checkpoint.path}: it was trained on {state.num_images} images of {len(state.class_names)} classes, "
            f"{dataset.annotations_file} has {len(dataset)} of {len(dataset.class_names)}: choose another --run folder"
        )
    if state.data != fingerprint(dataset):
        raise InputError(
            f"{checkpoint.path}: the images, boxes or weights have changed since in {dataset.annotations_file}: choose "
            "another --run folder, start_from goes on from these weights"
        )


def _numbers(checkpoint: Checkpoint) -> Evaluation | None:
    values = checkpoint.state.evaluation
    try:
        return None if values is None else Evaluation.from_dict(values, f"{checkpoint.path / 'state.json'}: evaluation")
    except InputError as error:
        raise checkpoint.damaged(str(error)) from None


def _is_evaluated(path: Path) -> bool:
    try:
        return open_checkpoint(path).state.evaluated_step == checkpoint_step(path)
    except InputError:
        return True  # a damaged old checkpoint is not needed to go on
