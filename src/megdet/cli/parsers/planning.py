"""The options of describe, recipes, plan and simulate."""

import argparse
from pathlib import Path
from typing import get_args

from megdet.cli.parsers.shared import (
    Parser,
    add_advice_options,
    add_json,
    add_layout_options,
    add_recipe,
    take_recipe_keys,
)
from megdet.cli.parsers.values import at_least_one, number, positive, whole_number, whole_numbers
from megdet.recipe import RecomputePlan

_RECOMPUTE_PLANS = get_args(RecomputePlan)


def add_describe(parser: Parser) -> None:
    """The options of `describe`."""
    add_recipe(parser)
    parser.add_argument("--devices", type=whole_number, default=1, metavar="N", help="default 1")
    parser.add_argument("--parameters", action="store_true", help="build the detector and count its parameters too")
    add_json(parser)
    add_layout_options(parser)
    take_recipe_keys(parser)
    parser.set_defaults(run_verb="describing:run_describe")


def add_recipes(parser: Parser) -> None:
    """The options of `recipes` and of `recipes new`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe; `new` writes one for your images")
    parser.add_argument("new_name", nargs="?", metavar="NEW", help="after `new`: name or path of the file to write")
    add_json(parser)
    group = parser.add_argument_group("new: a recipe from the statistics of a data set (docs/data.md)")
    for name, text in (
        ("--data", "COCO instances file and image folder to train on"),
        ("--val", "those to evaluate on; without, the training images are evaluated"),
    ):
        group.add_argument(name, nargs=2, metavar=("ANNOTATIONS", "IMAGES"), help=text)
    add_advice_options(group)
    parser.set_defaults(run_verb="describing:run_recipes", takes_overrides=False)


def add_plan(parser: Parser) -> None:
    """The options of `plan`."""
    add_recipe(parser)
    parser.add_argument("--devices", type=whole_number, default=1, metavar="N", help="default 1")
    parser.add_argument("--memory", type=positive, metavar="GIB", help="memory of a device; a layout must fit into it")
    parser.add_argument(
        "--hours", type=positive, metavar="H", help="find the fewest devices that end the run within H hours"
    )
    parser.add_argument(
        "--price", type=positive, metavar="P", help="money for an hour of one device, in any currency: tell the cost"
    )
    add_json(parser)
    add_layout_options(parser)
    group = parser.add_argument_group("measuring")
    group.add_argument("--sizes", type=_sizes, default=(), metavar="M,M", help="images of the micro-batches to measure")
    group.add_argument(
        "--timed-steps",
        type=at_least_one,
        metavar="N",
        help="timed steps of each kind, in 20 seconds at most; default 5",
    )
    group.add_argument(
        "--plans",
        type=_plans,
        default=(),
        metavar="P,P",
        help=f"recompute plans to measure, default {','.join(_RECOMPUTE_PLANS)}",
    )
    group.add_argument("--device", default="", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    group.add_argument(
        "--side-by-side",
        type=at_least_one,
        default=1,
        metavar="R",
        help="measure R processes at a time, as torchrun starts them on this machine; default 1",
    )
    group.add_argument("--workers", type=whole_number, metavar="N", help="processes a rank that load images in the run")
    given = parser.add_argument_group("given instead of measured")
    given.add_argument("--measured", type=Path, metavar="FILE", help="output of an earlier --json")
    given.add_argument("--seconds-per-image", type=positive, metavar="S", help="seconds of a training step, per image")
    given.add_argument("--gib-per-image", type=positive, metavar="GIB", help="memory of an image of a micro-batch")
    given.add_argument("--fixed-gib", type=positive, metavar="GIB", help="memory of everything else")
    given.add_argument("--bandwidth", type=positive, metavar="GB/S", help="gigabytes a second that a device sends")
    given.add_argument("--latency", type=positive, metavar="US", help="microseconds from device to device")
    noise = parser.add_argument_group("which batch sizes pay").add_mutually_exclusive_group()
    noise.add_argument("--noise-scale", type=positive, metavar="IMAGES", help="gradient noise scale, in images")
    noise.add_argument("--noise-from", type=Path, metavar="RUN", help="run folder whose training measured it")
    take_recipe_keys(parser)
    parser.set_defaults(run_verb="planning:run_plan")


def add_simulate(parser: Parser) -> None:
    """The options of `simulate`."""
    from megdet.planning.published import MACHINES

    parser.add_argument(
        "--paper", action="store_true", help="compare the rows of the paper's Tables 2 and 3 with predictions"
    )
    parser.add_argument("--published", action="store_true", help="compare published speeds with predictions")
    parser.add_argument("--device", metavar="NAME", help=f"{', '.join(MACHINES)}; default h200")
    parser.add_argument("--images-per-device", type=whole_number, metavar="M", help="images of a step, default 8")
    parser.add_argument("--bn-size", type=whole_number, metavar="S", help="default 32; 0 = frozen statistics")
    parser.add_argument(
        "--batch-size", type=whole_number, metavar="B", help="keep this mini-batch on every number of devices"
    )
    parser.add_argument("--noise-scale", type=number, metavar="N", help="gradient noise scale in images")
    parser.add_argument(
        "--fraction",
        type=number,
        metavar="F",
        help="part of the published peak speed that is reached, 0 to 1; default: a slow and a fast program's",
    )
    parser.add_argument(
        "--overhead", type=number, metavar="MS", help="fixed milliseconds of every micro-batch; default likewise"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it, as .png, .pdf or .svg")
    add_json(parser, "`rows` of --paper, `published`, or `scaling` at each speed")
    parser.set_defaults(run_verb="simulation:run_simulate", takes_overrides=False)


def _sizes(text: str) -> tuple[int, ...]:
    """Two or more different numbers of images between commas."""
    sizes = whole_numbers(text)
    if 0 in sizes or len(set(sizes)) < 2:
        raise argparse.ArgumentTypeError(f"'{text}': name at least two numbers of images above 0, such as 1,4")
    return sizes


def _plans(text: str) -> tuple[str, ...]:
    """Recompute plans between commas."""
    plans = tuple(text.split(","))
    unknown = [plan for plan in plans if plan not in _RECOMPUTE_PLANS]
    if unknown:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}': choose from {', '.join(_RECOMPUTE_PLANS)}")
    return plans
