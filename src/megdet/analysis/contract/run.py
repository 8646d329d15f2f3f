"""What one rank does for `megdet verify`: a short training through the code of every other run, and what it left."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from megdet.data.loader import training_batches
from megdet.data.plan import TrainingPlan
from megdet.distributed.layout import Layout, recipe_layout
from megdet.distributed.world import World
from megdet.inference.predict import Result, category_ids_for, detect_dataset
from megdet.journal.checkpoint_files import save_checkpoint
from megdet.journal.run_folder import RunFolder
from megdet.journal.run_state import RunState
from megdet.recipe import Recipe
from megdet.training.optimizer import MovingAverage
from megdet.training.prepare import Datasets, fingerprint, load_datasets, make_trainer, resume
from megdet.training.schedule import learning_rate
from megdet.training.step import Trainer, train_step
from megdet.training.trainer_state import checkpoint_tensors, digest

Habit = Callable[[Trainer, World], None]
"""Something done to a trainer before its first step; the controls break the contract with it."""


@dataclass(frozen=True)
class Run:
    """One training of a case: some steps of a recipe on so many ranks."""

    recipe: Recipe
    ranks: int
    lane_width: int | None
    """forced, or chosen as any other run does"""
    steps: tuple[int, int]
    """the first, and the one before which it ends"""
    folder: Path | None = None
    """of its checkpoint: where it is left, or where the run goes on if its first step is not 0"""

    @property
    def layout(self) -> Layout:
        """How the ranks share the images. Raises InputError where they cannot."""
        return recipe_layout(self.recipe, self.ranks, self.lane_width)


@dataclass
class Outcome:
    """What a run left behind, as rank 0 has it."""

    gradients: dict[str, Tensor]
    """of its first step, summed over ranks and clipped"""
    names: tuple[str, ...]
    """of what a forward reports"""
    reported: Tensor
    """what every step reported, and the norm of its gradient"""
    rates: list[float]
    state: dict[str, Tensor]
    """weights, buffers, momentum, averages and what AGVM and the noise scale remember, after the last step"""
    detections: list[Result]
    """of the final weights, or of their averages"""
    unmoved: list[str]
    """trained tensors that are bitwise what they were at the start"""
    drifted: list[int]
    """ranks whose weights or buffers are not bitwise those of rank 0"""


def run_steps(world: World, run: Run, habit: Habit | None = None) -> Outcome | None:
    """Train, leave a checkpoint or go on from one, detect; every rank calls it, rank 0 gets the outcome."""
    recipe, layout = run.recipe, run.layout
    datasets = load_datasets(recipe, world)
    plan = TrainingPlan(datasets.train.sizes, recipe)
    first, last = run.steps
    trainer = make_trainer(recipe, datasets.train, layout, world, is_resumed=first > 0)
    if first > 0 and run.folder is not None:
        resume(trainer, RunFolder(run.folder), datasets.train, world)
    elif not recipe.start_from:
        wake(trainer)
    if habit is not None:
        habit(trainer, world)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    batches = training_batches(datasets.train, plan, layout, world.rank, run.steps, workers=0, device=world.device)
    groups = layout.groups_of(world.rank)
    gradients: dict[str, Tensor] = {}
    rows, rates = [], []
    for step in range(first, last):
        rates.append(learning_rate(recipe, plan.num_images, step))
        rows.append(train_step(trainer, islice(batches, len(groups)), groups, rates[-1], step, world).cpu())
        if step == first:
            gradients = {name: copy_of(p.grad) for name, p in trained.items() if p.grad is not None}
    if first == 0 and run.folder is not None:
        _save(trainer, datasets, RunFolder(run.folder), last, world)
    state = state_of(trainer)
    drifted = _drifted(state, world)
    if trainer.averages is not None:
        trainer.model.load_state_dict(trainer.averages.tensors)
    ids = category_ids_for(datasets.train.class_names, datasets.val)
    found = detect_dataset(trainer.model, recipe, datasets.val, ids, world, workers=0)
    if not world.is_first:
        return None
    kind = "weights."
    unmoved = [kind + name for name, before in start.items() if torch.equal(before.cpu(), state[kind + name])]
    return Outcome(gradients, trainer.model.reported(), torch.stack(rows), rates, state, found, unmoved, drifted)


def wake(trainer: Trainer) -> None:
    """Weights with which every layer counts: fresh ones silence the blocks of the backbone and whisper in the heads."""
    with torch.no_grad():
        for parameter in trainer.model.backbone.parameters():
            if not parameter.any():
                parameter.fill_(0.5)
        for layer, factor in trainer.model.faint_layers.items():
            trainer.model.get_parameter(f"{layer}.weight").mul_(factor)
    if trainer.averages is not None:
        trainer.averages = MovingAverage(trainer.model, trainer.averages.decay)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies on the CPU of everything that a step changes: weights, buffers, momentum, averages, AGVM, noise."""
    weights = {name for name, _ in trainer.model.named_parameters()}
    tensors = checkpoint_tensors(trainer)
    kinds = {"optimizer": "momentum", "averages": "averages", "agvm": "agvm", "noise": "noise"}
    return {
        f"{kinds.get(kind, 'weights' if name in weights else 'buffers')}.{name}": copy_of(tensor)
        for kind, own in tensors.items()
        for name, tensor in own.items()
    }


def copy_of(tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    return tensor.detach().cpu().clone()


def _drifted(state: dict[str, Tensor], world: World) -> list[int]:
    digests = world.gather_objects(digest(state))
    return [rank for rank, own in enumerate(digests) if own != digests[0]]


def _save(trainer: Trainer, datasets: Datasets, folder: RunFolder, step: int, world: World) -> None:
    if world.is_first:
        state = RunState(
            step=step,
            class_names=datasets.train.class_names,
            category_ids=datasets.train.category_ids,
            num_images=len(datasets.train),
            data=fingerprint(datasets.train),
        )
        save_checkpoint(folder, state, checkpoint_tensors(trainer), keep=1)
    world.barrier()
