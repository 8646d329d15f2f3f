"""The verb verify."""

from rich.table import Table

from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.contract.cases import chosen_cases
from megdet.contract.verify import Comparison, Verdict, verify
from megdet.recipe_file import load_recipe


def run_verify(arguments: Arguments) -> None:
    """Train on several numbers of devices, compare, print the verdict; exit code 1 if results depend on the devices."""
    recipe = load_recipe(arguments.recipe or "verify", arguments.overrides)
    cases = chosen_cases(arguments.cases or ("base" if arguments.recipe else "all"), recipe)
    verdict = verify(
        recipe,
        cases=cases,
        **arguments.given("devices", "steps"),
        lane_width=arguments.lane_width,
        dtype=arguments.dtype,
        progress=PROGRESS.print,
    )
    if arguments.json:
        arguments.print_json(verdict.as_dict())
    else:
        CONSOLE.print(_table(verdict))
        for line in _left_out(verdict):
            CONSOLE.print(line)
        CONSOLE.print(verdict.sentence())
    if not verdict.passes:
        raise SystemExit(1)


def _table(verdict: Verdict) -> Table:
    table = Table("case", "devices", "lane width", "rounds", "largest difference", "where", "")
    has_later = any(row.later_difference is not None for row in verdict.rows)
    if has_later:
        table.add_column("later steps")
    for row in verdict.rows:
        difference = "reference" if row.compared_with == "nothing" else f"{row.difference:.2g}"
        cells = [row.case, _devices(row), str(row.lane_width), str(row.rounds), difference, row.where]
        later = [] if not has_later else ["" if row.later_difference is None else f"{row.later_difference:.2g}"]
        table.add_row(*cells, "pass" if row.passes else "fail", *later)
    return table


def _devices(row: Comparison) -> str:
    return f"{row.devices}" if row.stopped_on is None else f"{row.stopped_on}, then {row.devices}"


def _left_out(verdict: Verdict) -> list[str]:
    """A line for each reason, with the cases and counts that were not tried."""
    of_reason: dict[str, dict[tuple[int, ...], list[str]]] = {}
    for own in verdict.left_out:
        of_reason.setdefault(own.why, {}).setdefault(own.devices, []).append(own.case)
    return [
        f"left out, {why}: "
        + "; ".join(f"{', '.join(cases)} on {', '.join(map(str, devices))}" for devices, cases in of_devices.items())
        for why, of_devices in of_reason.items()
    ]
