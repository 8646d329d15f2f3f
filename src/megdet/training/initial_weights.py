"""Starting from existing weights: another run's, or torchvision's."""

from pathlib import Path

import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from megdet.errors import InputError
from megdet.inference.trained import load_detector, load_weights
from megdet.model.choice import make_detector
from megdet.model.detector import Detector, value_of
from megdet.model.torchvision_weights import (
    convert_torchvision_weights,
    layout_of,
    num_torchvision_classes,
)
from megdet.model.weight_file import read_tensors
from megdet.recipe import Recipe
from megdet.recipe_check import check_recipe
from megdet.recipe_file import dump_recipe
from megdet.run_folder.checkpoint_files import save_checkpoint
from megdet.run_folder.environment import collect_environment, write_environment
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_state import RunState


def start_from_run(model: Detector, class_names: tuple[str, ...], source: str) -> None:
    """Copy the weights of another run's newest checkpoint; the class layers only where the classes are the same.

    Frozen and trained batch norms are interchangeable: they differ by a counter of steps only.

    Raises InputError if the folder is no run, its architecture is another, or a key differs that changes the meaning of
    the weights.
    """
    trained = load_detector(RunFolder(Path(source)), torch.device("cpu"))
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
        check_recipe(recipe, "import torchvision")
        with torch.device("meta"):  # shapes without memory: every tensor is checked before anything is built
            wanted = make_detector(recipe, num_classes).state_dict()
        converted = convert_torchvision_weights(tensors, wanted)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    model = make_detector(recipe, num_classes)
    load_weights(model, converted, str(file))
    category_ids = list(range(1, num_classes + 1))
    coco = list(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])[1:]
    names = coco if len(coco) == num_classes else [f"class {number}" for number in category_ids]
    names = [f"unused {number}" if name == "N/A" else name for name, number in zip(names, category_ids, strict=True)]
    folder.create()
    folder.write_recipe(dump_recipe(recipe))
    write_environment(folder, collect_environment(1, str(device)))
    state = RunState(step=0, class_names=tuple(names), category_ids=tuple(category_ids), num_images=0)
    save_checkpoint(folder, state, {"model": model.state_dict(), "optimizer": {}}, keep=1)
    return num_classes
