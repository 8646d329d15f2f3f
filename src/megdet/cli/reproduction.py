"""The verb that repeats the paper: reproduce."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from megdet.analysis.paper.report import Report
from megdet.analysis.paper.reproduce import Order, reproduce
from megdet.analysis.paper.rows import ITEMS, SCALES
from megdet.cli.options import (
    CONSOLE,
    PROGRESS,
    Arguments,
    add_layout_options,
    add_machine_options,
    join_world,
    num_workers,
)
from megdet.errors import InputError
from megdet.training.loop import RunOptions


def add_verbs(verbs: Any) -> None:
    """Add the parser of `reproduce`."""
    verb = verbs.add_parser(
        "reproduce", help="train the rows of a table or figure of the paper and compare", allow_abbrev=False
    )
    verb.add_argument("item", choices=ITEMS, metavar="ITEM", help=", ".join(ITEMS))
    verb.add_argument(
        "--scale",
        choices=SCALES,
        default=SCALES[0],
        metavar="SCALE",
        help="demo: drawn shapes; bccd: blood cells; coco: the paper's own recipes; default demo",
    )
    verb.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the scale's images, default data/SCALE")
    verb.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="ImageNet weights: MobileNetV2 (bccd; demo trains its own where there are none), ResNet-50 (coco)",
    )
    verb.add_argument("--rows", metavar="NAME,NAME", help="train only these rows, such as b16-bn0,b256-bn16-long")
    verb.add_argument(
        "--run", type=Path, metavar="FOLDER", help="folder of all rows and files, default runs/reproduce/SCALE"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    add_layout_options(verb)
    add_machine_options(verb, trains=True)
    verb.set_defaults(run_verb=run_reproduce, takes_overrides=False)


def run_reproduce(arguments: Arguments) -> None:
    """Train the rows that are missing; print the table and where the files are."""
    folder = arguments.run or Path("runs") / "reproduce" / arguments.scale
    if folder == Path():
        raise InputError("--run is empty: name a folder")
    order = Order(arguments.item, arguments.scale, folder, arguments.data, arguments.weights, arguments.rows)
    world = join_world(arguments)
    options = RunOptions(
        num_workers(arguments),
        arguments.lane_width,
        arguments.max_images_per_device,
        evaluate_in_background=arguments.evaluate_in_background,
        evaluate_on=arguments.evaluate_on,
        compile=arguments.compile,
    )
    report = reproduce(order, options, world, say=PROGRESS.print)
    if report is None:
        return
    if arguments.json:
        print(json.dumps(report.as_dict(), allow_nan=False))
        return
    CONSOLE.print(_table(report))
    for note in report.notes:
        CONSOLE.print(note)
    for picture in report.pictures:
        CONSOLE.print(f"picture  {picture}")
    CONSOLE.print(f"table    {folder / f'{report.item}.md'}\nnumbers  {folder / f'{report.item}.json'}")


def _table(report: Report) -> Table:
    table = Table(*report.columns, title=report.title)
    for row in report.rows:
        table.add_row(*row)
    return table
