"""Differences between complete recipes, and between a recipe and the defaults."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from megdet.errors import printable
from megdet.recipe import Recipe
from megdet.recipe_check import flat_keys
from megdet.recipe_file import WITHOUT_EFFECT, parse_recipe

_BY_CONTENT = ("data.train_annotations", "data.train_images", "data.image_weights")
"""Paths of training data: another path may be other data. Validation data are compared by their content."""


def has_effect(key: str) -> bool:
    """Whether another value of this key of the recipe may give another detector."""
    return key not in WITHOUT_EFFECT or key in _BY_CONTENT


def differences(recipes: Sequence[Recipe]) -> dict[str, list[Any]]:
    """Key -> its value in each recipe, for the keys that differ; None if a kind of detector has no such key.

    Keys that cannot change the result, such as how often to save, come last.
    """
    flat = [flat_keys(dataclasses.asdict(recipe)) for recipe in recipes]
    keys = dict.fromkeys(key for own in flat for key in own)
    found = {key: [own.get(key) for own in flat] for key in keys}
    differing = {key: values for key, values in found.items() if any(value != values[0] for value in values)}
    return {key: differing[key] for key in sorted(differing, key=lambda key: not has_effect(key))}


def departures(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Key -> (value, default) of the keys of a recipe that differ from the defaults of its kind of detector."""
    usual = flat_keys(dataclasses.asdict(parse_recipe("", "the defaults", {"model.kind": recipe.model.kind})))
    own = flat_keys(dataclasses.asdict(recipe))
    changed = {key: (value, usual.get(key)) for key, value in own.items() if value != usual.get(key)}
    if recipe.model.kind != Recipe().model.kind:
        changed = {"model.kind": (recipe.model.kind, Recipe().model.kind)} | changed
    return changed


def value_text(value: Any) -> str:
    """A value of a recipe for people: `[8, 10]`, `true`, `0.02`; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(value_text, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return printable(f"{value:g}" if isinstance(value, float) else str(value)) or "empty"


def recipe_identity(recipe: Recipe) -> tuple[tuple[str, Any], ...]:
    """The keys and values that runs of one recipe with different seeds share."""
    flat = flat_keys(dataclasses.asdict(recipe))
    return tuple((key, _hashable(value)) for key, value in flat.items() if key != "seed" and has_effect(key))


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
