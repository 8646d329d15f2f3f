"""A sweep: trainings one after another, each in its own run folder and none of them twice.

A finished row has an `outcome.json` beside its metrics; the next call reads it and trains the rows that have none. An
interrupted row goes on from its checkpoint like any run. A training that diverges is a result, as in Table 2 of the
paper; every other error stops the sweep. Rows only compare if they have their recipes, the same data and the same file
of weights; data and weights are compared by their content, not by their paths.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from megdet.distributed.layout import recipe_layout
from megdet.distributed.world import World
from megdet.errors import DivergedError, InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.files import read_json, read_text, reason_of, write_json_atomically, write_text_atomically
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe, first_difference, parse_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.run_folder.sessions import read_environment
from megdet.training.datasets import fingerprint, load_datasets
from megdet.training.loop import train
from megdet.training.run import RunOptions

Train = Callable[[Recipe, RunFolder, RunOptions, World], Evaluation]
_OUTCOME, _WEIGHTS = "outcome.json", "weights.sha256"


@dataclass(frozen=True)
class Outcome:
    """The result of a row."""

    status: Literal["trained", "failed"]
    reason: str
    """why it failed"""
    steps: int
    """optimizer steps done"""
    hours: float
    """of all its steps, without evaluations"""
    ranks: int
    """processes at its end"""
    mmap: float | None
    """of the last evaluation, percent; None if it failed or the data have no boxes to find"""
    ap50: float | None
    """AP at IoU 0.5, percent"""
    mmar: float | None
    """mean recall of the last evaluation, percent"""
    train_data: str
    """hash of its training images and boxes"""
    val_data: str
    """hash of its validation images and boxes"""
    weights: str = ""
    """SHA-256 of the file that its backbone started from; "" = none, or a row from before this was noted"""
    ranks_differ: bool = False
    """whether it was stopped and resumed with another number of processes"""


def run_sweep(
    rows: Mapping[str, Recipe],
    folder: Path,
    options: RunOptions,
    world: World,
    *,
    chosen: Collection[str] | None = None,
    told: Callable[[str, dict[str, Outcome]], None],
    train_row: Train = train,
) -> dict[str, Outcome]:
    """Train the chosen rows (all by default) that have no outcome yet, each in `folder / name`.

    Every rank calls it. Returns all outcomes, also those of rows that were not chosen. `told` is called on rank 0
    before and after each training, with the name of the row and the outcomes so far. Raises InputError, before any
    training where possible: if a row does not fit the ranks, if a folder holds another recipe, other data or other
    weights, and for everything that stops a training except its divergence.
    """
    datasets = load_datasets(next(iter(rows.values())), world)
    data = fingerprint(datasets.train), fingerprint(datasets.val)
    weights: dict[str, str] = world.on_first(
        lambda: {path: _weights_hash(path) for path in {recipe.model.backbone.weights for recipe in rows.values()}}
    )
    outcomes = world.on_first(lambda: _finished(rows, folder, data, weights))
    pending = [name for name in rows if name not in outcomes and (chosen is None or name in chosen)]
    for name in pending:
        _check_layout(name, rows[name], options, world)
    for name in pending:
        world.on_first(partial(told, name, outcomes))
        hashes = (*data, weights[rows[name].model.backbone.weights])
        outcomes[name] = _run_row(rows[name], RunFolder(folder / name), options, world, hashes, train_row)
        world.on_first(partial(told, name, outcomes))
    return {name: outcomes[name] for name in rows if name in outcomes}


def read_outcome(folder: RunFolder) -> Outcome | None:
    """The outcome of a row, or None if it is not finished. Raises InputError if the file is damaged."""
    file = folder.path / _OUTCOME
    if not file.exists():
        return None
    try:
        return read_json(file, Outcome)
    except InputError as error:
        raise InputError(
            f"{file} is no outcome of a row: delete it, and the row is looked at again ({error})"
        ) from None


def _finished(
    rows: Mapping[str, Recipe], folder: Path, data: tuple[str, str], weights: Mapping[str, str]
) -> dict[str, Outcome]:
    """The existing outcomes, after a check that they belong to these recipes, data and weights.

    `weights` are the hashes of the files that the recipes name. A row may have used a copy with another path.
    """
    found = {}
    for name, recipe in rows.items():
        own = RunFolder(folder / name)
        outcome, text = read_outcome(own), own.read_recipe()
        started_from, own_weights = _started_from(own, outcome), recipe.model.backbone.weights
        if started_from and started_from != weights[own_weights]:
            raise InputError(
                f"{own.path} started from other weights than {own_weights or 'none'}: rows would not "
                "compare; choose another --run folder, or the weights of before with --weights"
            )
        theirs = recipe if text is None else parse_recipe(text, str(own.recipe))
        if started_from:
            backbone = replace(theirs.model.backbone, weights=own_weights)
            theirs = replace(theirs, model=replace(theirs.model, backbone=backbone))
        difference = first_difference(recipe, theirs)
        if difference:
            raise InputError(
                f"{own.path} holds a run of another recipe ({difference}): rows would not compare; choose another "
                "--run folder, or delete this one"
            )
        if outcome is None:
            continue
        if (outcome.train_data, outcome.val_data) != data:
            raise InputError(
                f"{own.path} was trained or evaluated on other images or boxes than those of "
                f"{recipe.data.train_annotations} and {recipe.data.val_annotations}: rows would not compare; choose "
                "another --run folder, or the data of before with --data"
            )
        found[name] = outcome
    return found


def _weights_hash(path: str) -> str:
    """SHA-256 of a file of weights, "" for none. Raises InputError if it cannot be read."""
    if not path:
        return ""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"model.backbone.weights {path} cannot be read: {reason_of(error)}") from error


def _started_from(folder: RunFolder, outcome: Outcome | None) -> str:
    """The hash of a row's weights, "" if none is noted."""
    if outcome is not None:
        return outcome.weights
    file = folder.path / _WEIGHTS
    return read_text(file).strip() if file.exists() else ""


def _note_start(folder: RunFolder, recipe: Recipe, weights: str) -> None:
    """Write the hash of the weights beside an unfinished run, and their present path into its recipe."""
    if weights:
        folder.create()
        write_text_atomically(folder.path / _WEIGHTS, weights + "\n")
        if folder.read_recipe() is not None:
            folder.write_recipe(dump_recipe(recipe))


def _check_layout(name: str, recipe: Recipe, options: RunOptions, world: World) -> None:
    try:
        recipe_layout(recipe, world.size, options.lane_width, options.max_images_per_device)
    except InputError as error:
        raise InputError(f"row {name}: {error}; or choose the rows that fit with --rows") from None


def _run_row(
    recipe: Recipe, folder: RunFolder, options: RunOptions, world: World, hashes: tuple[str, str, str], train_row: Train
) -> Outcome:
    """Train a row; `hashes` are those of the training data, the validation data and the weights."""
    numbers, reason = None, ""
    world.on_first(partial(_note_start, folder, recipe, hashes[2]))
    try:
        numbers = train_row(recipe, folder, options, world)
    except DivergedError as error:
        reason = str(error)
    outcome: Outcome = world.on_first(lambda: _write_outcome(folder, numbers, reason, world.size, hashes))
    return outcome


def _write_outcome(
    folder: RunFolder, numbers: Evaluation | None, reason: str, ranks: int, hashes: tuple[str, str, str]
) -> Outcome:
    steps = [line for line in read_metrics(folder.metrics) if "loss" in line] if folder.metrics.exists() else []
    starts = read_environment(folder) if folder.environment.exists() else []
    outcome = Outcome(
        status="failed" if numbers is None else "trained",
        reason=reason,
        steps=steps[-1]["step"] if steps else 0,
        hours=sum(line["seconds"] for line in steps) / 3600,
        ranks=ranks,
        mmap=None if numbers is None else percent(numbers.bbox.AP),
        ap50=None if numbers is None else percent(numbers.bbox.AP50),
        mmar=None if numbers is None else percent(numbers.bbox.AR100),
        train_data=hashes[0],
        val_data=hashes[1],
        weights=hashes[2],
        ranks_differ=any(start["world_size"] != ranks for start in starts),
    )
    write_json_atomically(folder.path / _OUTCOME, asdict(outcome), indent=2)
    return outcome


def percent(number: float) -> float | None:
    """A COCO number in percent; None for -1, which means that the ground truth has no such box."""
    return None if number < 0 else 100 * number
