"""The arithmetic of a recipe: its steps, groups, devices and rates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megdet.data.coco import training_set
from megdet.data.demo import CLASS_NAMES, DEMO_SETS
from megdet.data.sampling.frequencies import training_plan
from megdet.distributed.layout import better_device_counts, choose_layout
from megdet.program import loading
from megdet.recipe import Recipe
from megdet.run_length import decay_of, total_steps
from megdet.training.schedule import learning_rate, scaled_rate, why_no_warmup

_ASSUMED_CLASSES = 80
_ASSUMED_IMAGES = 117266
"""Images of COCO train2017 with boxes, for a recipe whose data are missing here."""


@dataclass(frozen=True)
class LayoutRow:
    """One line of the table."""

    key: str
    name: str
    value: Any
    text: str


def describe(
    recipe: Recipe,
    num_devices: int,
    lane_width: int | None = None,
    max_images_per_device: int | None = None,
    *,
    count_parameters: bool = False,
) -> list[LayoutRow]:
    """The rows of `megdet describe`; only the number of parameters needs the detector built.

    Raises InputError for an impossible layout.
    """
    rows: list[LayoutRow] = []

    def add(key: str, name: str, value: Any, text: str = "") -> None:
        rows.append(LayoutRow(key, name, value, text or str(value)))

    layout = choose_layout(
        recipe.groups_per_step, recipe.images_per_group, num_devices, lane_width, max_images_per_device
    )
    frozen = "" if recipe.bn_size else " (statistics frozen)"
    add("batch_size", "images a step (mini-batch size)", recipe.batch_size)
    add("bn_size", "images a BN group (BN size)", recipe.bn_size, f"{recipe.bn_size}{frozen}")
    add("groups", "groups a step", layout.num_groups, f"{layout.num_groups} of {layout.group_size} images")
    add("devices", "devices", num_devices)
    width = layout.lane_width
    add("lanes", "lanes, side by side", layout.num_lanes)
    add("lane_width", "devices a lane, which carry one group together", width)
    shares = [share.stop - share.start for share in map(layout.share_of, range(width))]
    add("shares", "images of a group on each of them", shares, _counted(shares))
    rounds = [len(layout.groups_of(lane * width)) for lane in range(layout.num_lanes)]
    unequal = "" if min(rounds) == max(rounds) else f" ({rounds.count(min(rounds))} lane(s) have one less)"
    add("micro_batch", "images a forward, at most", layout.largest_share)
    add("accumulation", "forwards a device and step", layout.rounds, f"{layout.rounds}{unequal}")
    add("images_a_device", "images a device and step, at most", layout.busiest_images)
    add("idle", "idle part of the devices", layout.idle, f"{layout.idle:.1%}")
    better = list(better_device_counts(layout, 3, lane_width, max_images_per_device))
    if better:
        listed = "; ".join(
            f"{other.world_size} ({other.idle:.1%} idle, {other.busiest_images} images a device)" for other in better
        )
        add("better_devices", "numbers of devices that idle less", [other.world_size for other in better], listed)

    images, classes = _data_rows(recipe, add)
    steps, warmup = total_steps(recipe, images), recipe.schedule.warmup_steps
    warmup_images = warmup * recipe.batch_size
    first, after, nothing = learning_rate(recipe, images, 0), scaled_rate(recipe), why_no_warmup(recipe)
    add("rate_first", "learning rate of the first step", first, f"{first:.6g}")
    rule = f"{recipe.batch_size} / 16" if recipe.optimizer.scaling == "linear" else f"sqrt({recipe.batch_size} / 16)"
    add("rate_after_warmup", "learning rate after warmup", after, f"{after:.6g} = base_lr x {rule}")
    add(
        "warmup_steps",
        "warmup",
        warmup,
        f"none: {nothing}"
        if nothing
        else f"{warmup} steps = {warmup_images} images = {warmup_images / images:.2f} epochs",
    )
    decay = decay_of(recipe.schedule)
    decays = ", ".join(f"x{f:g} at epoch {m:g}" for m, f in zip(decay.milestones, decay.factors, strict=True))
    add("policy", "policy", recipe.schedule.policy, f"{recipe.schedule.policy}{': ' if decays else ''}{decays}")
    add("epochs", "epochs", decay.epochs, f"{decay.epochs:g}")
    add("steps", "steps", steps, f"{steps} ({images / recipe.batch_size:.1f} an epoch)")

    if not count_parameters:
        return rows
    with loading():  # here, because torch takes seconds to load
        from megdet.planning.counting import meta_detector
    model = meta_detector(recipe, classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    add("parameters", "parameters", parameters, f"{parameters / 1e6:.1f} million, {trained / 1e6:.1f} trained")
    return rows


def _counted(shares: list[int]) -> str:
    """`2 x 11 + 1 x 10`, the largest first."""
    return " + ".join(f"{shares.count(share)} x {share}" for share in sorted(set(shares), reverse=True))


def _data_rows(recipe: Recipe, add: Any) -> tuple[int, int]:
    """Add rows about the data; returns the number of images and classes, COCO's if the data are missing here."""
    annotations = Path(recipe.data.train_annotations)
    if not annotations.is_file():
        images, classes, what = _ASSUMED_IMAGES, _ASSUMED_CLASSES, "so epochs are those of COCO train2017"
        if recipe.data.draw_demo:
            images, classes, what = DEMO_SETS[recipe.data.draw_demo].num_train, len(CLASS_NAMES), "it will be drawn"
        add("data", "data", None, f"{annotations} is not here, {what}: {images} images, {classes} classes")
        return images, classes
    dataset = training_set(recipe.data, masks="none")
    boxes = len(dataset.annotations.boxes)
    classes = len(dataset.class_names)
    add(
        "data",
        "data",
        {"images": len(dataset), "boxes": boxes, "classes": classes},
        f"{len(dataset)} images, {boxes} boxes, {classes} classes in {annotations}",
    )
    if dataset.weights is not None:
        left_out, low, high = dataset.num_weightless, float(dataset.weights.min()), float(dataset.weights.max())
        add(
            "image_weights",
            "weights of images",
            {"left_out": left_out, "smallest": low, "largest": high},
            f"{low:g} to {high:g}, {left_out} images left out (weight 0)",
        )
    if len(dataset) >= recipe.batch_size:
        found = training_plan(dataset, recipe).canvases()
        images_on = ", ".join(f"{height} x {width}" for (height, width), _ in found.counts.most_common(3))
        more = ", ..." if len(found.counts) > 3 else ""
        add(
            "canvases",
            "canvases of the first epoch",
            {"number": len(found.counts), "padding": found.padding},
            f"{len(found.counts)} ({images_on}{more}), {found.padding:.1%} of their pixels are padding",
        )
    return len(dataset), classes
