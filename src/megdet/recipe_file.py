"""Recipes as YAML: finding, reading, overriding and writing them."""

import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megdet.errors import InputError, nearest, shown
from megdet.files import read_text, typed
from megdet.plain_yaml import dump_yaml, parse_yaml
from megdet.recipe import Recipe
from megdet.recipe_check import check_recipe, flat_keys


def packaged_recipes() -> dict[str, str]:
    """Name -> text of the recipes that come with the package."""
    folder = resources.files("megdet") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def recipe_name(name_or_path: str) -> str:
    """The short name of a recipe, used for its default run folder; runs/a/recipe.yaml is called a."""
    path = Path(name_or_path)
    return path.absolute().parent.name if path.name == "recipe.yaml" else path.stem


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The checked recipe of a packaged name or a YAML file, with `overrides` ({"fpn.channels": 64}) on top.

    Raises InputError for an unknown recipe or key, a wrong type or a value that contradicts another.
    """
    packaged = packaged_recipes()
    path = Path(name_or_path)
    if name_or_path in packaged:
        text, source = packaged[name_or_path], f"recipe {name_or_path}"
    elif path.is_file():
        text, source = read_text(path), str(path)
    elif (path / "recipe.yaml").is_file():
        raise InputError(f"{path} is a run folder: its recipe is {path / 'recipe.yaml'}")
    elif path.is_dir() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise InputError(f"{path}: no such recipe file")
    else:
        raise InputError(
            f"no recipe '{name_or_path}': neither a file nor a packaged recipe{nearest(name_or_path, packaged)}; "
            "`megdet recipes` lists them"
        )
    return parse_recipe(text, source, overrides)


def parse_recipe(text: str, source: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The checked recipe of a YAML text; `source` names it in messages."""
    tree = parse_yaml(text, source)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(f"{source}: a recipe is a mapping of keys to values, this is a {type(tree).__name__}")
    _refuse_unknown_keys(tree, Recipe, source, "")
    _refuse_flat_sections(tree, source)
    for key, value in (overrides or {}).items():
        _set_key(tree, key, value)
    recipe = _typed(tree, source)
    check_recipe(recipe, source)
    return recipe


def recipe_keys() -> list[str]:
    """Every key of a recipe, dotted: batch_size, ..., fpn.channels, ..."""
    return list(flat_keys(dataclasses.asdict(Recipe())))


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML; reading it back gives an equal recipe."""
    return dump_yaml(dataclasses.asdict(recipe))


WITHOUT_EFFECT = (
    *("checkpoint_epochs", "keep_checkpoints", "tensorboard", "recompute", "evaluation.every_epochs", "data.draw_demo"),
    *("data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images"),
    *("data.cache", "data.cache_folder", "data.cache_gib"),
)
"""Keys that may change from one start of a run to the next; the data are compared by what is in them."""


def first_difference(ours: Recipe, theirs: Recipe) -> str:
    """`key: value here, value there` of the first key in which two recipes train differently, or nothing."""
    a, b = flat_keys(dataclasses.asdict(ours)), flat_keys(dataclasses.asdict(theirs))
    keys = (key for key in a if a[key] != b[key] and key not in WITHOUT_EFFECT)
    return next((f"{key}: {a[key]} here, {b[key]} there" for key in keys), "")


def _typed(tree: dict[str, Any], source: str) -> Recipe:
    kinds = _kinds()
    defaults = flat_keys(dataclasses.asdict(Recipe()))
    for key, value in flat_keys(tree).items():
        if value is None and defaults.get(key, 0) is not None:
            raise InputError(f"{source}: {key} has no value: write one, or leave the key out for its default")
        kind = kinds.get(key)
        if get_origin(kind) is Literal and value not in get_args(kind):
            choices = get_args(kind)
            mend = f"choose one of {', '.join(choices)}{nearest(str(value), choices)}"
            raise InputError(f"{source}: {key} is {shown(value)}: {mend}")
        if get_origin(kind) is tuple and not isinstance(value, list | tuple):
            raise InputError(f"{source}: {key} is {shown(value)}: write a list, such as [64]")
    return typed(tree, Recipe, source)


@cache
def _kinds() -> dict[str, Any]:
    """The type of every key."""
    top = {key: kind for key, kind in get_type_hints(Recipe).items() if key not in _sections()}
    inside = {f"{name}.{key}": kind for name, own in _sections().items() for key, kind in get_type_hints(own).items()}
    return top | inside


def _sections() -> dict[str, type[Any]]:
    hints = get_type_hints(Recipe)
    return {name: kind for name, kind in hints.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


def _refuse_unknown_keys(tree: Mapping[Any, Any], kind: type[Any], source: str, prefix: str) -> None:
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in hints and key in recipe_keys():
            raise InputError(f"{source}: key '{key}' is written nested: {str(key).replace('.', ': {', 1)}: ...}}")
        if key not in hints:
            raise InputError(f"{source}: unknown key '{prefix}{key}'{_nearest_key(prefix, str(key))}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            _refuse_unknown_keys(value, hints[key], source, f"{prefix}{key}.")


def _refuse_flat_sections(tree: Mapping[str, Any], source: str) -> None:
    for key, section in _sections().items():
        if not isinstance(tree.get(key), dict | None):
            example = next(iter(get_type_hints(section)))
            raise InputError(f"{source}: {key} is a section: write an indented {example}: under it")


def _nearest_key(prefix: str, key: str) -> str:
    """Look for the nearest name in the same section first, then anywhere."""
    keys = recipe_keys()
    here = {k.removeprefix(prefix): k for k in keys if k.startswith(prefix)}
    hint = nearest(key, here)
    if hint:
        name = hint.split("'")[1]
        return hint.replace(f"'{name}'", f"'{here[name]}'")
    leaves = {k.rsplit(".", 1)[-1]: k for k in keys}
    hint = nearest(key.rsplit(".", 1)[-1], leaves)
    if hint:
        name = hint.split("'")[1]
        return hint.replace(f"'{name}'", f"'{leaves[name]}'")
    return ""


def _set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    if key not in recipe_keys():
        raise InputError(f"unknown option '--{key}'{_nearest_key('', key)}")
    *sections, leaf = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    if isinstance(value, str) and not _is_text(key):
        value = parse_yaml(value, f"option '--{key}'") if value else ""
    tree[leaf] = value


def _is_text(key: str) -> bool:
    return isinstance(flat_keys(dataclasses.asdict(Recipe()))[key], str)
