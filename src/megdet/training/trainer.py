"""The state that a step changes (detector, optimizer, averages, measurements): how it is made, saved and restored."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megdet.distributed.exact_gradients import ExactGradients
from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.lane import make_lane
from megdet.distributed.layout import Layout
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.inference.trained import place_model
from megdet.layers.batch_norm import has_statistics
from megdet.model.backbone import load_pretrained
from megdet.model.choice import make_detector
from megdet.model.detector import Detector
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import Kind
from megdet.training.images_apart import ImagesApart
from megdet.training.initial_weights import start_from_run
from megdet.training.optimizers.agvm import Agvm
from megdet.training.optimizers.averages import MovingAverage
from megdet.training.optimizers.noise_scale import NoiseScale
from megdet.training.optimizers.optimizer import make_optimizer, restore_state, state_by_name, state_layout
from megdet.training.optimizers.parts import parts_of
from megdet.training.pieces import Pieces
from megdet.training.watch import GradientWatch

Tensors = dict[Kind, dict[str, Tensor]]
"""The tensors of a checkpoint: kind (the name of a file) -> name -> tensor."""


@dataclass
class Trainer:
    """Everything that a step changes, and the recipe."""

    recipe: Recipe
    model: Detector
    optimizer: torch.optim.Optimizer
    buckets: GradientBuckets
    watch: GradientWatch
    averages: MovingAverage | None
    agvm: Agvm | None = None
    """AGVM, if the recipe has it"""
    noise: NoiseScale | None = None
    """the gradient noise scale, if the recipe measures it"""
    pieces: Pieces = field(default_factory=Pieces)
    """the pieces in which micro-batches are computed"""
    apart: ImagesApart | None = None
    """computes every image for itself, if the recipe is exact"""

    @property
    def extras(self) -> dict[Kind, GradientWatch | MovingAverage | Agvm | NoiseScale]:
        """What this recipe has besides the model and its optimizer, by its kind in a checkpoint."""
        extras: dict[Kind, GradientWatch | MovingAverage | Agvm | NoiseScale | None] = {
            "watch": self.watch,
            "averages": self.averages,
            "agvm": self.agvm,
            "noise": self.noise,
        }
        return {kind: extra for kind, extra in extras.items() if extra is not None}

    def state(self) -> Tensors:
        """The tensors of a checkpoint, for `restore`; they are not copied."""
        own: Tensors = {"model": self.model.state_dict(), "optimizer": state_by_name(self.model, self.optimizer)}
        return own | {kind: extra.state() for kind, extra in self.extras.items()}

    def layout(self, step: int) -> Tensors:
        """Names, shapes and dtypes of `state` after so many steps, as tensors without values."""
        layout = self.state() | {"optimizer": state_layout(self.model, self.optimizer) if step else {}}
        if self.noise is not None:
            layout["noise"] = self.noise.layout(step)
        return {kind: {name: _without_values(t) for name, t in own.items()} for kind, own in layout.items()}

    def restore(self, tensors: Tensors) -> None:
        """Restore what `state` returned; the caller must have checked that it fits."""
        self.model.load_state_dict(tensors["model"])
        restore_state(self.model, self.optimizer, tensors["optimizer"])
        for kind, extra in self.extras.items():
            extra.restore(tensors[kind])


def make_trainer(
    recipe: Recipe,
    class_names: tuple[str, ...],
    layout: Layout,
    world: World,
    *,
    is_resumed: bool = False,
    is_new: bool = True,
) -> Trainer:
    """The detector with weights drawn from the recipe's seed, its optimizer and its gradient buckets.

    Every rank gets the weights of rank 0; only rank 0 reads the weight files that the recipe names. A resumed run does
    not read them, since its checkpoint has all weights; they may be gone. Raises InputError for a weight file that does
    not fit and, unless `is_new` is false, for a `bn_size` that no batch norm uses, with which earlier versions trained.
    """
    lane = make_lane(world, layout)
    reads = world.is_first and not is_resumed

    def build() -> Detector:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = make_detector(recipe, len(class_names), lane)
            if recipe.bn_size and is_new and not has_statistics(model):
                raise InputError(
                    f"bn_size is {recipe.bn_size}, and no batch norm of this detector is trained, because its backbone "
                    "has none or model.backbone.frozen_stages freezes all: set bn_size 0, and group_size if you like"
                )
            if reads and recipe.model.backbone.weights:
                load_pretrained(model.backbone, Path(recipe.model.backbone.weights))
            if reads and recipe.start_from:
                start_from_run(model, class_names, recipe.start_from)
        return model

    model = world.together(build)
    place_model(model, world.device, recipe.precision)
    world.broadcast(model.state_dict().values())
    model.train()
    return trainer_of(recipe, model, world)


def trainer_of(recipe: Recipe, model: Detector, world: World) -> Trainer:
    """The trainer of a detector that is on its device, before its first step."""
    optimizer = make_optimizer(model, recipe.optimizer)
    averages = MovingAverage(model, recipe.optimizer.ema_decay) if recipe.optimizer.ema_decay else None
    buckets, apart = GradientBuckets(model.parameters(), world), None
    if recipe.exact:
        buckets = gradients = ExactGradients(model.parameters(), world, recipe.batch_size)
        apart = ImagesApart(model, recipe, gradients)
    parts, device, warmup_steps = parts_of(model, buckets.parameters), world.device, recipe.schedule.warmup_steps
    agvm = None
    if recipe.optimizer.agvm:
        agvm = Agvm(parts, model.reference_part, buckets.parameters, optimizer, warmup_steps, device)
    noise = None
    if recipe.noise_interval:
        name_of = {parameter: name for name, parameter in model.named_parameters()}
        noise = NoiseScale(parts, {name_of[parameter]: parameter for parameter in buckets.parameters}, recipe, device)
    watch = GradientWatch(recipe.watch, device)
    return Trainer(recipe, model, optimizer, buckets, watch, averages, agvm, noise, apart=apart)


def restore_everywhere(trainer: Trainer, tensors: Tensors, step: int, world: World) -> None:
    """Restore the trainer of every rank from rank 0's tensors, which fit; other ranks' `tensors` are ignored."""
    if world.size > 1:
        own = tensors if world.is_first else trainer.layout(step)
        tensors = {
            kind: {name: _on_device(own[kind][name], world.device) for name in names}
            for kind, names in trainer.layout(step).items()  # the order is the same on every rank
        }
        world.broadcast(tensor for group in tensors.values() for tensor in group.values())
    trainer.restore(tensors)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, whatever the device and the memory format."""
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        content.update(flat.view(torch.uint8).numpy().data)  # NumPy has no bfloat16
    return content.hexdigest()


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
