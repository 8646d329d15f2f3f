"""Verbs about training: demo, train, import."""

from pathlib import Path

import torch

from megdet.cli.machine import join_world, num_workers, say
from megdet.cli.options import CONSOLE, Arguments
from megdet.distributed.world import has_native_bfloat16
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import numbers_table, per_class_table
from megdet.inference.trained import load_detector
from megdet.journal.run_folder import RunFolder
from megdet.recipe_file import load_recipe, recipe_name
from megdet.training.loop import RunOptions, train
from megdet.training.start import import_torchvision


def run_demo(arguments: Arguments) -> None:
    """Draw the data, train, evaluate, detect; say where everything is."""
    world = join_world(arguments)
    native = has_native_bfloat16(world.device)
    arguments.overrides.setdefault("precision", "bfloat16" if native else "float32")
    if not native:
        say(world, "This processor has no bfloat16 arithmetic of its own: training in float32, which takes longer.")
    _train(arguments, "demo", arguments.run)


def run_train(arguments: Arguments) -> None:
    """Train or go on; evaluate; draw pictures."""
    _train(arguments, arguments.recipe, arguments.run or Path("runs") / recipe_name(arguments.recipe))


def _train(arguments: Arguments, name: str, path: Path) -> None:
    recipe = load_recipe(name, arguments.overrides)
    world = join_world(arguments)
    options = arguments.options
    run_options = RunOptions(
        num_workers(arguments),
        getattr(options, "lane_width", None),
        getattr(options, "max_images_per_device", None),
        evaluate_in_background=arguments.evaluate_in_background,
        evaluate_on=arguments.evaluate_on,
        compile=arguments.compile,
    )
    if path == Path():
        raise InputError("--run is empty: name a folder")
    folder = RunFolder(path)
    numbers = train(recipe, folder, run_options, world)
    if not world.is_first:
        return
    CONSOLE.print(numbers_table(numbers))
    CONSOLE.print(per_class_table(numbers))
    from megdet.analysis.run_pictures import draw_run  # here, because matplotlib is for the one rank that draws

    pictures = draw_run(load_detector(folder, world.device), folder)
    CONSOLE.print(f"run folder   {folder.path}")
    CONSOLE.print(f"score table  {folder.evaluation}")
    for picture in pictures:
        CONSOLE.print(f"picture      {picture}")


def run_import(arguments: Arguments) -> None:
    """Make a run folder of torchvision's weights."""
    base = load_recipe("megdet-r50", {"bn_size": "0", **arguments.overrides})
    folder = RunFolder(arguments.run)
    if folder.read_recipe() is not None:
        raise InputError(f"{folder.path}: it holds a run already; choose another --run folder")
    classes = import_torchvision(arguments.weights, folder, base, arguments.norm_eps, torch.device("cpu"))
    CONSOLE.print(f"{folder.path}: {classes} classes; try `megdet detect {folder.path} IMAGE`")
