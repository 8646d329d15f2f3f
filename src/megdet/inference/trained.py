"""Loads a trained detector from a run folder."""

from dataclasses import dataclass
from typing import Any

import torch

from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.layers.convolution import speed_up_convolutions
from megdet.model.choice import make_detector
from megdet.model.detector import Detector
from megdet.precision import dtype_of
from megdet.recipe import Precision, Recipe
from megdet.recipe_file import parse_recipe
from megdet.run_folder.checkpoint_files import Kind, checkpoint_path, latest_checkpoint, open_checkpoint
from megdet.run_folder.folder import RunFolder, not_a_run
from megdet.run_folder.run_state import RunState
from megdet.run_folder.tensor_check import check_finite, check_tensors
from megdet.runtime import slow_at


@dataclass
class TrainedDetector:
    """A detector in evaluation mode, with the names and ids of its classes."""

    model: Detector
    recipe: Recipe
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    step: int
    device: torch.device


def read_recipe(folder: RunFolder, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a run with some keys changed. Raises InputError if the folder is not a run."""
    text = folder.read_recipe()
    if text is None:
        raise not_a_run(folder)
    return parse_recipe(text, str(folder.recipe), overrides)


def precision_here(folder: RunFolder, overrides: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], str]:
    """The overrides, plus float32 if the run is in bfloat16 and this machine is slow at it; and a sentence about that.

    A precision in the overrides stays. Raises InputError if the folder is not a run.
    """
    figures = "" if "precision" in overrides else slow_at(read_recipe(folder, overrides).precision, device)
    if not figures:
        return overrides, ""
    sentence = f"In float32, since the run's bfloat16 is slow here ({figures}); the results differ a little."
    return {**overrides, "precision": "float32"}, sentence


def load_detector(
    folder: RunFolder,
    device: torch.device,
    overrides: dict[str, Any] | None = None,
    lane: Lane = SINGLE_LANE,
    *,
    step: int | None = None,
    world: World | None = None,
) -> TrainedDetector:
    """The detector of a run's newest checkpoint, or of a step's; with averaged weights if the run keeps them.

    `overrides` change recipe keys, but must not change the architecture; `lane` is needed if batch statistics will be
    computed again. With a `world` all its ranks must call this, and only rank 0 reads the folder. Raises InputError if
    the folder is not a run or has no checkpoint, or if the checkpoint has another architecture or weights that are not
    finite.
    """
    world = world or World(0, 1, device)
    weights: dict[str, torch.Tensor] = {}

    def read() -> tuple[Recipe, RunState, str]:
        recipe = read_recipe(folder, overrides)
        path = latest_checkpoint(folder) if step is None else checkpoint_path(folder, step)
        if path is None:
            raise InputError(f"{folder.path}: the run has no checkpoint yet; `megdet train` writes one an epoch")
        checkpoint = open_checkpoint(path)
        kind: Kind = "averages" if "averages" in checkpoint.hashes else "model"
        weights.update(checkpoint.tensors(kind))
        with torch.device("meta"):  # shapes without memory: the state may claim millions of classes
            wanted = make_detector(recipe, len(checkpoint.state.class_names)).state_dict()
        check_weights(weights, wanted, str(checkpoint.file(kind)))
        return recipe, checkpoint.state, str(checkpoint.file(kind))

    recipe, state, source = world.on_first(read)
    model = make_detector(recipe, len(state.class_names), lane)
    place_model(model, device, recipe.precision)  # before loading, so that float64 weights stay float64
    world.on_first(lambda: load_weights(model, weights, source))
    world.broadcast(model.state_dict().values())
    model.eval()
    return TrainedDetector(model, recipe, state.class_names, state.category_ids, state.step, device)


def place_model(model: Detector, device: torch.device, precision: Precision) -> None:
    """Move a detector to a device, in the dtype of its recipe's precision, channels last, with fast layers."""
    model.to(device=device, dtype=dtype_of(precision))
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    speed_up_convolutions(model)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load a detector's tensors, all of them or none.

    Raises InputError that names the first tensor that does not fit or is not finite.
    """
    check_weights(weights, model.state_dict(), source)
    check_finite(weights, source)
    model.load_state_dict(weights)


def check_weights(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], source: str) -> None:
    """Raise InputError unless tensors have the names, shapes and dtypes of a detector's."""
    try:
        check_tensors(weights, wanted, source, converts=True)
    except InputError as error:
        raise InputError(f"{error}: these are weights of another architecture than the recipe's") from None
