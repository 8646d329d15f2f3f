"""Verbs about training: demo, train, import."""

from pathlib import Path

import torch

from megdet.api.runs import trained_run
from megdet.cli.machine import join_world, run_options, say
from megdet.cli.options import CONSOLE, Arguments
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.evaluation.tables import tables
from megdet.inference.trained import read_recipe
from megdet.recipe_file import load_recipe, recipe_name
from megdet.run_folder.folder import RunFolder
from megdet.runtime import measure_speeds, slow_at
from megdet.training.initial_weights import import_detectron2, import_torchvision


def run_demo(arguments: Arguments) -> None:
    """Draw the data, train, evaluate, detect; print where the results are."""
    world = join_world(arguments)
    precision, why = world.on_first(lambda: _precision_of_demo(arguments, world))
    arguments.overrides["precision"] = precision
    if why:
        say(world, why)
    _train(arguments, "demo", arguments.run)


def _precision_of_demo(arguments: Arguments, world: World) -> tuple[str, str]:
    """The precision asked for, else that of the begun run, else the faster one here; and a sentence on the choice."""
    if "precision" in arguments.overrides:
        return arguments.overrides["precision"], ""
    folder = RunFolder(arguments.run)
    if folder.read_recipe() is not None:
        return read_recipe(folder).precision, ""
    speeds = measure_speeds(world.device)
    return speeds.faster, f"Training in {speeds.faster}: convolutions and matrix products reach {speeds} here."


def run_train(arguments: Arguments) -> None:
    """Train or resume; evaluate; draw pictures; write the report."""
    _train(arguments, arguments.recipe, arguments.run or Path("runs") / recipe_name(arguments.recipe))


def _train(arguments: Arguments, name: str, path: Path) -> None:
    recipe = load_recipe(name, arguments.overrides)
    world = join_world(arguments)
    if world.is_first and (figures := slow_at(recipe.precision, world.device)):
        say(world, f"Warning: this machine is slow at bfloat16, which was asked for and is kept: {figures}.")
    run = trained_run(recipe, RunFolder(path), run_options(arguments), world)
    if not world.is_first:
        return
    for table in tables(run.evaluation):
        CONSOLE.print(table)
    CONSOLE.print(f"run folder   {run.folder}")
    CONSOLE.print(f"score table  {RunFolder(run.folder).evaluation}")
    for picture in run.pictures:
        CONSOLE.print(f"picture      {picture}")
    CONSOLE.print(f"report       {run.report}")
    files = {"run": str(run.folder), "report": str(run.report), "pictures": [str(picture) for picture in run.pictures]}
    arguments.print_json({**files, "evaluation": run.evaluation.as_dict()})


def run_import(arguments: Arguments) -> None:
    """Make a run folder from torchvision's or detectron2's weights."""
    base = load_recipe("megdet-r50", {"bn_size": "0", **arguments.overrides})
    folder = RunFolder(arguments.run)
    if folder.read_recipe() is not None:
        raise InputError(f"{folder.path} holds a run already; choose another --run folder")
    cpu = torch.device("cpu")
    if arguments.source == "torchvision":
        classes = import_torchvision(arguments.weights, folder, base, arguments.norm_eps, cpu)
    else:
        classes = import_detectron2(arguments.weights, folder, base, cpu)
    CONSOLE.print(f"{folder.path}: {classes} classes; try `megdet detect {folder.path} IMAGE`")
    arguments.print_json({"run": str(folder.path), "classes": classes})
