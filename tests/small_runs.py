"""Runs of seconds on data sets of a few images, in this process or in several real ones."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_factories import box_row, triangle
from factories import TINY, reported_by
from megdet.architecture_parts import Backbone
from megdet.contract.run import make_every_layer_count
from megdet.contract.verify import relative_difference
from megdet.data.coco import CocoDataset, load_coco, write_coco
from megdet.distributed.layout import choose_layout
from megdet.distributed.world import World
from megdet.inference.trained import place_model
from megdet.model.choice import make_detector, mask_use
from megdet.model.detector import Detector
from megdet.recipe import Data, Evaluation, Optimizer, Recipe, Schedule
from megdet.recipe_file import dump_recipe
from megdet.run_folder.checkpoint_files import save_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_state import RunState
from megdet.training import checkpoint_writer
from megdet.training.optimizers.optimizer import state_by_name
from megdet.training.run import RunOptions, open_run
from megdet.training.trainer import Tensors, Trainer, make_trainer

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
CLASS_NAMES = ("bolt", "nut", "gear")


def write_small_sets(folder: Path) -> Path:
    """13 images to train on and 5 to evaluate on; returns the folder."""
    write_small_set(folder, "train", 13)
    write_small_set(folder, "val", 5, seed=1)
    return folder


def three_epochs(folder: Path, **optimizer: Any) -> Recipe:
    """13 images in steps of 8, with averages of weights: epochs end at steps 2, 4 and 5."""
    recipe = small_recipe(write_small_sets(folder))
    schedule = replace(recipe.schedule, epochs=3.0)
    return replace(recipe, schedule=schedule, optimizer=replace(recipe.optimizer, ema_decay=0.9, **optimizer))


def four_images_a_step(folder: Path, images: int) -> Recipe:
    """So many images of one size to train on, 4 a step in groups of 2."""
    write_small_set(folder, "train", images, same_size=True)
    write_small_set(folder, "val", 2, seed=1)
    small = small_recipe(folder, batch_size=4, bn_size=2)
    return replace(small, data=replace(small.data, short_edges=(48,)))


def die_when_saved(step: int) -> None:
    """Let this process be killed when it has saved the checkpoint of a step."""
    save = checkpoint_writer.save_checkpoint

    def save_and_die(folder: RunFolder, state: RunState, *arguments: Any) -> Any:
        save(folder, state, *arguments)
        if state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_writer.save_checkpoint = save_and_die  # type: ignore[assignment]  # this process is for one test


def write_small_set(folder: Path, split: str, count: int, seed: int = 0, same_size: bool = False) -> None:
    """Noise with one to three bright rectangles, whose class is their colour; image `i` has the id 100 + 3 i.

    The mask of each is a triangle, the upper left half of it.
    """
    random = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        height, width = (64, 64) if same_size else (int(edge) for edge in random.integers(40, 90, 2))
        pixels = random.integers(0, 110, (height, width, 3), dtype=np.uint8)
        row = {"id": 100 + 3 * index, "file_name": f"{index}.png", "width": width, "height": height}
        for _ in range(int(random.integers(1, 4))):
            x, y = random.uniform(0, 0.5, 2) * (width, height)
            w, h = random.uniform(0.2, 0.5, 2) * (width, height)
            label = int(random.integers(3))
            pixels[int(y) : int(y + h), int(x) : int(x + w), label] = 255
            bbox = [round(float(value), 2) for value in (x, y, w, h)]
            number, outline = len(annotations) + 1, [triangle(*bbox)]
            annotations.append(box_row(number, row["id"], 10 * (label + 1), bbox, segmentation=outline))
        images.append(row)
        Image.fromarray(pixels).save(folder / split / row["file_name"])
    categories = [{"id": 10 * (label + 1), "name": name} for label, name in enumerate(CLASS_NAMES)]
    write_coco(folder / f"{split}.json", images=images, annotations=annotations, categories=categories)


def small_recipe(folder: Path, **changes: Any) -> Recipe:
    """Batch norm over 4 of 8 images, in float64; two epochs of 16 images are 4 steps."""
    recipe = replace(
        TINY,
        batch_size=8,
        bn_size=4,
        plan_window=2,
        precision="float64",
        model=replace(
            TINY.model,
            backbone=Backbone(name="test_resnet"),
            fpn=replace(TINY.model.fpn, norm="batch"),
            box_head=replace(TINY.model.box_head, score_threshold=0.01),
        ),
        data=Data(
            train_annotations=str(folder / "train.json"),
            train_images=str(folder / "train"),
            val_annotations=str(folder / "val.json"),
            val_images=str(folder / "val"),
            short_edges=(48, 64),
            max_long_edge=80,
        ),
        optimizer=Optimizer(base_lr=0.02),
        schedule=Schedule(policy="step", epochs=2.0, warmup_steps=2, warmup_start=0.5),
        evaluation=Evaluation(batch_size=2),
    )
    return replace(recipe, **changes)


def train_set(recipe: Recipe, *, with_masks: bool | None = None) -> CocoDataset:
    """With masks where the detector learns from some, if nothing else is asked for."""
    asked = mask_use(recipe.model) != "none" if with_masks is None else with_masks
    files = Path(recipe.data.train_annotations), Path(recipe.data.train_images)
    return load_coco(*files, keep_empty=False, with_masks=asked)


def save_run(
    folder: Path, recipe: Recipe, class_names: tuple[str, ...] = CLASS_NAMES, *, averages: bool = False, seed: int = 0
) -> tuple[RunFolder, Detector]:
    """A run folder with one checkpoint of weights that were never trained; the averages are the weights and 1."""
    run = RunFolder(folder).create()
    run.write_recipe(dump_recipe(recipe))
    torch.manual_seed(seed)
    model = make_detector(recipe, len(class_names))
    place_model(model, CPU, recipe.precision)
    with torch.no_grad():
        model.box_head.classes.weight *= 30
        model.box_head.classes.weight += torch.randn_like(model.box_head.classes.weight) * 0.1
    tensors: Tensors = {"model": model.state_dict(), "optimizer": {}}
    if averages:
        tensors["averages"] = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_checkpoint(run, run_state(7, class_names), tensors, keep=1)
    return run, model


def run_state(step: int, class_names: tuple[str, ...] = CLASS_NAMES, **known: Any) -> RunState:
    """What a checkpoint says besides its tensors, with one training image if nothing else is known."""
    category_ids = tuple(10 * (label + 1) for label in range(len(class_names)))
    return RunState(
        **{"step": step, "class_names": class_names, "category_ids": category_ids, "num_images": 1, **known}
    )


def val_set(recipe: Recipe) -> CocoDataset:
    return load_coco(Path(recipe.data.val_annotations), Path(recipe.data.val_images), keep_empty=True)


def make(recipe: Recipe, world: World = ALONE, width: int | None = None) -> Trainer:
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, world.size, width)
    return make_trainer(recipe, train_set(recipe).class_names, layout, world)


def run_steps(
    recipe: Recipe, steps: int, world: World = ALONE, width: int | None = None, *, counts_all: bool = True
) -> tuple[Trainer, list[Tensor]]:
    """The trainer after some steps of the recipe's plan, and what each of them reported."""
    with open_run(recipe, world, RunOptions(workers=0, lane_width=width)) as run:
        if counts_all:
            make_every_layer_count(run.trainer)
        reported = [reported_by(result) for result in run.steps(0, steps)]
    return run.trainer, reported


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of everything that a step changes: weights, buffers, momentum, averages, AGVM, noise, watch."""
    tensors = trainer.state()
    state = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    state |= {f"momentum.{name}": t for name, t in state_by_name(trainer.model, trainer.optimizer).items()}
    state |= {f"{kind}.{name}": t for kind in ("agvm", "noise", "watch") for name, t in tensors.get(kind, {}).items()}
    if trainer.averages is not None:
        state |= {f"averages.{name}": tensor for name, tensor in trainer.averages.tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of two states, and where it is."""
    assert ours.keys() == theirs.keys()
    return max((relative_difference(ours[name], theirs[name]), name) for name in ours)
