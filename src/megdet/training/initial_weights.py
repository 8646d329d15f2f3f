"""Starting from existing weights: another run's, torchvision's or detectron2's."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from megdet.errors import InputError
from megdet.inference.trained import load_detector, load_weights, read_recipe
from megdet.model.backbone import pretrained_tensors
from megdet.model.choice import make_detector
from megdet.model.detector import Detector, value_of
from megdet.model.detectron2_weights import (
    convert_detectron2_weights,
    detectron2_layout,
    detectron2_recipe,
    num_detectron2_classes,
)
from megdet.model.torchvision_weights import (
    convert_torchvision_weights,
    layout_of,
    num_torchvision_classes,
)
from megdet.model.weight_file import read_tensors
from megdet.recipe import Recipe
from megdet.recipe_check import check_recipe
from megdet.recipe_file import dump_recipe
from megdet.run_folder.checkpoint_files import latest_checkpoint, save_checkpoint
from megdet.run_folder.environment import collect_environment
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_path import run_of
from megdet.run_folder.run_state import RunState
from megdet.run_folder.sessions import write_environment


def check_sources(recipe: Recipe) -> None:
    """Raise InputError if a file or run that the weights start from is missing or does not fit.

    To be called before the data are drawn or read, which may take minutes.
    """
    if recipe.model.backbone.weights:
        pretrained_tensors(recipe.model.backbone.name, Path(recipe.model.backbone.weights))
    if recipe.start_from:
        source, step = run_of(recipe.start_from)
        read_recipe(source)
        if step is None and latest_checkpoint(source) is None:
            raise InputError(f"start_from {source.path}: the run has no checkpoint yet")


def start_from_run(model: Detector, class_names: tuple[str, ...], source: str) -> None:
    """Copy the weights of another run's checkpoint; the class layers only if the classes are the same.

    Frozen and trained batch norms are interchangeable: they differ only by a counter of steps.

    Raises InputError if the folder is not a run, has another architecture, or differs in a key that changes the meaning
    of the weights.
    """
    folder, step = run_of(source)
    trained = load_detector(folder, torch.device("cpu"), step=step)
    for key in ("kind", *model.same_meaning):
        ours, theirs = (value_of(own.architecture, key) for own in (model, trained.model))
        if ours != theirs:
            raise InputError(
                f"start_from {source}: its weights were trained with model.{key} {theirs}, "
                f"this recipe has {ours}: set it to the same"
            )
    own = model.state_dict()
    counters = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}
    weights = {name: t for name, t in trained.model.state_dict().items() if not name.endswith("num_batches_tracked")}
    weights |= counters
    if trained.class_names != class_names:
        class_layers = tuple(f"{layer}." for layer in model.class_layers)
        weights |= {name: own[name] for name in own if name.startswith(class_layers)}
    load_weights(model, weights, f"start_from {source}")


def import_torchvision(file: Path, folder: RunFolder, base: Recipe, norm_eps: float, device: torch.device) -> int:
    """Make a run folder with the weights of one of torchvision's detectors; returns its number of classes.

    `base` gives everything but the architecture. A file of 91 classes gets COCO's names and ids, any other the ids 1,
    2, ... Raises InputError if the file is of another model.
    """
    tensors = read_tensors(file, "import torchvision")
    try:
        recipe, num_classes = layout_of(tensors).recipe(base, norm_eps), num_torchvision_classes(tensors)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    names = _coco_names() if num_classes == len(_coco_names()) else _numbered(num_classes)
    names = {number: f"unused {number}" if name == "N/A" else name for number, name in names.items()}
    return _make_run(file, folder, recipe, names, tensors, convert_torchvision_weights, device)


def import_detectron2(file: Path, folder: RunFolder, base: Recipe, device: torch.device) -> int:
    """Make a run folder with the weights of one of detectron2's detectors; returns its number of classes.

    `base` gives everything but the architecture. A file of 80 classes gets COCO's names and ids, another gets the ids
    1, 2, ... Raises InputError when the file is of another model.
    """
    tensors = read_tensors(file, "import detectron2")
    try:
        recipe = detectron2_recipe(base, detectron2_layout(tensors))
        num_classes = num_detectron2_classes(tensors)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    names = {number: name for number, name in _coco_names().items() if name != "N/A"}
    names = names if num_classes == len(names) else _numbered(num_classes)
    return _make_run(file, folder, recipe, names, tensors, convert_detectron2_weights, device)


def _coco_names() -> dict[int, str]:
    """COCO's classes by id, N/A where an id has none."""
    return dict(enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:], start=1))


def _numbered(count: int) -> dict[int, str]:
    return {number: f"class {number}" for number in range(1, count + 1)}


def _make_run(
    file: Path,
    folder: RunFolder,
    recipe: Recipe,
    names: dict[int, str],
    tensors: dict[str, Tensor],
    convert: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]],
    device: torch.device,
) -> int:
    """Write a run folder with a recipe, classes by id, and the weights that `convert` makes from a file's tensors."""
    check_recipe(recipe, "import")
    try:
        with torch.device("meta"):  # shapes without memory: every tensor is checked before anything is built
            wanted = make_detector(recipe, len(names)).state_dict()
        converted = convert(tensors, wanted)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    model = make_detector(recipe, len(names))
    load_weights(model, converted, str(file))
    folder.create()
    folder.write_recipe(dump_recipe(recipe))
    write_environment(folder, collect_environment(1, str(device)))
    state = RunState(step=0, class_names=tuple(names.values()), category_ids=tuple(names), num_images=0)
    save_checkpoint(folder, state, {"model": model.state_dict(), "optimizer": {}}, keep=1)
    return len(names)
