"""What a plan is made from: steps measured here, an earlier measurement, or numbers that the user gives."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from megdet.analysis.planner.layouts import GPU_LINK, Model, Planner, sizes_to_measure
from megdet.analysis.planner.measured_steps import TIMED_STEPS
from megdet.analysis.planner.measuring import measure, measure_link
from megdet.analysis.planner.step_cost import GIB, Link, Measurement, StepCost, fit_costs
from megdet.data.plan import TrainingPlan
from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.layout import Layout
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.files import read_json
from megdet.journal.metrics import read_metrics
from megdet.journal.run_folder import RunFolder
from megdet.model.detector import Detector
from megdet.recipe import Recipe, RecomputePlan
from megdet.recipe_file import first_difference, parse_recipe
from megdet.training.prepare import load_datasets

ALL_PLANS: tuple[RecomputePlan, ...] = get_args(RecomputePlan)


@dataclass(frozen=True)
class Given:
    """What the user says instead of having it measured."""

    measured: Path | None = None
    """file of an earlier `megdet plan --json`"""
    seconds_per_image: float | None = None
    """of a step of the recipe's own recompute plan"""
    image_bytes: float | None = None
    """memory of an image"""
    fixed_bytes: float | None = None
    """memory of everything else"""
    bandwidth: float | None = None
    """bytes a second that a device sends"""
    latency: float | None = None
    """seconds of a hop"""
    noise_scale: float | None = None
    """images"""
    noise_from: Path | None = None
    """run folder whose metrics have it"""


@dataclass(frozen=True)
class Measuring:
    """How to measure."""

    sizes: Sequence[int] = ()
    """images of the micro-batches; empty = by the layout"""
    plans: Sequence[RecomputePlan] = ()
    """recompute plans beside the recipe's; empty = all that its backbone has"""
    device: str = ""
    side_by_side: int = 1
    workers: int = 1
    """loading processes a rank of the planned run"""
    timed_steps: int = TIMED_STEPS
    """of each kind"""


def measure_recipe(
    recipe: Recipe,
    layout: Layout,
    measuring: Measuring,
    assumptions: list[str],
    progress: Callable[[str], None],
) -> Measurement:
    """Measure at the sizes of a layout where the user names none; raises InputError like `measure`, before it works."""
    _detector(recipe, 1, has_weights=True)  # refuses weights that are not there before anything is measured
    plans = [recipe.recompute, *(plan for plan in measuring.plans if plan != recipe.recompute)]
    if not measuring.plans:
        try:
            _detector(replace(recipe, recompute="block"), 1)
            plans += [plan for plan in ALL_PLANS if plan != recipe.recompute]
        except InputError as error:
            assumptions.append(f"no other recompute plan: {error}")
    else:
        for plan in plans:
            _detector(replace(recipe, recompute=plan), 1)  # refused before anything is measured
    return measure(
        recipe,
        measuring.sizes or sizes_to_measure(layout),
        plans,
        device=measuring.device,
        side_by_side=measuring.side_by_side,
        timed_steps=measuring.timed_steps,
        progress=progress,
    )


def read_measurement(recipe: Recipe, path: Path) -> Measurement:
    """An earlier measurement. Raises InputError where it is of a recipe whose steps cost something else."""
    measurement = Measurement.from_dict(read_json(path), str(path))
    other = parse_recipe(measurement.recipe, str(path))
    # what a step of a micro-batch does not depend on; frozen statistics and others are two things
    other = replace(
        other,
        batch_size=recipe.batch_size,
        bn_size=recipe.bn_size if recipe.bn_size and other.bn_size else other.bn_size,
        group_size=recipe.group_size,
        plan_window=recipe.plan_window,
        seed=recipe.seed,
        start_from=recipe.start_from,
        noise_interval=recipe.noise_interval,
        optimizer=replace(other.optimizer, base_lr=recipe.optimizer.base_lr, agvm=recipe.optimizer.agvm),
        schedule=recipe.schedule,
    )
    difference = first_difference(recipe, other)
    if difference:
        raise InputError(f"{path} was measured with another recipe ({difference}): measure this one")
    if measurement.num_images < recipe.batch_size:
        raise InputError(
            f"{path} was measured with {measurement.num_images} images to train on, which are not enough for one "
            f"mini-batch of {recipe.batch_size}: lower batch_size or measure with other data"
        )
    return measurement


def with_link(measurement: Measurement, given: Given, progress: Callable[[str], None]) -> Measurement:
    """The same with the connection of two processes of this machine, where it is needed and not known."""
    is_given = given.bandwidth is not None and given.latency is not None
    if is_given or measurement.link is not None or measurement.device != "cpu":
        return measurement
    return replace(measurement, link=measure_link(progress))


def planner_of_measurement(
    recipe: Recipe, measurement: Measurement, given: Given, plans: Sequence[RecomputePlan], assumptions: list[str]
) -> Planner:
    """A planner of these recompute plans and the recipe's own. Raises InputError for a plan that was not measured."""
    costs = fit_costs(measurement)
    missing = [plan for plan in (recipe.recompute, *plans) if plan not in costs]
    if missing:
        raise InputError(f"recompute {missing[0]} was not measured, only {', '.join(costs)}: measure it too")
    together = measurement.side_by_side
    how = f"{together} side by side" if together > 1 else "alone"
    assumptions.append(f"every device is like this one: {measurement.machine} ({measurement.device}), measured {how}")
    if measurement.others_bytes:
        assumptions.append(
            f"the {measurement.others_bytes / GIB:.3g} GiB of the GPU that other processes held when measuring began "
            "are in no number here; if they computed meanwhile, the seconds are too long"
        )
    return Planner(
        recipe,
        {plan: cost for plan, cost in costs.items() if not plans or plan in (recipe.recompute, *plans)},
        _model(recipe, measurement.num_classes),
        _given_link(given, measurement.link or GPU_LINK),
        measurement.device,
        measurement.num_images,
        measurement.num_val_images,
        measurement.load_seconds,
        measurement.evaluation_seconds,
    )


def planner_of_numbers(recipe: Recipe, given: Given, device: str) -> Planner:
    """A planner of the recipe's own recompute plan from what the user says. Raises InputError."""
    assert given.seconds_per_image is not None
    if (given.image_bytes is None) != (given.fixed_bytes is None):
        raise InputError("--gib-per-image and --fixed-gib go together: memory = fixed + images x that of an image")
    cost = StepCost(0.0, 0.0, given.seconds_per_image, given.fixed_bytes, 0.0, given.image_bytes or 0.0)
    train = load_datasets(recipe, World(0, 1, torch.device("cpu"))).train
    TrainingPlan(train.sizes, recipe)  # refuses too few images
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    link = _given_link(given, GPU_LINK)
    model = _model(recipe, len(train.class_names))
    return Planner(recipe, {recipe.recompute: cost}, model, link, kind, len(train))


def _given_link(given: Given, otherwise: Link) -> Link:
    """The connection as the user says, or in part."""
    if given.bandwidth is None and given.latency is None:
        return otherwise
    said = " and ".join(
        name for name, value in (("bandwidth", given.bandwidth), ("latency", given.latency)) if value is not None
    )
    missing = "" if None not in (given.bandwidth, given.latency) else f"; the rest {otherwise.source}"
    return Link(
        otherwise.latency if given.latency is None else given.latency,
        otherwise.bandwidth if given.bandwidth is None else given.bandwidth,
        f"{said} as given{missing}",
    )


def _model(recipe: Recipe, num_classes: int) -> Model:
    detector = _detector(recipe, num_classes)
    return Model.of(detector, GradientBuckets(detector.parameters(), World(0, 1, torch.device("cpu"))))


def _detector(recipe: Recipe, num_classes: int, *, has_weights: bool = False) -> Detector:
    """One of random weights, or of those that the recipe names. Raises InputError for what cannot be built."""
    weights = recipe.backbone.weights if has_weights else ""
    with torch.random.fork_rng(devices=[]):
        detector = Detector(replace(recipe, backbone=replace(recipe.backbone, weights=weights)), num_classes)
    return detector.to(torch.float64) if recipe.precision == "float64" else detector


def known_noise_scale(recipe: Recipe, given: Given, assumptions: list[str]) -> float | None:
    """The gradient noise scale in images, as said or the last that a run has measured, which is then told.

    Raises InputError for a run without one, and for one whose scale is that of other groups or other data.
    """
    if given.noise_from is None:
        return given.noise_scale
    folder = RunFolder(given.noise_from)
    _refuse_other_noise(recipe, folder)
    metrics = folder.metrics
    measured = [record for record in read_metrics(metrics) if isinstance(record.get("noise"), dict)]
    if not measured:
        raise InputError(f"{metrics}: no step has a noise scale: train with noise_interval: 50, or give --noise-scale")
    noise = measured[-1]["noise"]
    try:
        scale = float(noise["model"]["scale"])
    except (KeyError, TypeError, ValueError):
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(
            f"{metrics}: the last noise scale of the model is no number above 0: the gradient was lost in its noise; "
            "give --noise-scale"
        )
    count = noise.get("measurements", len(measured))  # older runs do not count them
    estimator = noise.get("estimator", "unknown")
    too_large = " (too large)" if estimator == "successive steps" else ""
    assumptions.append(
        f"noise scale {scale:.4g} images from {folder.path}, step {measured[-1]['step']}, {count} "
        f"measurement{'' if count == 1 else 's'}, estimator {estimator}{too_large}"
    )
    return scale


def _refuse_other_noise(recipe: Recipe, folder: RunFolder) -> None:
    """A scale is that of groups of one size, with batch statistics or without, and of some images."""
    text = folder.read_recipe()
    if text is None:
        raise InputError(f"{folder.recipe} does not exist: --noise-from takes the folder of a run")
    other = parse_recipe(text, str(folder.recipe))
    groups = {
        "bn_size": (recipe.bn_size, other.bn_size),
        "group_size": (recipe.images_per_group, other.images_per_group),
    }
    for key, (ours, theirs) in groups.items():
        if ours != theirs:
            raise InputError(
                f"--noise-from {folder.path}: its noise scale is that of other groups ({key}: {ours} here, {theirs} "
                f"there), and such scales do not compare: train with {key} {ours}, or give --noise-scale"
            )
    here, there = recipe.data.train_annotations, other.data.train_annotations
    if Path(here).resolve() != Path(there).resolve():
        raise InputError(
            f"--noise-from {folder.path}: its noise scale is that of other images (data.train_annotations: {here} "
            f"here, {there} there): name a run on the same images, or give --noise-scale"
        )
