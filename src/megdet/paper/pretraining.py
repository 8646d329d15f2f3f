"""A backbone with weights and statistics for the sweep of scale demo, if no ImageNet weights are given.

A short run on other pictures than those of the rows replaces the paper's ImageNet pretraining; the rows start from its
backbone. Without it, rows of BN size 0 would freeze the statistics of random weights.
"""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from megdet.data.coco import training_set
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.files import cannot_write, replace_file
from megdet.model.choice import mask_use
from megdet.paper.rows import PRETRAINING
from megdet.recipe import Recipe
from megdet.recipe_file import first_difference, load_recipe, parse_recipe
from megdet.run_folder.checkpoint_files import latest_checkpoint, open_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.training.datasets import fingerprint
from megdet.training.loop import train
from megdet.training.run import RunOptions

_PLACES = {"backbone.body.": "", "backbone.last.0.": "conv_head.", "backbone.last.1.": "bn2."}
"""The prefixes of MobileNetV2's layers in the detector, and in timm."""


def pretrained_backbone(folder: Path, data: Path | None, options: RunOptions, world: World) -> Path:
    """The file of the backbone in a sweep's folder; it is trained first if it is missing. Every rank calls it.

    Its pictures are beside those of the rows, in a folder of the same name plus `-hard`. Raises InputError if an
    existing backbone comes from another recipe or from other pictures.
    """
    recipe = pretraining_recipe(data)
    run = RunFolder(folder / "pretraining")
    file = run.path / "backbone.safetensors"
    if world.on_first(file.exists):
        world.on_first(lambda: _check_origin(run, recipe))
    else:
        train(recipe, run, options, world)
        world.on_first(lambda: export_backbone(run, file))
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
    """Write the backbone of a run's newest checkpoint with timm's names, for `model.backbone.weights`.

    Raises InputError if the run has no checkpoint, or the file cannot be written.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise InputError(f"{run.path}: no checkpoint is there; delete the folder and run the command again")
    tensors: dict[str, Tensor] = {}
    for name, tensor in open_checkpoint(checkpoint).tensors("model").items():
        for place, called in _PLACES.items():
            if name.startswith(place):
                tensors[called + name.removeprefix(place)] = tensor.contiguous()
    try:
        replace_file(file, save(tensors))
    except OSError as error:
        raise cannot_write(file, error) from error


def _check_origin(run: RunFolder, recipe: Recipe) -> None:
    """Refuse a backbone of another recipe or of other pictures; missing pictures are not compared."""
    mend = f"delete {run.path} and the rows that started from it, or choose another --run folder"
    text = run.read_recipe()
    if text is None:
        raise InputError(f"{run.path} holds a backbone without its recipe: {mend}")
    difference = first_difference(recipe, parse_recipe(text, str(run.recipe)))
    if difference:
        raise InputError(f"{run.path} holds the backbone of another recipe ({difference}): {mend}")
    annotations, checkpoint = Path(recipe.data.train_annotations), latest_checkpoint(run)
    if checkpoint is None or not annotations.exists():
        return
    pictures = training_set(recipe.data, masks=mask_use(recipe.model))
    if open_checkpoint(checkpoint).state.data not in ("", fingerprint(pictures)):
        raise InputError(f"{run.path} holds a backbone of other pictures or boxes than those of {annotations}: {mend}")
