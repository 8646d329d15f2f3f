"""Recipes as YAML: find, read, override and write them."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from megdet.architecture import MODELS, FasterRcnn, Model
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
    """The checked recipe of a packaged name or a YAML file, changed by `overrides` ({"model.fpn.channels": 64}).

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
        raise InputError(f"{path}: no such recipe file{_recipe_beside(path)}")
    else:
        raise InputError(
            f"no recipe '{name_or_path}': neither a file nor a packaged recipe{nearest(name_or_path, packaged)}; "
            "`megdet recipes` lists them"
        )
    return parse_recipe(text, source, overrides)


def _recipe_beside(path: Path) -> str:
    """The hint for a wrong path: the recipe of the same folder with the most similar name."""
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    found = nearest(path.name, beside)
    return found.replace("'", f"'{path.parent}/", 1) if found and path.parent != Path() else found


def parse_recipe(text: str, source: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The checked recipe of a YAML text; `source` names it in messages."""
    tree = parse_yaml(text, source)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(f"{source}: a recipe is a mapping of keys to values, this is a {type(tree).__name__}")
    _rename_former_keys(tree)
    overrides = overrides or {}
    kind = _kind_of_model(tree, overrides, source)
    _refuse_unknown_keys(tree, kind, source)
    for key, value in overrides.items():
        _set_key(tree, kind, key, value)
    recipe = _typed(tree, kind, source)
    check_recipe(recipe, source)
    return recipe


def _rename_former_keys(tree: dict[str, Any]) -> None:
    """Rename keys in recipes of earlier versions: `tensorboard: true` is a tracker now."""
    if isinstance(tree.get("tensorboard"), bool) and "trackers" not in tree:
        tree["trackers"] = ["tensorboard"] if tree.pop("tensorboard") else []


def recipe_keys(kind: str = FasterRcnn.kind) -> list[str]:
    """Every key of a recipe of this `model.kind`, dotted: batch_size, ..., model.fpn.channels, ..."""
    return [key for key, hint in _types(kind).items() if not dataclasses.is_dataclass(hint)]


def check_key(key: str, kind: str = FasterRcnn.kind, *, beside: Collection[str] = ()) -> None:
    """Raise InputError, with a hint, for an option that is no key of a recipe of this `model.kind`.

    `beside` are other options that may be meant, such as workers.
    """
    keys = recipe_keys(kind)
    if key in keys:
        return
    if key in _types(kind):
        example = next(own for own in keys if own.startswith(f"{key}."))
        raise InputError(f"option '--{key}' is a section of the recipe: name a key in it, such as --{example}")
    options = {nearest(own, [own]): nearest(own, [f"--{own}"]) for own in beside}
    hint = nearest(key, [*beside, *(own.rsplit(".", 1)[-1] for own in keys)])
    raise InputError(f"unknown option '--{key}'{options.get(hint) or _nearest_key('', key, kind)}")


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML; reading it back gives an equal recipe."""
    return dump_yaml(dataclasses.asdict(recipe))


WITHOUT_EFFECT = (
    *("checkpoint_epochs", "checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "keep_best"),
    *("keep_every_epochs", "ledger_steps", "trackers", "recompute", "evaluation.every_epochs", "data.draw_demo"),
    *("data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images", "data.image_weights"),
    *("data.cache", "data.cache_folder", "data.cache_gib", "data.unreadable", "data.most_replaced"),
    *("data.far_cache_gib", "data.far_timeout", "data.far_retries"),
    *("watch.action", "watch.explodes_at", "watch.most_skipped", "watch.most_roll_backs", "watch.rewarm_steps"),
)
"""Keys that may change from one start of a run to the next; the data are compared by their content.

Keys of the watch take effect only after a divergence; a run that stopped at one may go on with other values."""


def first_difference(ours: Recipe, theirs: Recipe) -> str:
    """`key: value here, value there` of the first key that makes two recipes train differently, or "".

    For two kinds of detectors it is model.kind, which comes before the other keys of the section.
    """
    a, b = flat_keys(dataclasses.asdict(ours)), flat_keys(dataclasses.asdict(theirs))
    keys = (key for key in a if key not in WITHOUT_EFFECT and a[key] != b.get(key))
    return next((f"{key}: {a[key]} here, {b[key]} there" for key in keys), "")


def _kind_of_model(tree: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> str:
    """The `model.kind` of a recipe, which decides the keys of its section."""
    section = tree.get("model")
    written = section.get("kind", FasterRcnn.kind) if isinstance(section, dict) else FasterRcnn.kind
    kind = overrides.get("model.kind", written)
    if not isinstance(kind, str) or kind not in MODELS:
        mend = f"choose one of {', '.join(MODELS)}{nearest(str(kind), MODELS)}"
        raise InputError(f"{source}: model.kind is {shown(kind)}: {mend}")
    return kind


def _typed(tree: dict[str, Any], kind: str, source: str) -> Recipe:
    types = _types(kind)
    for key, value in flat_keys(tree).items():
        hint = types.get(key)
        if value is None and NoneType not in get_args(hint):
            raise InputError(f"{source}: {key} has no value: write one, or leave the key out for its default")
        if get_origin(hint) is Literal and value not in get_args(hint):
            choices = get_args(hint)
            mend = f"choose one of {', '.join(choices)}{nearest(str(value), choices)}"
            raise InputError(f"{source}: {key} is {shown(value)}: {mend}")
        if get_origin(hint) is tuple and not isinstance(value, list | tuple):
            raise InputError(f"{source}: {key} is {shown(value)}: write a list, such as [64]")
    # by hand, since model.kind decides the dataclass of the field
    part: Any = msgspec.defstruct("Part", [("model", MODELS[kind], msgspec.field(default_factory=MODELS[kind]))])
    found = typed({key: value for key, value in tree.items() if key == "model"}, part, source)
    rest = typed({key: value for key, value in tree.items() if key != "model"}, Recipe, source)
    return dataclasses.replace(rest, model=found.model)


@cache
def _types(kind: str) -> dict[str, Any]:
    """The type of every key of a recipe of this `model.kind`, and the dataclass of every section."""

    def inside(section: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, hint in get_type_hints(section).items():
            own = MODELS[kind] if hint is Model else hint
            yield prefix + name, own
            if dataclasses.is_dataclass(own):
                yield from inside(own, f"{prefix}{name}.")

    return dict(inside(Recipe, ""))


def _refuse_unknown_keys(tree: Mapping[Any, Any], kind: str, source: str, prefix: str = "") -> None:
    types = _types(kind)
    for key, value in tree.items():
        own = f"{prefix}{key}"
        if "." in str(key) and key in types:
            *sections, leaf = key.split(".")
            nested = "".join(f"{section}: {{" for section in sections) + f"{leaf}: ..." + "}" * len(sections)
            raise InputError(f"{source}: key '{key}' is written nested: {nested}")
        if own not in types or "." in str(key):
            raise InputError(f"{source}: unknown key '{own}'{_nearest_key(prefix, str(key), kind)}")
        if not dataclasses.is_dataclass(types[own]):
            continue
        if isinstance(value, dict):
            _refuse_unknown_keys(value, kind, source, f"{own}.")
        elif value is not None:
            example = next(iter(get_type_hints(types[own])))
            raise InputError(f"{source}: {own} is a section: write an indented {example}: under it")


def _nearest_key(prefix: str, key: str, kind: str) -> str:
    """The hint for a wrong key: the kinds of detectors that have it, its section elsewhere, or a similar name."""
    keys = list(_types(kind))
    others = [other for other in MODELS if f"{prefix}{key}" in _types(other)]
    if others and kind not in others:
        return f": model.kind {kind} has no such key; it belongs to {', '.join(others)}"
    *sections, leaf = f"{prefix}{key}".split(".")
    parts = {known.rpartition(".")[0] for known in keys}
    section = ".".join(sections)
    section = _spelled_alike(section, parts) if sections else ""
    elsewhere = [known for own in dict.fromkeys((key, leaf)) for known in keys if known.endswith(f".{own}")]
    if leaf in keys and leaf not in parts and f"{section}.{leaf}" not in elsewhere:
        return f"; did you mean '{leaf}'?"
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    inside = {known.rpartition(".")[2]: known for known in keys if section and known.rpartition(".")[0] == section}
    beside = {known.removeprefix(prefix): known for known in parts if f"{known.rpartition('.')[0]}." == (prefix or ".")}
    here = {known.removeprefix(prefix): known for known in keys if known.startswith(prefix) and known not in parts}
    outermost = {known: known for known in keys if "." not in known and known not in parts}
    leaves = outermost | {known.rpartition(".")[2]: known for known in keys if known not in parts} | outermost
    places = ((leaf, inside), (key, here), (leaf, leaves))
    tries = [(names, _with_word(word, names)) for word, names in places]
    tries += [(beside, _spelled_alike(key, beside, cutoff=0.75) if "." not in key else "")]
    tries += [(names, _spelled_alike(word, names)) for word, names in places]
    return next((f"; did you mean '{names[found]}'?" for names, found in tries if found), "")


def _with_word(word: str, names: Iterable[str]) -> str:
    """The shortest name with these words, as base_lr for lr, of those without a section; empty if there is none."""
    found = (name for name in names if "." not in name and {*word.split("_")} <= {*name.split("_")})
    return min(found, key=lambda name: name.count("_"), default="")


def _spelled_alike(word: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    return nearest(word, names, cutoff).partition("'")[2].partition("'")[0]


def _set_key(tree: dict[str, Any], kind: str, key: str, value: Any) -> None:
    check_key(key, kind)
    *sections, leaf = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    if isinstance(value, str) and not _is_text(_types(kind)[key]):
        value = parse_yaml(value, f"option '--{key}'") if value else ""
    tree[leaf] = value


def _is_text(hint: Any) -> bool:
    return hint is str or get_origin(hint) is Literal
