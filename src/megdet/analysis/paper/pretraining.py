"""A backbone with weights and statistics for the sweep of scale demo, where no ImageNet weights are given.

It stands for the paper's ImageNet pretraining: a short run on other pictures than those of the rows, of which the rows
take over the backbone alone. Without it rows of BN size 0 would freeze the statistics of random weights.
"""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from megdet.analysis.paper.rows import PRETRAINING
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.files import cannot_write, replace_file
from megdet.journal.checkpoint_files import latest_checkpoint, load_checkpoint
from megdet.journal.run_folder import RunFolder
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.training.loop import RunOptions, train

_PLACES = {"backbone.body.": "", "backbone.last.0.": "conv_head.", "backbone.last.1.": "bn2."}
"""Where the detector keeps the layers of MobileNetV2, and what timm calls them."""


def pretrained_backbone(folder: Path, data: Path | None, options: RunOptions, world: World) -> Path:
    """The file of the backbone in a sweep's folder, trained first where it is missing. Every rank calls it.

    The pictures lie beside those of the rows, in a folder of the same name with `-hard` after it.
    """
    run = RunFolder(folder / "pretraining")
    file = run.path / "backbone.safetensors"
    if world.gather_objects(file.exists())[0]:
        return file
    train(pretraining_recipe(data), run, options, world)
    error = None
    if world.is_first:
        try:
            export_backbone(run, file)
        except InputError as problem:
            error = str(problem)
    world.agree(error)
    return file


def pretraining_recipe(data: Path | None) -> Recipe:
    """The recipe of the pretraining, with its pictures beside the data folder of the rows."""
    recipe = load_recipe(PRETRAINING)
    if data is None:
        return recipe
    root = data.with_name(f"{data.name}-hard")
    return replace(
        recipe,
        data=replace(
            recipe.data,
            train_annotations=str(root / "annotations" / "train.json"),
            train_images=str(root / "train"),
            val_annotations=str(root / "annotations" / "val.json"),
            val_images=str(root / "val"),
        ),
    )


def export_backbone(run: RunFolder, file: Path) -> None:
    """Write the backbone of a run's newest checkpoint under timm's names, for `backbone.weights`.

    Raises InputError where the run has no checkpoint, or the file cannot be written.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise InputError(f"{run.path}: no checkpoint is there; delete the folder and run the command again")
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_checkpoint(checkpoint)[0]["model"].items():
        for place, called in _PLACES.items():
            if name.startswith(place):
                tensors[called + name.removeprefix(place)] = tensor.contiguous()
    try:
        replace_file(file, save(tensors))
    except OSError as error:
        raise cannot_write(file, error) from error
