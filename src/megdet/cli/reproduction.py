"""The verb that repeats the paper: reproduce."""

import json
from pathlib import Path

from rich.table import Table

from megdet.cli.machine import join_world, run_options
from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.errors import InputError
from megdet.paper.report import Report
from megdet.paper.reproduce import Order, reproduce


def run_reproduce(arguments: Arguments) -> None:
    """Train the rows that are missing; print the table and where the files are."""
    folder = arguments.run or Path("runs") / "reproduce" / arguments.scale
    if folder == Path():
        raise InputError("--run is empty: name a folder")
    order = Order(arguments.item, arguments.scale, folder, arguments.data, arguments.weights, arguments.rows)
    world = join_world(arguments)
    report = reproduce(order, run_options(arguments), world, say=PROGRESS.print)
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
