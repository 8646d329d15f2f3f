"""The advice of `data stats`, and the recipe that `recipes new` writes of it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from megdet.cli.options import CONSOLE, PROGRESS, Arguments, existing_file
from megdet.cli.parsers.shared import ADVICE_OPTIONS
from megdet.data.advice import Advice, Wishes, advise
from megdet.data.classes import category_ids_for
from megdet.data.coco import CocoDataset, load_coco
from megdet.data.far.folder import folder_of
from megdet.data.new_recipe import Places, new_recipe_file, write_recipe
from megdet.data.stats import dataset_statistics
from megdet.errors import InputError


def wishes(arguments: Arguments) -> Wishes:
    """What the user has decided. Raises InputError for a file of weights that is missing."""
    given = arguments.given(*ADVICE_OPTIONS)
    if "weights" in given:
        existing_file(given["weights"])
    return Wishes(**given)


def print_advice(advice: Advice) -> None:
    """Print the advised keys with their reasons, and the warnings."""
    table = Table("key", "value", "why", title="advice; `megdet recipes new NAME --data ...` writes it as a recipe")
    for own in advice.values:
        value = str(list(own.value)) if isinstance(own.value, tuple) else str(own.value)
        table.add_row(own.key if own.is_set else f"({own.key})", value, own.why)
    CONSOLE.print(table)
    _print_warnings(advice)


def run_new(arguments: Arguments) -> None:
    """Write a recipe for a data set."""
    if arguments.new_name is None or arguments.data is None:
        what = "a name" if arguments.new_name is None else "--data ANNOTATIONS IMAGES"
        raise InputError(f"`megdet recipes new` needs {what}; see `megdet recipes --help`")
    path = new_recipe_file(arguments.new_name)
    own = wishes(arguments)
    dataset = _loaded(arguments.data)
    if arguments.val is not None:
        category_ids_for(dataset.class_names, _loaded(arguments.val))  # refuses a class that is not trained
    stats = dataset_statistics(dataset)
    advice = advise(stats, own)
    places = Places(tuple(arguments.data), tuple(arguments.val) if arguments.val else None)
    write_recipe(path, advice, stats, places)
    _print_warnings(advice)
    if places.val is None:
        PROGRESS.print("warning: without --val the training images are evaluated, which says little about others")
    CONSOLE.print(f"{path}: {len(advice.values)} values with their reasons; `megdet train {path}` trains it")
    arguments.print_json({"recipe": str(path), **asdict(advice)})


def _loaded(places: Sequence[str]) -> CocoDataset:
    annotations, images = places
    return load_coco(Path(annotations), folder_of(images), keep_empty=True)


def _print_warnings(advice: Advice) -> None:
    for sentence in advice.warnings:
        PROGRESS.print(f"warning: {sentence}")
