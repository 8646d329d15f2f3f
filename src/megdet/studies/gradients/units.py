"""Gradients of sampling units at the weights of a run's checkpoint, by the code that trains.

Units are drawn independently of each other. A unit is one image if images do not interact (frozen statistics, group
norm or no norm). Under batch norm it is the group of bn_size images, which share statistics. The gradient is that of
the losses of Eq. 1, without weight decay, which is the same for every mini-batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megdet.data.coco import CocoDataset, training_set
from megdet.data.loader import training_batches
from megdet.data.plan import TrainingPlan
from megdet.data.sampling.frequencies import training_plan
from megdet.distributed.layout import recipe_layout
from megdet.errors import InputError
from megdet.inference.trained import load_weights, place_model, read_recipe
from megdet.layers.batch_norm import has_statistics
from megdet.model.choice import make_detector, mask_use
from megdet.model.detector import Detector
from megdet.precision import arithmetic, backward
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import checkpoint_path, latest_checkpoint, open_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.structures import Batch
from megdet.training.datasets import fingerprint

COLUMNS = 1 << 13
"""Numbers that a sketch keeps of a module's gradient: its squared norm is then off by 1.6% (one sigma)."""
_CHUNK = 1 << 22  # entries of a gradient that a sketch takes at once, to save memory


@dataclass(frozen=True)
class Study:
    """A detector in training mode with the weights of a checkpoint, and the images it was trained on."""

    folder: RunFolder
    step: int
    recipe: Recipe
    model: Detector
    dataset: CocoDataset
    plan: TrainingPlan
    device: torch.device
    overrides: dict[str, Any] = field(default_factory=dict)
    """keys in which the recipe differs from the run's"""

    @property
    def has_groups(self) -> bool:
        """Whether the unit is the group."""
        return has_statistics(self.model)

    @property
    def unit_images(self) -> int:
        """Images of a unit."""
        return self.recipe.bn_size if self.has_groups else 1

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(step, group) of groups of the plan that share no image."""
        return disjoint_groups(self.plan)

    @property
    def disjoint_images(self) -> int:
        """The number of images in `groups`."""
        return len(self.groups) * self.recipe.images_per_group

    @property
    def trained(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters of each module that has some."""
        parts = {name: self.model.get_submodule(name) for name in self.model.parts}
        found = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
        return {name: parameters for name, parameters in found.items() if parameters}


def load_study(
    folder: RunFolder, device: torch.device, overrides: dict[str, Any] | None = None, step: int | None = None
) -> Study:
    """The trained weights of a checkpoint, by default the newest, not their averages, and the run's training images.

    Raises InputError if the folder is not a run or has no such checkpoint, and if the training data are missing or not
    those of the run.
    """
    recipe = read_recipe(folder, overrides)
    path = latest_checkpoint(folder) if step is None else checkpoint_path(folder, step)
    if path is None:
        raise InputError(f"{folder.path}: the run has no checkpoint yet; `megdet train` writes one an epoch")
    checkpoint = open_checkpoint(path)
    state = checkpoint.state
    data = recipe.data
    dataset = training_set(data, masks=mask_use(recipe.model))
    if state.class_names != dataset.class_names:
        raise InputError(f"{data.train_annotations}: its classes are not those that the run was trained on")
    if state.data and state.data != fingerprint(dataset):
        raise InputError(
            f"{data.train_annotations}: its images or boxes are not those that {folder.path} was trained on, so its "
            "gradients would be of other data: bring them back, or train on these"
        )
    plan = training_plan(dataset, recipe)
    model = make_detector(recipe, len(dataset.class_names))
    place_model(model, device, recipe.precision)
    load_weights(model, checkpoint.tensors("model"), str(checkpoint.file("model")))
    model.train()
    return Study(folder, state.step, recipe, model, dataset, plan, device, overrides or {})


def disjoint_groups(plan: TrainingPlan) -> list[tuple[int, int]]:
    """(step, group) of the first epoch's groups in the plan's order, without groups that repeat an image.

    The last window of the epoch also has images of the next one. With `data.copy_paste` objects of one image may still
    be pasted onto several.
    """
    window = plan.recipe.plan_window
    seen: set[int] = set()
    found = []
    for step in range(-(-plan.epoch_end(1) // window) * window):
        for number, group in enumerate(plan.groups(step)):
            own = {image.index for image in group.images}
            if len(own) == len(group.images) and not seen & own:
                seen |= own
                found.append((step, number))
    return found


def units_of_plan(study: Study, num_units: int, workers: int) -> Iterator[Batch]:
    """The first units of the run's plan that share no image, each with its group's canvas and augmentation.

    They have at most `study.disjoint_images` images.
    """
    recipe = study.recipe
    chosen = study.groups[: -(-num_units * study.unit_images // recipe.images_per_group)]
    steps = (0, chosen[-1][0] + 1)
    layout = recipe_layout(recipe, 1)
    batches = training_batches(study.dataset, study.plan, layout, 0, steps, workers=workers, device=study.device)
    places = ((step, number) for step in range(*steps) for number in range(recipe.groups_per_step))
    wanted = set(chosen)
    fresh = (batch for place, batch in zip(places, batches, strict=True) if place in wanted)
    units = fresh if study.has_groups else (image for batch in fresh for image in single_images(batch))
    return islice(units, num_units)


def single_images(batch: Batch) -> Iterator[Batch]:
    """Every image of a batch as a batch of its own on the same canvas."""
    for i in range(len(batch.sizes)):
        yield batch[i : i + 1]


def add_gradient(study: Study, unit: Batch, num_images: int) -> None:
    """Add the gradient of the unit's share of a mini-batch of `num_images` to the parameters' gradients (Eq. 1)."""
    try:
        with arithmetic(study.recipe.precision, study.device):
            losses = study.model(unit)
        loss = torch.stack([losses[name].sum() for name in study.model.loss_names]).sum() / num_images
        backward(loss, study.recipe.precision)
    except torch.OutOfMemoryError:
        raise InputError(
            f"a unit of {study.unit_images} images does not fit {study.device}: set --recompute block, or smaller "
            "--data.short_edges"
        ) from None


class Sketch:
    """Random projections of the gradients of each module to COLUMNS numbers.

    Entries go to random columns with random signs. So inner products of sketches have those of the gradients as their
    mean, with a relative error of sqrt(2 / COLUMNS) (one sigma) for any gradient (Charikar et al., "Finding frequent
    items in data streams", 2002). Each run of COLUMNS entries is permuted at random over the columns: two entries then
    share a column with a chance of 1 / COLUMNS, as the error needs, or of 0. A sketch is a gather and a sum, with the
    same bits on every call. A module with at most as many parameters as columns keeps its inner products exactly.

    Args:
        trained: the parameters of each module.
        columns: a power of two.
    """

    def __init__(self, trained: dict[str, list[nn.Parameter]], columns: int = COLUMNS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.signs: dict[str, Tensor] = {}
        self.columns: dict[str, int] = {}
        self.places: dict[str, tuple[Tensor, Tensor]] = {}
        for name, parameters in trained.items():
            number, device = sum(parameter.numel() for parameter in parameters), parameters[0].device
            bits = torch.randint(0, 2, (number,), generator=generator, dtype=torch.int8)
            self.signs[name] = (2 * bits - 1).to(device)
            own = min(columns, 1 << (number - 1).bit_length())
            self.columns[name] = own
            factors, shifts = torch.randint(0, own, (2, -(-number // own), 1), generator=generator)
            self.places[name] = ((factors | 1).to(device), shifts.to(device))  # odd: a permutation of a power of two

    def of(self, name: str, tensors: Sequence[Tensor]) -> Float[Tensor, " columns"]:
        """The sketch of one tensor a parameter of a module, on the CPU in float64."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).mul_(self.signs[name])
        (factors, shifts), number = self.places[name], self.columns[name]
        rows = nn.functional.pad(flat, (0, len(factors) * number - len(flat))).reshape(-1, number)
        columns = torch.arange(number, device=flat.device)
        total = torch.zeros(number, dtype=torch.float64, device=flat.device)
        step = max(1, _CHUNK // number)
        for first in range(0, len(rows), step):
            own = slice(first, first + step)
            places = (factors[own] * columns + shifts[own]) & (number - 1)
            total += rows[own].gather(1, places).sum(0, dtype=torch.float64)
        return total.cpu()


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradient of every parameter, zeros where it has none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
