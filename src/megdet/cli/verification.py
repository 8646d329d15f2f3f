"""The verb that proves the contract: verify."""

import json

from rich.table import Table

from megdet.analysis.contract.cases import chosen_cases
from megdet.analysis.contract.verify import Row, Verdict, verify
from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.recipe_file import load_recipe


def run_verify(arguments: Arguments) -> None:
    """Train, compare, print the verdict; exit code 1 where the contract is broken."""
    cases = chosen_cases(arguments.cases or ("base" if arguments.recipe else "all"))
    recipe = load_recipe(arguments.recipe or "verify", arguments.overrides)
    verdict = verify(
        recipe,
        cases=cases,
        **arguments.given("devices", "steps"),
        lane_width=arguments.lane_width,
        dtype=arguments.dtype,
        progress=PROGRESS.print,
    )
    if arguments.json:
        print(json.dumps(verdict.as_dict(), allow_nan=False))
    else:
        CONSOLE.print(_table(verdict))
        CONSOLE.print(verdict.sentence())
    if not verdict.passes:
        raise SystemExit(1)


def _table(verdict: Verdict) -> Table:
    table = Table("case", "devices", "lane width", "rounds", "largest difference", "where", "")
    has_later = any(row.later_difference is not None for row in verdict.rows)
    if has_later:
        table.add_column("later steps")
    for row in verdict.rows:
        cells = [row.case, _devices(row), str(row.lane_width), str(row.rounds), f"{row.difference:.2g}", row.where]
        later = [] if not has_later else ["" if row.later_difference is None else f"{row.later_difference:.2g}"]
        table.add_row(*cells, "pass" if row.passes else "fail", *later)
    return table


def _devices(row: Row) -> str:
    return f"{row.devices}" if row.stopped_on is None else f"{row.stopped_on}, then {row.devices}"
