"""What a run needs before its first step: a folder of its own, its images, its detector, its place to resume."""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from megdet.data.coco import CocoDataset, training_set, validation_set
from megdet.data.demo import DEMO_SETS, draw_demo
from megdet.data.plan import TrainingPlan
from megdet.data.shared import once_a_host
from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.layout import Layout
from megdet.distributed.world import World, make_lane
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import CocoNumbers
from megdet.inference.predict import category_ids_for
from megdet.inference.trained import load_weights, place_model
from megdet.journal.checkpoint_files import (
    checkpoint_step,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_state,
)
from megdet.journal.environment import collect_environment, write_environment
from megdet.journal.run_folder import RunFolder
from megdet.model.detector import Detector
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe, first_difference, parse_recipe
from megdet.training.halves import parts_of
from megdet.training.modulator import Modulator
from megdet.training.noise_scale import NoiseScale
from megdet.training.optimizer import MovingAverage, like_parameter, make_optimizer, restore_state, state_by_name
from megdet.training.start import start_from_run
from megdet.training.step import Trainer

COARSEST_STRIDE = 32
"""Of the feature maps that have norm layers."""


@dataclass(frozen=True)
class Datasets:
    """The images of a run."""

    train: CocoDataset
    val: CocoDataset


def load_datasets(recipe: Recipe, world: World) -> Datasets:
    """Read both annotation files, one process a host, after drawing the demo data set where the recipe asks for it."""
    data = recipe.data
    error = None
    if world.is_first and data.draw_demo:
        try:
            draw_demo(Path(data.train_annotations).parent.parent, **asdict(DEMO_SETS[data.draw_demo]))
        except InputError as problem:
            error = str(problem)
    world.agree(error)
    train_set = once_a_host(world, lambda: training_set(data))
    val_set = once_a_host(world, lambda: validation_set(data))
    category_ids_for(train_set.class_names, val_set)
    if train_set.annotations.is_crowd.all():
        raise InputError(f"{data.train_annotations}: no image has a box, so there is nothing to learn")
    return Datasets(train_set, val_set)


def make_trainer(
    recipe: Recipe, dataset: CocoDataset, layout: Layout, world: World, *, is_resumed: bool = False
) -> Trainer:
    """The detector with weights drawn from the recipe's seed, its optimizer and its gradient buckets.

    A resumed run has all its weights in its checkpoint: the files that it started from need not exist any more.
    """
    lane = make_lane(world, layout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        built = replace(recipe, backbone=replace(recipe.backbone, weights="")) if is_resumed else recipe
        model = Detector(built, len(dataset.class_names), lane)
        if recipe.start_from and not is_resumed:
            start_from_run(model, dataset.class_names, recipe.start_from)
    place_model(model, world.device)
    model.train()
    return trainer_of(model, world)


def trainer_of(model: Detector, world: World) -> Trainer:
    """What trains a detector that is on its device, by the detector's own recipe, before its first step."""
    recipe = model.recipe
    optimizer = make_optimizer(model, recipe.optimizer)
    averages = MovingAverage(model, recipe.optimizer.ema_decay) if recipe.optimizer.ema_decay else None
    buckets = GradientBuckets(model.parameters(), world)
    parts, device, warmup_steps = parts_of(model, buckets.parameters), world.device, recipe.schedule.warmup_steps
    modulator = None
    if recipe.optimizer.agvm:
        modulator = Modulator(parts, buckets.parameters, optimizer, warmup_steps, device)
    noise = NoiseScale(parts, recipe, device) if recipe.noise_interval else None
    return Trainer(model, optimizer, buckets, averages, modulator, noise)


def check_statistics(recipe: Recipe, plan: TrainingPlan, dataset: CocoDataset) -> None:
    """Refuse batch statistics of single values: a BN size of 1 and a feature map of one pixel."""
    if recipe.bn_size != 1 or "batch" not in (recipe.backbone.norm, recipe.fpn.norm):
        return
    index, canvas = plan.smallest_canvas()
    if max(canvas) <= COARSEST_STRIDE:
        raise InputError(
            f"bn_size is 1 and {dataset.file_names[index]} may be resized to a canvas of {canvas[0]} x {canvas[1]} "
            f"pixels, of which one value is left at stride {COARSEST_STRIDE}, and that has no variance: raise bn_size "
            "or data.short_edges"
        )


def check_folder(folder: RunFolder, recipe: Recipe) -> None:
    """Refuse a run folder that holds another recipe; writes nothing."""
    text = folder.read_recipe()
    if text is None:
        return
    difference = first_difference(recipe, parse_recipe(text, str(folder.recipe)))
    if difference:
        raise InputError(
            f"{folder.path} holds a run of another recipe ({difference}): choose another --run folder, "
            "or repeat that run's recipe to resume it"
        )


def claim_folder(folder: RunFolder, recipe: Recipe, world: World) -> TextIO | None:
    """Make the folder where it is missing, lock it, write the recipe into it and note this start of the run.

    Returns the lock on rank 0; it is released when it is closed. Raises InputError when another run holds it.
    """
    error = lock = None
    if world.is_first:
        try:
            folder.create()
            lock = folder.lock()
            folder.write_recipe(dump_recipe(recipe))
            write_environment(folder, collect_environment(world.size, str(world.device)))
        except InputError as problem:
            error = str(problem)
    world.agree(error)
    return lock


def fingerprint(dataset: CocoDataset) -> str:
    """A hash of what the plan and the targets are made of: the images in their order, their sizes and their boxes."""
    table, content = dataset.annotations, hashlib.sha256(usedforsecurity=False)
    content.update(repr((dataset.image_ids, dataset.file_names, dataset.class_names)).encode())
    for column in (dataset.sizes, table.counts, table.boxes, table.labels, table.is_crowd):
        content.update(np.ascontiguousarray(column).data)
    return content.hexdigest()


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    step: int
    """steps done"""
    numbers: CocoNumbers | None
    """the last evaluation"""
    evaluated_step: int
    """the step after which it was made, -1 for none"""
    fingerprint: str
    """of the training data"""
    unevaluated: tuple[int, ...] = ()
    """steps whose checkpoints are kept and were not evaluated, the oldest first"""


def checkpoint_tensors(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The tensors of a checkpoint, which `resume` puts back."""
    tensors: dict[str, dict[str, Any]] = {
        "model": trainer.model.state_dict(),
        "optimizer": state_by_name(trainer.model, trainer.optimizer),
    }
    if trainer.averages is not None:
        tensors["averages"] = trainer.averages.tensors
    if trainer.modulator is not None:
        tensors["agvm"] = {"factors": trainer.modulator.factors}
    if trainer.noise is not None:
        kept = dict(zip(trainer.buckets.parameters, trainer.noise.kept, strict=False))
        own = {f"gradient.{name}": kept[p] for name, p in trainer.model.named_parameters() if p in kept}
        tensors["noise"] = {"averages": trainer.noise.averages, **own}
    return tensors


def _restore(trainer: Trainer, tensors: dict[str, dict[str, Any]]) -> None:
    """Put back what a checkpoint holds besides the weights."""
    restore_state(trainer.model, trainer.optimizer, tensors["optimizer"])
    if trainer.averages is not None:
        for name, tensor in tensors["averages"].items():
            trainer.averages.tensors[name].copy_(tensor)
    if trainer.modulator is not None:
        trainer.modulator.factors.copy_(tensors["agvm"]["factors"])
    if trainer.noise is not None:
        trainer.noise.averages.copy_(tensors["noise"]["averages"])
        names = {parameter: f"gradient.{name}" for name, parameter in trainer.model.named_parameters()}
        kept = [(parameter, tensors["noise"].get(names[parameter])) for parameter in trainer.buckets.parameters]
        trainer.noise.kept = [like_parameter(tensor, own) for own, tensor in kept if tensor is not None]


def resume(trainer: Trainer, folder: RunFolder, dataset: CocoDataset, world: World) -> Resumed:
    """Load the newest checkpoint, if there is one, and say where the run goes on."""
    checkpoint = latest_checkpoint(folder)
    data = fingerprint(dataset)
    if checkpoint is None:
        return Resumed(0, None, -1, data)
    tensors, state = load_checkpoint(checkpoint)
    if state["num_images"] != len(dataset) or tuple(state["class_names"]) != dataset.class_names:
        raise InputError(
            f"{checkpoint}: it was trained on {state['num_images']} images of {len(state['class_names'])} classes, "
            f"{dataset.annotations_file} has {len(dataset)} of {len(dataset.class_names)}: choose another --run folder"
        )
    if state.get("data", data) != data:
        raise InputError(
            f"{checkpoint}: the images or boxes have changed since in {dataset.annotations_file}: choose another --run "
            "folder, start_from goes on from these weights"
        )
    load_weights(trainer.model, tensors["model"], str(checkpoint / "model.safetensors"))
    _restore(trainer, tensors)
    unevaluated = tuple(checkpoint_step(path) for path in checkpoints(folder) if not _is_evaluated(path))
    world.barrier()  # every rank has read what rank 0 may now write
    numbers = None if state["evaluation"] is None else CocoNumbers.from_dict(state["evaluation"])
    return Resumed(int(state["step"]), numbers, int(state.get("evaluated_step", -1)), data, unevaluated)


def _is_evaluated(checkpoint: Path) -> bool:
    try:
        return bool(load_state(checkpoint).get("evaluated_step") == checkpoint_step(checkpoint))
    except InputError:
        return True  # an old one that is damaged has no part in going on
