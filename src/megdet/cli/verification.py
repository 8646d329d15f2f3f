"""The verb that proves the contract: verify."""

import argparse
import json
from typing import Any

from rich.table import Table

from megdet.analysis.contract.cases import CASES, chosen_cases
from megdet.analysis.contract.verify import DEVICES, STEPS, Row, Verdict, verify
from megdet.cli.options import CONSOLE, PROGRESS, Arguments, add_recipe_keys, whole_number
from megdet.recipe_file import load_recipe


def add_verbs(verbs: Any) -> None:
    """Add the parser of `verify`."""
    verb = verbs.add_parser(
        "verify", help="prove on this machine that the result does not depend on the devices", allow_abbrev=False
    )
    verb.add_argument("recipe", nargs="?", metavar="RECIPE", help="default verify, with all cases")
    verb.add_argument(
        "--devices",
        type=_counts,
        default=DEVICES,
        metavar="N,N",
        help=f"counts to compare with the first of them, default {','.join(map(str, DEVICES))}",
    )
    verb.add_argument("--lane-width", type=whole_number, metavar="K", help="force the ranks that carry one group")
    verb.add_argument("--dtype", choices=["float64", "float32"], default="float64", help="default float64")
    verb.add_argument("--steps", type=whole_number, default=STEPS, metavar="N", help=f"of a run, default {STEPS}")
    verb.add_argument(
        "--cases",
        metavar="NAME,NAME",
        help=f"all, short or of {', '.join(CASES)}; default all, or base where a RECIPE is named",
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    add_recipe_keys(verb)
    verb.set_defaults(run_verb=run_verify)


def run_verify(arguments: Arguments) -> None:
    """Train, compare, print the verdict; exit code 1 where the contract is broken."""
    cases = chosen_cases(arguments.cases or ("base" if arguments.recipe else "all"))
    recipe = load_recipe(arguments.recipe or "verify", arguments.overrides)
    verdict = verify(
        recipe,
        arguments.devices,
        cases=cases,
        steps=arguments.steps,
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


def _counts(text: str) -> tuple[int, ...]:
    """Numbers of at least 1 between commas, for argparse."""
    counts = tuple(whole_number(word) for word in text.split(","))
    if 0 in counts:
        raise argparse.ArgumentTypeError(f"'{text}' names no devices")
    return counts
