"""Checks of a recipe before any work starts."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from megdet.addresses import address_fault, is_address, masked
from megdet.architecture_parts import Anchors, flat_anchor
from megdet.bounds import faults_of
from megdet.errors import InputError, nearest, shown
from megdet.recipe import MOST_EXACT_IMAGES, TRACKERS, Recipe

_PILLOWS_MOST = 178_956_970  # pixels
_SHOWN_DIVISORS = 12


def check_recipe(recipe: Recipe, source: str) -> None:
    """Raise InputError for a recipe that cannot be trained; the message names the key and how to mend it."""
    flat = flat_keys(dataclasses.asdict(recipe))

    def refuse(key: str, why: str) -> None:
        raise InputError(f"{source}: {key} is {flat[key]}: {why}")

    for key, value in flat.items():
        numbers = value if isinstance(value, tuple) else (value,)
        bits = 63 if key == "seed" else 31
        if any(isinstance(number, int) and abs(number) >= 1 << bits for number in numbers):
            raise InputError(f"{source}: {key} is {shown(value)}: it must be below 2**{bits}")
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            refuse(key, "it must be finite")
    for key, why in faults_of(recipe):
        refuse(key, why)
    size_key = "bn_size" if recipe.bn_size else "group_size"
    if recipe.batch_size % recipe.images_per_group:
        divisors = _divisors(recipe.batch_size, recipe.images_per_group)
        refuse(size_key, f"it must divide batch_size {recipe.batch_size}: choose one of {divisors}")
    if recipe.exact and recipe.batch_size > MOST_EXACT_IMAGES:
        refuse("batch_size", f"exact adds up at most {MOST_EXACT_IMAGES} images: choose a smaller one, or exact false")
    if recipe.bn_size and "batch" not in recipe.model.norms.values():
        refuse("bn_size", "no norm of the recipe is batch, so nothing would use it: set bn_size 0")
    for section, norm in recipe.model.norms.items():
        if section != "backbone" and (norm == "frozen" or (norm == "batch" and not recipe.bn_size)):
            why = "frozen statistics that were never trained: set bn_size above 0, or the norm to group or none"
            refuse(f"model.{section}.norm", why)
    if not recipe.data.short_edges or min(recipe.data.short_edges) < 1:
        refuse("data.short_edges", "it must name at least one positive length")
    edges = recipe.data.canvas_edges
    if min(edges, default=1) < 1 or list(edges) != sorted(set(edges)):
        refuse("data.canvas_edges", "they must be positive lengths that rise")
    if recipe.data.max_pixels > _PILLOWS_MOST:
        refuse("data.max_pixels", f"Pillow refuses more than {_PILLOWS_MOST}: cut larger images into tiles")
    if recipe.data.resize == "torchvision" and recipe.data.cache == "resized":
        refuse("data.cache", "data.resize torchvision makes pixels that are not whole numbers: cache decoded")
    if not 0 < recipe.data.scale_jitter[0] <= recipe.data.scale_jitter[1]:
        refuse("data.scale_jitter", "it must be two positive factors, the smaller first")
    if recipe.data.crop and (len(recipe.data.crop) != 2 or min(recipe.data.crop) < 1):
        refuse("data.crop", "it must be two positive lengths, height and width, or empty")
    if not 0 < recipe.data.crop_scales[0] <= recipe.data.crop_scales[1] <= 1:
        refuse("data.crop_scales", "it must be two factors above 0 and at most 1, the smaller first")
    for key, crops in (("crop", bool(recipe.data.crop)), ("crop_probability", recipe.data.crop_probability > 0)):
        if recipe.data.cache == "resized" and crops:
            refuse("data.cache", f"a crop is cut at another place in every epoch (data.{key}): cache decoded")
    if recipe.data.cache == "resized" and recipe.data.mosaic:
        refuse("data.cache", "a mosaic resizes an image to other sizes in every epoch (data.mosaic): cache decoded")
    if recipe.data.cache == "resized" and (len(recipe.data.short_edges) > 1 or recipe.data.scale_jitter != (1.0, 1.0)):
        refuse("data.cache", "an image is drawn at several sizes (data.short_edges, data.scale_jitter): cache decoded")
    if recipe.data.cache != "none" and not recipe.data.cache_folder:
        refuse("data.cache_folder", "an empty name; name the folder that keeps the images")
    _check_addresses(recipe, source)
    if not recipe.data.far_timeout:
        refuse("data.far_timeout", "no request can be answered in no time: give seconds")
    for name in recipe.trackers:
        if name not in TRACKERS or recipe.trackers.count(name) > 1:
            mend = f"name each of {', '.join(TRACKERS)} at most once{nearest(name, TRACKERS)}"
            raise InputError(f"{source}: trackers has {shown(name)}: {mend}")
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


def check_new_recipe(recipe: Recipe) -> None:
    """Raise InputError for what only new runs are refused: earlier versions trained it, and those runs must load."""
    for own in vars(recipe.model).values():
        if isinstance(own, Anchors) and own.whole_pixels and (flat := flat_anchor(own.level_sizes, own.ratios)):
            raise InputError(
                f"model.anchors.whole_pixels is {own.whole_pixels}: an anchor of size {flat[0]:g} and ratio "
                f"{flat[1]:g} would have no area in whole pixels: set it false"
            )


def _check_addresses(recipe: Recipe, source: str) -> None:
    """Refuse addresses that hold a secret, which would be kept in the run folder; the message does not show it."""
    for split in ("train", "val"):
        key, value = f"data.{split}_images", getattr(recipe.data, f"{split}_images")
        fault = address_fault(value) if is_address(value) else ""
        if not fault and is_address(annotations := getattr(recipe.data, f"{split}_annotations")):
            key, value = f"data.{split}_annotations", annotations
            fault = "annotations are read from a file on this machine: fetch it and give its path"
        if fault:
            raise InputError(f"{source}: {key} is {masked(value)}: {fault}")


def _check_large_batch(recipe: Recipe, refuse: Callable[[str, str], None]) -> None:
    """Check the keys of optimizers for large mini-batches; `refuse` takes a key and the reason."""
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
        halves = _divisors(recipe.batch_size // 2, recipe.images_per_group)
        mend = f"choose a {size_key} of {halves}" if recipe.batch_size % 2 == 0 else "choose an even batch_size"
        number = f"{size_key} {recipe.images_per_group} makes {recipe.groups_per_step} group(s), an odd number"
        refuse("optimizer.agvm", f"it compares the two halves of a mini-batch, and {number}: {mend}")
    if recipe.model.backbone.frozen_stages == 5:
        refuse(
            "optimizer.agvm", "it measures every module by the backbone, all of which is frozen: train a stage of it"
        )


def _divisors(number: int, near: int) -> str:
    """The divisors of a number; only those nearest to `near` if there are many."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    found = sorted({*small, *(number // divisor for divisor in small)})
    closest = sorted(found, key=lambda divisor: abs(divisor - near))[:_SHOWN_DIVISORS]
    return ", ".join(str(divisor) for divisor in sorted(closest))


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"fpn.channels": 256}` of `{"fpn": {"channels": 256}}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flat_keys(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
