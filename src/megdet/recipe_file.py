"""Recipes as YAML: finding, reading, overriding, checking and writing them."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from megdet.errors import InputError, nearest
from megdet.files import read_text
from megdet.recipe import Recipe

set_parsing_settings(docstring_parse_attribute_docstrings=True)


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


def recipe_parser(prog: str) -> ArgumentParser:
    """A parser with every key of the recipe as an option; its help is the docstrings of the fields."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, add_help=False)
    parser.add_class_arguments(Recipe)
    return parser


def recipe_keys() -> list[str]:
    """Every key of a recipe, dotted: batch_size, ..., fpn.channels, ..."""
    return list(_flat(dataclasses.asdict(Recipe())))


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
    a, b = _flat(dataclasses.asdict(ours)), _flat(dataclasses.asdict(theirs))
    keys = (key for key in a if a[key] != b[key] and key not in WITHOUT_EFFECT)
    return next((f"{key}: {a[key]} here, {b[key]} there" for key in keys), "")


def check_recipe(recipe: Recipe, source: str) -> None:
    """Refuse what cannot be trained, before any work.

    Raises InputError naming the key and how to mend it.
    """
    flat = _flat(dataclasses.asdict(recipe))

    def refuse(key: str, why: str) -> None:
        raise InputError(f"{source}: {key} is {flat[key]}: {why}")

    for key, value in flat.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            refuse(key, "it must be finite")
    for key in _AT_LEAST_ONE:
        if flat[key] < 1:
            refuse(key, "it must be at least 1")
    for key in _NOT_NEGATIVE:
        if flat[key] is not None and flat[key] < 0:
            refuse(key, "it must not be negative")
    for key in _FRACTIONS:
        if not 0 <= flat[key] <= 1:
            refuse(key, "it must lie between 0 and 1")
    if recipe.seed >= 1 << 63:
        refuse("seed", "it must be below 2**63")
    size_key = "bn_size" if recipe.bn_size else "group_size"
    if recipe.batch_size % recipe.images_per_group:
        divisors = [str(d) for d in range(1, recipe.batch_size + 1) if recipe.batch_size % d == 0]
        refuse(size_key, f"it must divide batch_size {recipe.batch_size}: choose one of {', '.join(divisors)}")
    if recipe.bn_size and "batch" not in recipe.norms.values():
        refuse("bn_size", "no norm of the recipe is batch, so nothing would use it: set bn_size 0")
    for key in ("fpn.norm", "rpn.norm", "box_head.norm"):
        if flat[key] == "frozen" or (flat[key] == "batch" and not recipe.bn_size):
            refuse(key, "frozen statistics that were never trained: set bn_size above 0, or the norm to group or none")
    if recipe.rpn.negative_iou > recipe.rpn.positive_iou:
        refuse("rpn.negative_iou", f"it must not exceed rpn.positive_iou {recipe.rpn.positive_iou}")
    if not recipe.data.short_edges or min(recipe.data.short_edges) < 1:
        refuse("data.short_edges", "it must name at least one positive length")
    edges = recipe.data.canvas_edges
    if min(edges, default=1) < 1 or list(edges) != sorted(set(edges)):
        refuse("data.canvas_edges", "they must be positive lengths that rise")
    if not 0 < recipe.data.scale_jitter[0] <= recipe.data.scale_jitter[1]:
        refuse("data.scale_jitter", "it must be two positive factors, the smaller first")
    if recipe.data.cache == "resized" and (len(recipe.data.short_edges) > 1 or recipe.data.scale_jitter != (1.0, 1.0)):
        refuse("data.cache", "an image is drawn at several sizes (data.short_edges, data.scale_jitter): cache decoded")
    if recipe.data.cache != "none" and not recipe.data.cache_folder:
        refuse("data.cache_folder", "an empty name; name the folder that keeps the images")
    if min(recipe.data.std) <= 0:
        refuse("data.std", "every value must be positive")
    if len(recipe.anchors.sizes) != 5 or min(recipe.anchors.sizes) <= 0:
        refuse("anchors.sizes", "it must be five positive sizes, for P2 to P6")
    if not recipe.anchors.ratios or min(recipe.anchors.ratios) <= 0:
        refuse("anchors.ratios", "it must be positive ratios")
    if recipe.backbone.frozen_stages > 5:
        refuse("backbone.frozen_stages", "a backbone has a stem and four stages: at most 5")
    schedule = recipe.schedule
    if len(schedule.milestones) != len(schedule.factors):
        refuse("schedule.factors", f"it must have one factor for each of the {len(schedule.milestones)} milestones")
    if list(schedule.milestones) != sorted(schedule.milestones):
        refuse("schedule.milestones", "they must rise")
    if schedule.milestones and schedule.policy != "step":
        refuse("schedule.milestones", f"policy {schedule.policy} has its own; set schedule.policy step")
    if schedule.policy in ("normal", "long"):
        if schedule.epochs is not None:
            refuse(
                "schedule.epochs", f"policy {schedule.policy} has its own length: set schedule.policy step or cosine"
            )
    elif schedule.epochs is None or schedule.epochs <= 0:
        refuse("schedule.epochs", f"policy {schedule.policy} needs a positive number of epochs")
    elif schedule.milestones and schedule.milestones[-1] >= schedule.epochs:
        refuse("schedule.milestones", f"they must lie before the end at epoch {schedule.epochs:g}")
    if not 0 <= recipe.optimizer.momentum < 1 or not 0 <= recipe.optimizer.ema_decay < 1:
        key = "optimizer.ema_decay" if 0 <= recipe.optimizer.momentum < 1 else "optimizer.momentum"
        refuse(key, "it must be at least 0 and below 1")
    _check_large_batch(recipe, refuse)


def _check_large_batch(recipe: Recipe, refuse: Callable[[str, str], None]) -> None:
    """Refuse what the optimizers for large mini-batches cannot do; `refuse` takes a key and the reason."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        refuse("optimizer.betas", "both must be at least 0 and below 1")
    if min(optimizer.eps, optimizer.trust_coefficient) <= 0:
        refuse("optimizer.eps" if optimizer.eps <= 0 else "optimizer.trust_coefficient", "it must be positive")
    if schedule.warmup == "exponential" and schedule.warmup_steps and not schedule.warmup_start:
        refuse("schedule.warmup_start", "an exponential warmup cannot rise from 0: set it to 0.001, or warmup linear")
    if not optimizer.agvm:
        return
    if optimizer.kind in ("lars", "lamb"):
        refuse(
            "optimizer.agvm", f"{optimizer.kind} has rates of its own for every layer: set optimizer.kind sgd or adamw"
        )
    if recipe.groups_per_step % 2:
        size_key = "bn_size" if recipe.bn_size else "group_size"
        halves = [str(d) for d in range(1, recipe.batch_size // 2 + 1) if recipe.batch_size % (2 * d) == 0]
        mend = f"choose a {size_key} of {', '.join(halves)}" if halves else "choose an even batch_size"
        number = f"{size_key} {recipe.images_per_group} makes {recipe.groups_per_step} group(s), an odd number"
        refuse("optimizer.agvm", f"it compares the two halves of a mini-batch, and {number}: {mend}")
    if recipe.backbone.frozen_stages == 5:
        refuse(
            "optimizer.agvm", "it measures every module by the backbone, all of which is frozen: train a stage of it"
        )


_AT_LEAST_ONE = (
    "batch_size group_size plan_window checkpoint_epochs keep_checkpoints data.max_long_edge data.canvas_multiple "
    "fpn.channels rpn.samples rpn.train_proposals_before_nms rpn.train_proposals rpn.test_proposals_before_nms "
    "rpn.test_proposals box_head.channels box_head.pool_size box_head.sampling_ratio box_head.samples "
    "box_head.detections evaluation.batch_size"
).split()
_NOT_NEGATIVE = (
    "bn_size seed data.color_jitter data.cache_gib backbone.frozen_stages backbone.norm_eps rpn.smooth_l1_beta "
    "rpn.min_size box_head.smooth_l1_beta optimizer.base_lr optimizer.weight_decay optimizer.clip_norm "
    "schedule.warmup_steps schedule.warmup_start evaluation.every_epochs noise_interval"
).split()
_FRACTIONS = (
    "data.horizontal_flip data.vertical_flip rpn.positive_fraction rpn.positive_iou rpn.negative_iou rpn.nms_iou "
    "box_head.positive_fraction box_head.positive_iou box_head.score_threshold box_head.nms_iou"
).split()


def _typed(tree: dict[str, Any], source: str) -> Recipe:
    parser = _parser()
    defaults = _flat(dataclasses.asdict(Recipe()))
    for key, value in _flat(tree).items():
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
def _parser() -> ArgumentParser:
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
    is_text = isinstance(_flat(dataclasses.asdict(Recipe()))[key], str)
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


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value
