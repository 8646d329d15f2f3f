"""Writes advice as a recipe: a YAML text in which every value has its reason above it."""

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from megdet.data.advice import Advice, AdvisedValue
from megdet.data.stats import Statistics
from megdet.errors import InputError, printable
from megdet.files import make_folder, write_text_atomically
from megdet.plain_yaml import dump_yaml
from megdet.recipe import Recipe
from megdet.recipe_file import packaged_recipes, parse_recipe

_WIDTH = 112


@dataclass(frozen=True)
class Places:
    """Annotations and images, as they will stand in the recipe."""

    train: tuple[str, str]
    val: tuple[str, str] | None = None
    """None: the training images are evaluated"""


def new_recipe_file(name: str) -> Path:
    """The file of a new recipe. Raises InputError if it exists, or if a packaged recipe has the name."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = path.with_name(f"{path.name}.yaml")
    if path.stem in packaged_recipes():
        raise InputError(f"{path.stem} is the name of a packaged recipe: choose another one")
    if path.exists():
        raise InputError(f"{path} exists: choose another name, or delete it")
    return path


def write_recipe(path: Path, advice: Advice, stats: Statistics, places: Places) -> Recipe:
    """Write a recipe, making its folder, and return it as read back. Raises InputError if it cannot be written."""
    text = recipe_text(path, advice, stats, places)
    recipe = parse_recipe(text, str(path))
    make_folder(path.parent)
    write_text_atomically(path, text)
    return recipe


def recipe_text(path: Path, advice: Advice, stats: Statistics, places: Places) -> str:
    """The recipe as YAML with reasons."""
    val = places.val or places.train
    values = [
        AdvisedValue("data.train_annotations", places.train[0], ""),
        AdvisedValue("data.train_images", places.train[1], ""),
        AdvisedValue("data.val_annotations", val[0], "" if places.val else _NO_VAL),
        AdvisedValue("data.val_images", val[1], ""),
    ]
    top = [own for own in advice.values if "." not in own.key]
    rest = [own for own in advice.values if "." in own.key]
    num_classes = len(stats.class_counts)
    noun = "class" if num_classes == 1 else "classes"
    header = [
        f"{path.stem}: {stats.num_images:,} images, {stats.num_boxes:,} boxes, {num_classes} {noun}.",
        "Source:  written by `megdet recipes new`; a reason stands above each value (docs/data.md)",
        f"Command: megdet train {shlex.quote(str(path))}",
        *(f"Warning: {sentence}" for sentence in advice.warnings),
    ]
    lines = [line for text in header for line in _comment(printable(text), "", "         ")]
    return "\n".join([*lines, *_sections([*top, *values, *rest])]) + "\n"


_NO_VAL = (
    "these are the training images, whose score says nothing about other images: split some off and name them here"
)


def _sections(values: Sequence[AdvisedValue]) -> Iterator[str]:
    """The lines of nested sections; keys of one section must follow each other. Equal reasons are given once."""
    open_sections: list[str] = []
    said = ""
    for own in values:
        *sections, leaf = own.key.split(".")
        pairs = zip(open_sections, sections, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        for depth in range(shared, len(sections)):
            yield "  " * depth + f"{sections[depth]}:"
        open_sections = sections
        indent = "  " * len(sections)
        if own.why and own.why != said:
            yield from _comment(own.why, indent)
        said = own.why
        mark = "" if own.is_set else "# "
        for line in _entry(leaf, own.value).splitlines():
            yield f"{indent}{mark}{line}"


def _entry(leaf: str, value: object) -> str:
    if isinstance(value, tuple):
        return f"{leaf}: [{', '.join(str(own) for own in value)}]"
    return dump_yaml({leaf: value}).rstrip("\n")


def _comment(text: str, indent: str, further: str = "") -> list[str]:
    lines = textwrap.wrap(text, _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {further if place else ''}{line}" for place, line in enumerate(lines)]
