"""The verb that repeats the paper: reproduce."""

import json
from pathlib import Path

from rich.table import Table

from megdet.cli.machine import join_world, run_options
from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.errors import InputError
from megdet.paper.entry_runs import EntryOrder, reproduce_entry
from megdet.paper.report import Report
from megdet.paper.reproduce import Order, reproduce
from megdet.paper.rows import ENTRY_ITEMS


def run_reproduce(arguments: Arguments) -> None:
    """Train the rows that are missing; print the table and where the files are."""
    folder = arguments.run or Path("runs") / "reproduce" / arguments.scale
    if folder == Path():
        raise InputError("--run is empty: name a folder")
    is_entry = arguments.item in ENTRY_ITEMS
    if arguments.seeds is not None and not is_entry:
        raise InputError(f"--seeds is for {' and '.join(ENTRY_ITEMS)}: a row of the other tables has one training")
    options, world = run_options(arguments), join_world(arguments)
    if is_entry:
        report = reproduce_entry(_entry_order(arguments, folder), options, world, say=PROGRESS.print)
    else:
        order = Order(arguments.item, arguments.scale, folder, arguments.data, arguments.weights, arguments.rows)
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


def _entry_order(arguments: Arguments, folder: Path) -> EntryOrder:
    if arguments.scale != "demo":
        raise InputError(f"{arguments.item} has no rows at scale {arguments.scale}: choose --scale demo")
    if arguments.weights is not None:
        raise InputError(f"the rows of {arguments.item} start from random weights: leave out --weights")
    return EntryOrder(arguments.item, folder, arguments.data, arguments.rows, arguments.seeds or EntryOrder.seeds)


def _table(report: Report) -> Table:
    table = Table(*report.columns, title=report.title)
    for row in report.rows:
        table.add_row(*row)
    return table
