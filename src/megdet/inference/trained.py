"""A trained detector out of a run folder."""

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
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_state import RunState
from megdet.run_folder.tensor_check import check_finite, check_tensors
from megdet.runtime import slow_at


@dataclass
class TrainedDetector:
    """A detector in evaluation mode and what its labels mean."""

    model: Detector
    recipe: Recipe
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    step: int
    device: torch.device


def read_recipe(folder: RunFolder, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe of a run with some keys changed. Raises InputError when the folder is no run."""
    text = folder.read_recipe()
    if text is None:
        raise InputError(f"{folder.path}: not a run folder, it has no recipe.yaml")
    return parse_recipe(text, str(folder.recipe), overrides)


def precision_here(folder: RunFolder, overrides: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], str]:
    """The overrides, plus float32 if the run is in bfloat16 and this machine is slow at it; and a sentence about that.

    A precision in the overrides stays. Raises InputError when the folder is no run.
    """
    figures = "" if "precision" in overrides else slow_at(read_recipe(folder, overrides).precision, device)
    if not figures:
        return overrides, ""
    sentence = f"In float32, since bfloat16, the run's, is slow here ({figures}); the results differ a little."
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
    """The detector of a run's newest checkpoint, or that of a step; its averaged weights where the run keeps them.

    `overrides` change the recipe, which may change how it detects but not its architecture; `lane` matters where
    its batch norms will see groups again. Where a `world` is given all its ranks call it, and rank 0 alone reads the
    folder. Raises InputError when the folder is no run, has no checkpoint, or the checkpoint holds another architecture
    or weights that are not finite.
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
    place_model(model, device, recipe.precision)  # first, so that weights in float64 stay so
    world.on_first(lambda: load_weights(model, weights, source))
    world.broadcast(model.state_dict().values())
    model.eval()
    return TrainedDetector(model, recipe, state.class_names, state.category_ids, state.step, device)


def place_model(model: Detector, device: torch.device, precision: Precision) -> None:
    """Move a detector to its device in the number format of its recipe's precision, channels last, with fast layers."""
    model.to(device=device, dtype=dtype_of(precision))
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    speed_up_convolutions(model)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load a detector's tensors, all of them or none.

    Raises InputError naming the first that does not fit or is not finite.
    """
    check_weights(weights, model.state_dict(), source)
    check_finite(weights, source)
    model.load_state_dict(weights)


def check_weights(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], source: str) -> None:
    """Refuse tensors that are not those of a detector by name, shape and kind. Raises InputError."""
    try:
        check_tensors(weights, wanted, source, converts=True)
    except InputError as error:
        raise InputError(f"{error}: these are weights of another architecture than the recipe's") from None
