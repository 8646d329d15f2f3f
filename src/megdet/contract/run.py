"""The work of one rank for `megdet verify`: a short training with the code of any other run, and its results."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megdet.data.classes import category_ids_for
from megdet.distributed.layout import Layout, recipe_layout
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.inference.predict import Result, detect_dataset
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.training.optimizers.averages import MovingAverage
from megdet.training.run import RunOptions, open_run
from megdet.training.trainer import Trainer, digest

Leak = Callable[[Trainer, World], None]
"""Changes a trainer before its first step so that the result depends on the devices: a control for `verify`."""


@dataclass(frozen=True)
class Training:
    """One training of a case: some steps of a recipe on so many ranks."""

    recipe: Recipe
    ranks: int
    lane_width: int | None
    """forced lane width; None = chosen as in any other run"""
    steps: tuple[int, int]
    """the first step, and the end (not included)"""
    folder: Path | None = None
    """the run folder where its checkpoint is saved, or read if the first step is not 0"""

    @property
    def layout(self) -> Layout:
        """How the ranks share the images. Raises InputError if they cannot."""
        return recipe_layout(self.recipe, self.ranks, self.lane_width)


@dataclass
class Trained:
    """The results of a run, on rank 0."""

    gradients: dict[str, Tensor]
    """gradients of the first step, summed over ranks and clipped"""
    reported: list[dict[str, Tensor]]
    """losses, counts, gradient norm and whether the update was left out, of every step"""
    rates: list[float]
    state: dict[str, Tensor]
    """weights, buffers, momentum, averages, and the state of AGVM, noise scale and watch, after the last step"""
    detections: list[Result]
    """detections with the final weights, or with their averages"""
    unmoved: list[str]
    """trained tensors that are bitwise the same as at the start"""
    drifted: list[int]
    """ranks whose weights or buffers differ bitwise from those of rank 0"""

    def sha256(self) -> str:
        """Of every bit of the state and of the detections."""
        found = hashlib.sha256(digest(self.state).encode())
        found.update(json.dumps(self.detections, allow_nan=True).encode())
        return found.hexdigest()


def run_steps(world: World, training: Training, leak: Leak | None = None) -> Trained | None:
    """Train (and save a checkpoint, or resume from one) and detect; every rank calls it, rank 0 gets the results."""
    first, last = training.steps
    folder = None if training.folder is None else RunFolder(training.folder)
    options = RunOptions(workers=0, lane_width=training.lane_width)
    with open_run(training.recipe, world, options, folder) as run:
        if run.first_step != first:
            raise InputError(f"{training.folder} holds step {run.first_step}, not {first}")
        trainer, datasets = run.trainer, run.datasets
        if first == 0 and not training.recipe.start_from:
            make_every_layer_count(trainer)
        if leak is not None:
            leak(trainer, world)
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        start = {name: parameter.detach().clone() for name, parameter in trained.items()}
        gradients: dict[str, Tensor] = {}
        rows, rates = [], []
        for result in run.steps(first, last):
            rates.append(result.rate)
            verdict = result.verdict.is_left_out.to(result.gradient_norm.dtype)
            named = {**result.means, "gradient_norm": result.gradient_norm, "left_out": verdict}
            rows.append({name: copy_of(value) for name, value in named.items()})
            if result.step == first:
                gradients = {name: copy_of(p.grad) for name, p in trained.items() if p.grad is not None}
        if first == 0 and folder is not None:
            run.save(last)
        state = state_of(trainer)
        drifted = _drifted(state, world)
        if trainer.averages is not None:
            trainer.model.load_state_dict(trainer.averages.tensors)
        ids = category_ids_for(datasets.train.class_names, datasets.val)
        found = detect_dataset(trainer.model, run.recipe, datasets.val, ids, world, workers=0)
    if not world.is_first:
        return None
    kind = "weights."
    unmoved = [kind + name for name, before in start.items() if torch.equal(before.cpu(), state[kind + name])]
    return Trained(gradients, rows, rates, state, found, unmoved, drifted)


def make_every_layer_count(trainer: Trainer) -> None:
    """Set weights with which every layer affects the result, so that a fault in it shows.

    A new residual block ends in a norm of weight 0, and new heads have tiny weights.
    """
    with torch.no_grad():
        for parameter in trainer.model.backbone.parameters():
            if not parameter.any():  # the layer then gives half the mean of its inputs
                parameter.fill_(0.5 / parameter[0].numel())
        for layer, factor in trainer.model.small_start.items():
            trainer.model.get_parameter(f"{layer}.weight").mul_(factor)
    if trainer.averages is not None:
        trainer.averages = MovingAverage(trainer.model, trainer.averages.decay)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies on the CPU of everything that a step changes: weights, buffers, momentum, averages, AGVM, noise, watch."""
    weights = {name for name, _ in trainer.model.named_parameters()}
    tensors = trainer.state()
    kinds = {"optimizer": "momentum", "averages": "averages", "agvm": "agvm", "noise": "noise", "watch": "watch"}
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
