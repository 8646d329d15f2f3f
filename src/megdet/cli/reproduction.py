"""The verb reproduce: trains the rows of the paper's tables and figures."""

from pathlib import Path

from rich.table import Table

from megdet.cli.machine import join_world, run_options
from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.errors import InputError
from megdet.paper.claims.claim import CLAIMS
from megdet.paper.claims.run import ClaimOrder, reproduce_claim
from megdet.paper.entry_runs import EntryOrder, reproduce_entry
from megdet.paper.report import Report
from megdet.paper.reproduce import Order, reproduce
from megdet.paper.rows import CLAIM_ITEMS, ENTRY_ITEMS, SCALES, Scale


def run_reproduce(arguments: Arguments) -> None:
    """Train the rows that are missing; print the table and where the files are."""
    if arguments.run == Path():
        raise InputError("--run is empty: name a folder")
    if arguments.outcomes is not None and arguments.item not in CLAIM_ITEMS:
        raise InputError(f"--outcomes is for the claims: {', '.join(CLAIM_ITEMS)}")
    options, world = run_options(arguments), join_world(arguments)
    report: Report | None
    if arguments.item in CLAIM_ITEMS:
        claim = _claim_order(arguments)
        folder, report = claim.folder, reproduce_claim(claim, options, world, say=PROGRESS.print)
    elif arguments.item in ENTRY_ITEMS:
        entry = _entry_order(arguments)
        folder, report = entry.folder, reproduce_entry(entry, options, world, say=PROGRESS.print)
    else:
        order = _order(arguments)
        folder, report = order.folder, reproduce(order, options, world, say=PROGRESS.print)
    if report is None:
        return
    if arguments.json:
        arguments.print_json(report.as_dict())
        return
    CONSOLE.print(_table(report))
    for note in report.notes:
        CONSOLE.print(note)
    for picture in report.pictures:
        CONSOLE.print(f"picture  {picture}")
    CONSOLE.print(f"table    {folder / f'{report.item}.md'}\nnumbers  {folder / f'{report.item}.json'}")


def _order(arguments: Arguments) -> Order:
    scale: Scale = arguments.scale or SCALES[0]
    asked = arguments.given("data", "weights", "rows", "seeds", "jobs")
    return Order(arguments.item, scale, _folder(arguments, scale), **asked, overrides=arguments.overrides)


def _entry_order(arguments: Arguments) -> EntryOrder:
    if arguments.scale not in (None, "demo"):
        raise InputError(f"{arguments.item} has no rows at scale {arguments.scale}: choose --scale demo")
    if arguments.weights is not None:
        raise InputError(f"the rows of {arguments.item} start from random weights: leave out --weights")
    asked = arguments.given("data", "rows", "seeds", "jobs")
    return EntryOrder(arguments.item, _folder(arguments, "demo"), **asked, overrides=arguments.overrides)


def _claim_order(arguments: Arguments) -> ClaimOrder:
    claim = CLAIMS[arguments.item]
    if arguments.scale not in (None, claim.scale):
        raise InputError(f"{claim.name} has no rows at scale {arguments.scale}: choose --scale {claim.scale}")
    asked = arguments.given("data", "weights", "rows", "seeds", "jobs", "outcomes")
    return ClaimOrder(claim.name, _folder(arguments, claim.name), **asked, overrides=arguments.overrides)


def _folder(arguments: Arguments, name: str) -> Path:
    return arguments.run or Path("runs") / "reproduce" / name


def _table(report: Report) -> Table:
    table = Table(*report.columns, title=report.title)
    for row in report.rows:
        table.add_row(*row)
    return table
