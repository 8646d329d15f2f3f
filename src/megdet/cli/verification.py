"""The verb verify."""

from rich.table import Table

from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.contract.cases import chosen_cases
from megdet.contract.verify import Comparison, Format, Verdict, verify
from megdet.recipe_file import load_recipe

_SHOWN_DIGITS = 12
"""of a SHA-256 in the table"""


def run_verify(arguments: Arguments) -> None:
    """Train on several numbers of devices, compare, print the verdict; exit code 1 if results depend on the devices."""
    recipe = load_recipe(arguments.recipe or "verify", arguments.overrides)
    cases = chosen_cases(arguments.cases or ("base" if arguments.recipe else "all"), recipe)
    exact = arguments.exact or recipe.exact
    usual: list[Format] = ["float32", "bfloat16"] if exact else ["float64"]
    formats: list[Format] = [arguments.dtype] if arguments.dtype else usual
    verdicts: dict[str, Verdict] = {}
    for dtype in formats:
        verdicts[dtype] = verify(
            recipe,
            cases=cases,
            **arguments.given("devices", "steps"),
            lane_width=arguments.lane_width,
            dtype=dtype,
            exact=exact,
            progress=PROGRESS.print,
        )
        if not arguments.json:
            _print(verdicts[dtype], dtype if len(formats) > 1 else "")
    if arguments.json:
        found = {dtype: verdict.as_dict() for dtype, verdict in verdicts.items()}
        arguments.print_json(found if len(formats) > 1 else found[formats[0]])
    if not all(verdict.passes for verdict in verdicts.values()):
        raise SystemExit(1)


def _print(verdict: Verdict, dtype: str) -> None:
    CONSOLE.print(_table(verdict))
    for line in _left_out(verdict):
        CONSOLE.print(line)
    CONSOLE.print(f"{dtype}: {verdict.sentence()}" if dtype else verdict.sentence())


def _table(verdict: Verdict) -> Table:
    table = Table("case", "devices", "lane width", "rounds", "largest difference", "where", "")
    has_later = any(row.later_difference is not None for row in verdict.rows)
    if has_later:
        table.add_column("later steps")
    if verdict.sha256:
        table.add_column("SHA-256")
    for row in verdict.rows:
        difference = "reference" if row.compared_with == "nothing" else f"{row.difference:.2g}"
        cells = [row.case, _devices(row), str(row.lane_width), str(row.rounds), difference, row.where]
        later = [] if not has_later else ["" if row.later_difference is None else f"{row.later_difference:.2g}"]
        digest = [row.sha256[:_SHOWN_DIGITS]] if verdict.sha256 else []
        table.add_row(*cells, "pass" if row.passes else "fail", *later, *digest)
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
