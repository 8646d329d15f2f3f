"""Verbs about training: demo, train, describe, recipes, import."""

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megdet.analysis.run_pictures import draw_run
from megdet.cli.options import (
    CONSOLE,
    Arguments,
    add_layout_options,
    add_machine_options,
    add_recipe_keys,
    join_world,
    num_workers,
    say,
    whole_number,
)
from megdet.distributed.world import has_native_bfloat16
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import numbers_table, per_class_table
from megdet.inference.trained import load_detector
from megdet.journal.run_folder import RunFolder
from megdet.planning.describe import describe
from megdet.recipe_file import load_recipe, packaged_recipes, recipe_name
from megdet.training.loop import RunOptions, train
from megdet.training.start import import_torchvision


def add_verbs(verbs: Any) -> None:
    """Add the parsers of these verbs."""
    demo = verbs.add_parser("demo", help="draw the demo data, train on it, evaluate and draw what is found")
    demo.add_argument("--run", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="default runs/demo")
    add_machine_options(demo, trains=True)
    demo.set_defaults(run_verb=run_demo, takes_overrides=True)

    training = verbs.add_parser("train", help="train a detector, or go on with a run", allow_abbrev=False)
    training.add_argument("recipe", metavar="RECIPE", help="name of a packaged recipe or path of a YAML file")
    training.add_argument("--run", type=Path, metavar="FOLDER", help="run folder, default runs/NAME")
    add_layout_options(training)
    add_machine_options(training, trains=True)
    add_recipe_keys(training)
    training.set_defaults(run_verb=run_train)

    description = verbs.add_parser("describe", help="the arithmetic of a recipe on some devices", allow_abbrev=False)
    description.add_argument("recipe", metavar="RECIPE", help="name of a packaged recipe or path of a YAML file")
    description.add_argument("--devices", type=whole_number, default=1, metavar="N", help="default 1")
    description.add_argument("--json", action="store_true", help="print JSON")
    add_layout_options(description)
    add_recipe_keys(description)
    description.set_defaults(run_verb=run_describe)

    recipes = verbs.add_parser("recipes", help="list the packaged recipes, or print one", allow_abbrev=False)
    recipes.add_argument("name", nargs="?", metavar="NAME", help="print this one")
    recipes.set_defaults(run_verb=run_recipes, takes_overrides=False)

    importing = verbs.add_parser("import", help="make a run folder of weights trained elsewhere", allow_abbrev=False)
    importing.add_argument("source", choices=["torchvision"], help="fasterrcnn_resnet50_fpn of torchvision")
    importing.add_argument("weights", type=Path, metavar="WEIGHTS", help="its state dict (.pth or .safetensors)")
    importing.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="run folder to make")
    importing.add_argument(
        "--norm-eps",
        type=float,
        default=1e-5,
        metavar="EPS",
        help="0 for torchvision's COCO_V1 files and what was fine-tuned from them (default 1e-5)",
    )
    add_recipe_keys(importing)
    importing.set_defaults(run_verb=run_import)


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
    pictures = draw_run(load_detector(folder, world.device), folder)
    CONSOLE.print(f"run folder   {folder.path}")
    CONSOLE.print(f"score table  {folder.evaluation}")
    for picture in pictures:
        CONSOLE.print(f"picture      {picture}")


def run_describe(arguments: Arguments) -> None:
    """Print the arithmetic of a recipe."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    rows = describe(recipe, arguments.devices, arguments.lane_width, arguments.max_images_per_device)
    if arguments.json:
        CONSOLE.print_json(data={row.key: row.value for row in rows})
        return
    table = Table("", "", title=f"{arguments.recipe} on {arguments.devices} device(s)", show_header=False)
    for row in rows:
        table.add_row(row.name, row.text)
    CONSOLE.print(table)


def run_recipes(arguments: Arguments) -> None:
    """List the packaged recipes with the first line of their header, or print one."""
    recipes = packaged_recipes()
    if arguments.name is not None:
        if arguments.name not in recipes:
            load_recipe(arguments.name)  # says which there are
        CONSOLE.print(recipes[arguments.name], end="")
        return
    table = Table("recipe", "what it is")
    for name, text in recipes.items():
        table.add_row(name, text.splitlines()[0].removeprefix("# "))
    CONSOLE.print(table)


def run_import(arguments: Arguments) -> None:
    """Make a run folder of torchvision's weights."""
    base = load_recipe("megdet-r50", {"bn_size": "0", **arguments.overrides})
    folder = RunFolder(arguments.run)
    if folder.read_recipe() is not None:
        raise InputError(f"{folder.path}: it holds a run already; choose another --run folder")
    classes = import_torchvision(arguments.weights, folder, base, arguments.norm_eps, torch.device("cpu"))
    CONSOLE.print(f"{folder.path}: {classes} classes; try `megdet detect {folder.path} IMAGE`")
