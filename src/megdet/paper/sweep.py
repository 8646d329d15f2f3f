"""A sweep: trainings one after another, each in its own run folder, and each only once.

A finished row has an `outcome.json` beside its metrics; the next call reads it and trains the rows that have none. An
interrupted row goes on from its checkpoint like any run. A training that diverges is a result, as in Table 2 of the
paper; every other error stops the sweep. Rows only compare if they have their recipes, the same data and the same file
of weights; data and weights are compared by their content, not by their paths. Several processes may work on one sweep:
a row belongs to the first one that locks it, the others go on with the next.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from megdet.distributed.layout import recipe_layout
from megdet.distributed.world import World
from megdet.errors import DivergedError, InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.files import read_text, reason_of, write_text_atomically
from megdet.paper.outcome import Outcome, read_outcome, write_outcome
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe, first_difference, parse_recipe
from megdet.run_folder.folder import LockedError, RunFolder
from megdet.training.datasets import fingerprint, load_datasets
from megdet.training.loop import train
from megdet.training.run import RunOptions

Train = Callable[[Recipe, RunFolder, RunOptions, World], Evaluation]
_WEIGHTS, _ROW_LOCK = "weights.sha256", ".row.lock"


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

    Every rank calls it. Rows that another process is training are skipped. Returns all outcomes that exist at the
    end, also those of rows that were not chosen. `told` is called on rank 0 before and after each training, with the
    name of the row and the outcomes so far. Raises InputError, before any training where possible: if a row does not
    fit the ranks, if a folder holds another recipe, other data or other weights, and for everything that stops a
    training except its divergence.
    """
    outcomes, hashes = finished_rows(rows, folder, world)
    pending = [name for name in rows if name not in outcomes and (chosen is None or name in chosen)]
    for name in pending:
        _check_layout(name, rows[name], options, world)
    for name in pending:
        own = RunFolder(folder / name)
        with _taken(own, world) as is_taken:
            if not is_taken:
                continue
            world.on_first(partial(told, name, outcomes))
            outcomes[name] = _run_row(rows[name], own, options, world, hashes[name], train_row)
        world.on_first(partial(told, name, outcomes))
    return world.on_first(lambda: outcomes_of(rows, folder))


def finished_rows(
    rows: Mapping[str, Recipe], folder: Path, world: World
) -> tuple[dict[str, Outcome], dict[str, tuple[str, str, str]]]:
    """The existing outcomes, and for each row the hashes of its training data, validation data and weights.

    Every rank calls it. Missing data that can be drawn are drawn.
    Raises InputError if a folder holds another recipe, other data or other weights.
    """
    datasets = load_datasets(next(iter(rows.values())), world)
    data = fingerprint(datasets.train), fingerprint(datasets.val)
    weights: dict[str, str] = world.on_first(
        lambda: {path: _weights_hash(path) for path in {recipe.model.backbone.weights for recipe in rows.values()}}
    )
    outcomes = world.on_first(lambda: _finished(rows, folder, data, weights))
    return outcomes, {name: (*data, weights[recipe.model.backbone.weights]) for name, recipe in rows.items()}


def outcomes_of(names: Collection[str], folder: Path) -> dict[str, Outcome]:
    """The outcomes of the rows that have one. Raises InputError if one is damaged."""
    found = {name: read_outcome(RunFolder(folder / name)) for name in names}
    return {name: outcome for name, outcome in found.items() if outcome is not None}


@contextmanager
def _taken(folder: RunFolder, world: World) -> Iterator[bool]:
    """A context that locks a row for this process; yields, on every rank, whether it is locked and has no outcome."""
    held = []

    def take() -> bool:
        try:
            held.append(folder.create().lock(_ROW_LOCK))
        except LockedError:
            return False
        return read_outcome(folder) is None

    try:
        yield world.on_first(take)
    finally:
        for lock in held:
            lock.close()


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
                "compare; choose another --run folder, or the earlier weights with --weights"
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
                "another --run folder, or the earlier data with --data"
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
    """The hash of a row's weights, "" if none was written."""
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
    """Train a row; `hashes` are of the training data, the validation data and the weights."""
    numbers, error = None, None
    world.on_first(partial(_note_start, folder, recipe, hashes[2]))
    try:
        numbers = train_row(recipe, folder, options, world)
    except DivergedError as diverged:
        error = diverged
    outcome: Outcome = world.on_first(lambda: write_outcome(folder, numbers, error, world.size, hashes))
    return outcome
