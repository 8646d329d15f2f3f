"""The inputs of a plan: steps measured here, an earlier measurement, or numbers from the user."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from megdet.data.sampling.frequencies import training_plan
from megdet.distributed.layout import Layout
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.model.backbone import pretrained_tensors
from megdet.planning.counting import exchange_of, meta_detector
from megdet.planning.layouts import Planner
from megdet.planning.measurement import GIB, Measurement, fit_costs, read_measurement
from megdet.planning.measuring import Measuring, measure, sizes_to_measure
from megdet.planning.network import Fabric, flat_fabric
from megdet.planning.step import StepCost
from megdet.recipe import Recipe, RecomputePlan
from megdet.recipe_file import first_difference, parse_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.training.datasets import load_datasets

ALL_PLANS: tuple[RecomputePlan, ...] = get_args(RecomputePlan)
_GPU_LATENCY, _GPU_BANDWIDTH = 2.7e-6, 50e9
_GPU_SOURCE = (
    "ConnectX-7 of 400 Gb/s by NVIDIA's data sheet; a hop of a ring over the network by src/graph/tuning.cc of NCCL"
)
"""Assumed for GPUs unless the user says otherwise: one network adapter a GPU, as in a DGX H100."""


@dataclass(frozen=True)
class Given:
    """Numbers from the user, instead of measured ones."""

    measured: Path | None = None
    """file of an earlier `megdet plan --json`"""
    seconds_per_image: float | None = None
    """seconds of a step, per image, with the recipe's own recompute plan"""
    image_bytes: float | None = None
    """memory of an image"""
    fixed_bytes: float | None = None
    """memory of everything else"""
    bandwidth: float | None = None
    """bytes a second that a device sends"""
    latency: float | None = None
    """seconds from one device to the next"""
    noise_scale: float | None = None
    """images"""
    noise_from: Path | None = None
    """run folder whose metrics have the noise scale"""


def measure_recipe(
    recipe: Recipe, layout: Layout, how: Measuring, assumptions: list[str], progress: Callable[[str], None]
) -> Measurement:
    """Measure, by default at the sizes of a layout. Raises InputError as `measure` does, before any step is made."""
    backbone = recipe.model.backbone
    if backbone.weights:  # a missing file is refused before anything is measured
        pretrained_tensors(backbone.name, Path(backbone.weights))
    plans = [recipe.recompute, *(plan for plan in how.plans or ALL_PLANS if plan != recipe.recompute)]
    try:
        for plan in plans:
            meta_detector(replace(recipe, recompute=plan), 1)
    except InputError as error:  # a backbone without blocks has the recompute plan none only
        if how.plans:
            raise
        assumptions.append(f"no other recompute plan: {error}")
        plans = plans[:1]
    return measure(recipe, replace(how, sizes=how.sizes or sizes_to_measure(layout), plans=plans), progress)


def measured_earlier(recipe: Recipe, path: Path) -> Measurement:
    """An earlier measurement. Raises InputError if the steps of its recipe do not cost the same."""
    measurement = read_measurement(path)
    other = parse_recipe(measurement.recipe, str(path))
    # the cost of a micro-batch does not depend on these keys, except on whether statistics are frozen
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


def planner_of_measurement(
    recipe: Recipe, measurement: Measurement, how: Measuring, fabric: Fabric, assumptions: list[str]
) -> Planner:
    """A planner of these recompute plans and the recipe's own. Raises InputError for one that was not measured."""
    costs = fit_costs(measurement)
    asked = [recipe.recompute, *(how.plans or costs)]
    missing = [plan for plan in asked if plan not in costs]
    if missing:
        raise InputError(f"recompute {missing[0]} was not measured, only {', '.join(costs)}: measure it too")
    together = measurement.side_by_side
    side = f"{together} side by side" if together > 1 else "alone"
    assumptions.append(f"every device is like this one: {measurement.machine} ({measurement.device}), measured {side}")
    if measurement.others_bytes:
        assumptions.append(
            f"the {measurement.others_bytes / GIB:.3g} GiB of the GPU that other processes held when measuring began "
            "are in no number here; if they computed meanwhile, the seconds are too long"
        )
    load_seconds, loads_beside = measurement.load_seconds / max(1, how.workers), how.workers > 0
    costs = {
        plan: replace(cost, load_seconds=load_seconds, loads_beside=loads_beside)
        for plan, cost in costs.items()
        if plan in asked
    }
    return Planner(
        recipe,
        costs,
        exchange_of(meta_detector(recipe, measurement.num_classes), gathers_sums=measurement.device == "cpu"),
        fabric,
        measurement.num_images,
        measurement.num_val_images,
        measurement.evaluation_seconds,
    )


def planner_of_numbers(recipe: Recipe, given: Given, device: str, fabric: Fabric) -> Planner:
    """A planner of the recipe's own recompute plan from the user's numbers. Raises InputError."""
    assert given.seconds_per_image is not None
    if (given.image_bytes is None) != (given.fixed_bytes is None):
        raise InputError("--gib-per-image and --fixed-gib go together: memory = fixed + images x that of an image")
    cost = StepCost(0.0, 0.0, given.seconds_per_image, given.fixed_bytes, 0.0, given.image_bytes or 0.0)
    train = load_datasets(recipe, World(0, 1, torch.device("cpu"))).train
    training_plan(train, recipe)  # refuses too few images
    exchange = exchange_of(meta_detector(recipe, len(train.class_names)), gathers_sums=device == "cpu")
    return Planner(recipe, {recipe.recompute: cost}, exchange, fabric, len(train))


def linked(measurement: Measurement | None, given: Given) -> tuple[Fabric, str]:
    """The connection of the devices, as given, as measured or as usual for GPUs; and its description."""
    if measurement is None or measurement.latency is None or measurement.bandwidth is None:
        latency, bandwidth, source = _GPU_LATENCY, _GPU_BANDWIDTH, _GPU_SOURCE
    else:
        latency, bandwidth = measurement.latency, measurement.bandwidth
        source = "measured between two processes of this machine"
    said = {"bandwidth": given.bandwidth, "latency": given.latency}
    names = [name for name, value in said.items() if value is not None]
    if names:
        source = f"{' and '.join(names)} as given" + ("" if len(names) == 2 else f"; the rest {source}")
    latency = latency if given.latency is None else given.latency
    bandwidth = bandwidth if given.bandwidth is None else given.bandwidth
    rate = f"{bandwidth / 1e9:.3g} GB/s and {latency * 1e6:.3g} us a hop"
    words = f"devices are linked by {rate} ({source}), and sending overlaps with nothing"
    return flat_fabric(latency, bandwidth), words


def known_noise_scale(recipe: Recipe, given: Given, assumptions: list[str]) -> float | None:
    """The gradient noise scale in images: as given, or the last one that a run has measured (noted as an assumption).

    Raises InputError for a run without one, and for a run with other groups or other data.
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
        scale, count, estimator = float(noise["model"]["scale"]), noise["measurements"], noise["estimator"]
    except (KeyError, TypeError, ValueError):
        scale, count, estimator = math.nan, 0, ""
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(
            f"{metrics}: the last noise scale of the model is no number above 0: the gradient was lost in its noise; "
            "give --noise-scale"
        )
    too_large = " (too large)" if estimator == "successive steps" else ""
    assumptions.append(
        f"noise scale {scale:.4g} images from {folder.path}, step {measured[-1]['step']}, {count} "
        f"measurement{'' if count == 1 else 's'}, estimator {estimator}{too_large}"
    )
    return scale


def _refuse_other_noise(recipe: Recipe, folder: RunFolder) -> None:
    """Raise InputError for a run whose noise scale does not hold here: with other groups or other images."""
    text = folder.read_recipe()
    if text is None:
        raise InputError(f"{folder.recipe} does not exist: --noise-from takes the folder of a run")
    other = parse_recipe(text, str(folder.recipe))
    sizes = ("bn_size", recipe.bn_size, other.bn_size), ("group_size", recipe.images_per_group, other.images_per_group)
    for key, ours, theirs in sizes:
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
