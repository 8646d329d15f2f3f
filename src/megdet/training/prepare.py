"""What a run needs before its first step: a folder of its own, its images, its detector, its place to resume."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from megdet.data.coco import CocoDataset, training_set, validation_set
from megdet.data.demo import DEMO_SETS, draw_demo
from megdet.data.plan import TrainingPlan
from megdet.data.shared import once_a_host
from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.lane import make_lane
from megdet.distributed.layout import Layout
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import CocoNumbers
from megdet.files import delete_leftovers
from megdet.inference.predict import category_ids_for
from megdet.inference.trained import place_model
from megdet.journal.checkpoint_files import Checkpoint, checkpoint_step, checkpoints, latest_checkpoint, open_checkpoint
from megdet.journal.environment import collect_environment, write_environment
from megdet.journal.run_folder import FolderLock, RunFolder
from megdet.journal.tensor_check import check_finite, check_tensors
from megdet.model.backbone import load_pretrained
from megdet.model.choice import detector_class, make_detector
from megdet.model.detector import Detector
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe, first_difference, parse_recipe
from megdet.training.halves import parts_of
from megdet.training.modulator import Modulator
from megdet.training.noise_scale import NoiseScale
from megdet.training.optimizer import MovingAverage, make_optimizer
from megdet.training.start import start_from_run
from megdet.training.step import Trainer
from megdet.training.trainer_state import Tensors, restore_everywhere, tensor_layout

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
    if data.draw_demo:
        root, demo = Path(data.train_annotations).parent.parent, asdict(DEMO_SETS[data.draw_demo])
        world.on_first(lambda: draw_demo(root, **demo))
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

    Every rank has the weights of rank 0, which alone reads the files that the recipe starts from. A resumed run has all
    its weights in its checkpoint: those files need not exist any more.
    """
    lane = make_lane(world, layout)
    reads = world.is_first and not is_resumed

    def build() -> Detector:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = make_detector(recipe, len(dataset.class_names), lane)
            if reads and recipe.model.backbone.weights:
                load_pretrained(model.backbone, Path(recipe.model.backbone.weights))
            if reads and recipe.start_from:
                start_from_run(model, dataset.class_names, recipe.start_from)
        return model

    model = world.together(build)
    place_model(model, world.device, recipe.precision)
    world.broadcast(model.state_dict().values())
    model.train()
    return trainer_of(recipe, model, world)


def trainer_of(recipe: Recipe, model: Detector, world: World) -> Trainer:
    """What trains a detector that is on its device, before its first step."""
    optimizer = make_optimizer(model, recipe.optimizer)
    averages = MovingAverage(model, recipe.optimizer.ema_decay) if recipe.optimizer.ema_decay else None
    buckets = GradientBuckets(model.parameters(), world)
    parts, device, warmup_steps = parts_of(model, buckets.parameters), world.device, recipe.schedule.warmup_steps
    modulator = None
    if recipe.optimizer.agvm:
        modulator = Modulator(parts, model.reference_part, buckets.parameters, optimizer, warmup_steps, device)
    noise = NoiseScale(parts, recipe, device) if recipe.noise_interval else None
    return Trainer(recipe, model, optimizer, buckets, averages, modulator, noise)


def check_statistics(recipe: Recipe, plan: TrainingPlan, dataset: CocoDataset) -> None:
    """Refuse batch statistics of single values: a BN size of 1 and a feature map of one pixel."""
    norms = [recipe.model.norms.get(name) for name in detector_class(recipe.model).map_norms]
    if recipe.bn_size != 1 or "batch" not in norms:
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


def claim_folder(folder: RunFolder, recipe: Recipe, world: World) -> FolderLock | None:
    """Make the folder where it is missing, lock it, write the recipe into it and note this start of the run.

    Returns the lock on rank 0; it is released when it is closed. Raises InputError when another run holds it.
    """
    locks: list[FolderLock] = []

    def claim() -> None:
        folder.create()
        locks.append(folder.lock())
        delete_leftovers(folder.path, inside=True)
        folder.write_recipe(dump_recipe(recipe))
        write_environment(folder, collect_environment(world.size, str(world.device)))

    world.on_first(claim)
    return locks[0] if locks else None


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


def resume(trainer: Trainer, folder: RunFolder, dataset: CocoDataset, world: World) -> Resumed:
    """Go on from rank 0's newest checkpoint, if it has one: it alone reads, every rank gets its tensors.

    Raises InputError, before one tensor is changed, for a checkpoint that is damaged, of other data or of another run.
    """
    tensors: Tensors = {}

    def read() -> Resumed:
        newest, data = latest_checkpoint(folder), fingerprint(dataset)
        if newest is None:
            return Resumed(0, None, -1, data)
        checkpoint = open_checkpoint(newest)
        _check_data(checkpoint, dataset, data)
        tensors.update(read_tensors(checkpoint, trainer))
        state = checkpoint.state
        unevaluated = tuple(checkpoint_step(path) for path in checkpoints(folder) if not _is_evaluated(path))
        return Resumed(state.step, _numbers(checkpoint), state.evaluated_step, data, unevaluated)

    resumed = world.on_first(read)
    if resumed.step:
        restore_everywhere(trainer, tensors, resumed.step, world)
    return resumed


def read_tensors(checkpoint: Checkpoint, trainer: Trainer) -> Tensors:
    """The tensors of a checkpoint, each of the name, shape and dtype that the trainer has after so many steps.

    Raises InputError for anything missing, left over or different, and for weights that are not finite.
    """
    layout = tensor_layout(trainer, checkpoint.state.step)
    if different := set(layout) ^ set(checkpoint.hashes):
        kind = min(different)
        how = ("lacks", "every") if kind in layout else ("has", "no")
        raise checkpoint.damaged(f"it {how[0]} {kind}.safetensors, which {how[1]} checkpoint of this recipe has")
    tensors: Tensors = {}
    for kind, wanted in layout.items():
        tensors[kind] = checkpoint.tensors(kind)
        try:
            check_tensors(tensors[kind], wanted, str(checkpoint.file(kind)))
            if kind in ("model", "averages"):
                check_finite(tensors[kind], str(checkpoint.file(kind)))
        except InputError as error:
            raise checkpoint.damaged(str(error)) from None
    return tensors


def _check_data(checkpoint: Checkpoint, dataset: CocoDataset, data: str) -> None:
    state = checkpoint.state
    if state.num_images != len(dataset) or state.class_names != dataset.class_names:
        raise InputError(
            f"{checkpoint.path}: it was trained on {state.num_images} images of {len(state.class_names)} classes, "
            f"{dataset.annotations_file} has {len(dataset)} of {len(dataset.class_names)}: choose another --run folder"
        )
    if state.data != data:
        raise InputError(
            f"{checkpoint.path}: the images or boxes have changed since in {dataset.annotations_file}: choose another "
            "--run folder, start_from goes on from these weights"
        )


def _numbers(checkpoint: Checkpoint) -> CocoNumbers | None:
    values = checkpoint.state.evaluation
    try:
        return (
            None if values is None else CocoNumbers.from_dict(values, f"{checkpoint.path / 'state.json'}: evaluation")
        )
    except InputError as error:
        raise checkpoint.damaged(str(error)) from None


def _is_evaluated(path: Path) -> bool:
    try:
        return open_checkpoint(path).state.evaluated_step == checkpoint_step(path)
    except InputError:
        return True  # an old one that is damaged has no part in going on
