"""Recipes as YAML: finding, reading, overriding and writing them."""

import dataclasses
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from megdet.errors import InputError, nearest
from megdet.files import read_text
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
    try:
        tree = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
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


def recipe_parser(prog: str) -> Any:
    """A parser (jsonargparse) with every key of the recipe as an option; its help is the docstrings of the fields."""
    from jsonargparse import ArgumentParser, set_parsing_settings  # here, because the names of recipes need none of it

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, exit_on_error=False, add_help=False)
    parser.add_class_arguments(Recipe)
    return parser


def recipe_keys() -> list[str]:
    """Every key of a recipe, dotted: batch_size, ..., fpn.channels, ..."""
    return list(flat_keys(dataclasses.asdict(Recipe())))


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML; reading it back gives an equal recipe."""
    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False, width=120)


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
    parser = _parser()
    defaults = flat_keys(dataclasses.asdict(Recipe()))
    for key, value in flat_keys(tree).items():
        if value is None and defaults.get(key, 0) is not None:
            raise InputError(f"{source}: {key} has no value: write one, or leave the key out for its default")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notices to callers of jsonargparse, not to users of recipes
            parsed = parser.parse_object(tree)
    except (Exception, SystemExit) as error:
        raise InputError(f"{source}: {_one_line(str(error))}") from None
    sections = {key: section(**dict(parsed[key].items(branches=True))) for key, section in _sections().items()}
    plain = {f.name: parsed[f.name] for f in dataclasses.fields(Recipe) if f.name not in sections}
    return Recipe(**plain, **sections)


@cache
def _parser() -> Any:
    return recipe_parser("recipe")


def _one_line(message: str) -> str:
    words = " ".join(message.split())
    for long, short in (
        ('Parser key "', ""),
        ('": Expected', ": expected"),
        ("a <class '", "a value of type "),
        ("'>. Got value:", ", got"),
        (". Got value:", ", got"),
        ("a typing.Literal", "one of "),
        ("typing.", ""),
    ):
        words = words.replace(long, short)
    return words + (" (write a list: [64])" if "type tuple, got" in words else "")


class _StrictLoader(yaml.SafeLoader):
    """YAML that says a key twice means one of them by mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


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
    is_text = isinstance(flat_keys(dataclasses.asdict(Recipe()))[key], str)
    *sections, leaf = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    if isinstance(value, str) and not is_text:
        try:
            value = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            raise InputError(f"option '--{key}': cannot read the value '{value}'") from None
    tree[leaf] = value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value
