"""What every key of a recipe means, from the docstrings under the fields of `recipe.py`."""

import argparse
import ast
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megdet import recipe


@dataclass(frozen=True)
class Knob:
    """One key of a recipe."""

    key: str
    """dotted: fpn.channels"""
    kind: str
    """its type, as recipe.py writes it"""
    choices: tuple[str, ...]
    """what it can be, where that is one of a few words"""
    default: str
    """its default, as recipe.py writes it"""
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass."""

    name: str
    """such as fpn; empty for the top level"""
    title: str
    knobs: tuple[Knob, ...]


@cache
def sections() -> tuple[Section, ...]:
    """Every key of a recipe, the top level first."""
    tree = ast.parse(inspect.getsource(recipe))
    bodies = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    kinds = {name: kind for name, kind in get_type_hints(recipe.Recipe).items() if kind.__name__ in bodies}
    return tuple(
        Section(name, inspect.getdoc(kind) or "", _knobs(name, kind, bodies[kind.__name__], set(bodies)))
        for name, kind in {"": recipe.Recipe, **kinds}.items()
    )


def recipe_parser(prog: str) -> argparse.ArgumentParser:
    """A parser with every key of the recipe as an option, section by section; made for its help."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    for section in sections():
        group = parser.add_argument_group(section.name or "top level", section.title)
        for knob in section.knobs:
            text = f"{knob.meaning} (default {knob.default})".replace("%", "%%")
            kind = f"{{{','.join(knob.choices)}}}" if knob.choices else knob.kind
            group.add_argument(f"--{knob.key}", metavar=kind, help=text)
    return parser


def _knobs(section: str, kind: type[Any], body: list[ast.stmt], not_knobs: set[str]) -> tuple[Knob, ...]:
    hints = get_type_hints(kind)
    found = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or ast.unparse(node.annotation) in not_knobs:
            continue
        assert node.value is not None, "every knob has a default"
        assert isinstance(following, ast.Expr), "and a docstring below it"
        name = ast.unparse(node.target)
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        meaning = ast.literal_eval(following.value)
        key = f"{section}.{name}" if section else name
        found.append(Knob(key, ast.unparse(node.annotation), choices, ast.unparse(node.value), meaning))
    return tuple(found)
