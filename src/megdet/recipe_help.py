"""The meaning of every recipe key, from the docstrings under the fields of the dataclasses."""

import argparse
import ast
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megdet import recipe
from megdet.architecture import MODELS, Model


@dataclass(frozen=True)
class Knob:
    """One key of a recipe."""

    key: str
    """dotted: model.fpn.channels"""
    kind: str
    """its type"""
    choices: tuple[str, ...]
    """its possible values, if they are a few words"""
    default: str
    """its default, as written in the source"""
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass."""

    name: str
    """its name, such as model.fpn; empty for the top level"""
    title: str
    knobs: tuple[Knob, ...]


@cache
def sections() -> tuple[Section, ...]:
    """Every key of a recipe, the top level first; a section that several kinds of detectors share comes once."""
    found = dict.fromkeys(section for model in MODELS.values() for section in _sections_of(recipe.Recipe, model, ""))
    return tuple(found)


def recipe_parser(prog: str) -> argparse.ArgumentParser:
    """A parser with every recipe key as an option, section by section; used only for its help text."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    told: set[str] = set()
    for section in sections():
        group = parser.add_argument_group(section.name or "top level", section.title)
        for knob in section.knobs:
            if knob.key in told:
                continue
            told.add(knob.key)
            text = f"{knob.meaning} (default {knob.default})".replace("%", "%%")
            kind = f"{{{','.join(knob.choices)}}}" if knob.choices else knob.kind
            group.add_argument(f"--{knob.key}", metavar=kind, help=text)
    return parser


def _sections_of(kind: type[Any], model: type[Model], name: str) -> Iterator[Section]:
    """The section of a dataclass, then those of the dataclasses in it; `model` stands for the field of a recipe."""
    hints = {key: model if hint is Model else hint for key, hint in get_type_hints(kind).items()}
    inside = {key: hint for key, hint in hints.items() if is_dataclass(hint)}
    knobs = (_knob(kind, key, hint, name) for key, hint in hints.items() if key not in inside)
    yield Section(name, inspect.getdoc(kind) or "", tuple(knobs))
    for key, hint in inside.items():
        yield from _sections_of(hint, model, f"{name}.{key}" if name else key)


def _knob(kind: type[Any], name: str, hint: Any, section: str) -> Knob:
    """The knob of a field; default and docstring come from the most derived class that defines it."""
    default, meaning = next(own[name] for own in map(_fields, kind.__mro__) if name in own)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if issubclass(kind, Model) and name == "kind":
        choices = tuple(MODELS)  # each dataclass has its own alone
    return Knob(f"{section}.{name}" if section else name, _word(hint), choices, default, meaning)


def _word(hint: Any) -> str:
    """A type as it is written in source: `int`, `float | None`, `tuple[int, ...]`."""
    if NoneType in get_args(hint):
        return " | ".join("None" if part is NoneType else _word(part) for part in get_args(hint))
    return hint.__name__ if type(hint) is type else str(hint)


@cache
def _fields(kind: type[Any]) -> dict[str, tuple[str, str]]:
    """The default and the docstring of every field that a class's own source has."""
    if not is_dataclass(kind):
        return {}
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        ast.unparse(node.target): (ast.unparse(node.value), ast.literal_eval(following.value))
        for node, following in itertools.pairwise(body.body)
        if isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(following, ast.Expr)
    }
