"""The verb that looks at the machine: doctor."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from megdet.cli.options import CONSOLE, Arguments
from megdet.data.far.folder import folder_of
from megdet.studies.doctor.doctor import look_at_machine

_STYLES = {"good": "green", "look": "yellow", "bad": "bold red"}


def run_doctor(arguments: Arguments) -> None:
    """Print the findings, each with its next step; exit code 1 if one is bad."""
    annotations, images = arguments.data or (None, None)
    findings = list(
        look_at_machine(
            arguments.run,
            None if annotations is None else Path(annotations),
            None if images is None else folder_of(images),
        )
    )
    table = Table("", "", "found", "next step")
    for finding in findings:
        state = Text(finding.state, style=_STYLES[finding.state])
        table.add_row(state, finding.subject, finding.text, finding.next_step)
    CONSOLE.print(table)
    counts = {state: sum(finding.state == state for finding in findings) for state in _STYLES}
    is_fit = not counts["bad"]
    verdict = "fit to train" if is_fit else "not fit to train"
    CONSOLE.print(f"{verdict}: {counts['good']} good, {counts['look']} to look at, {counts['bad']} bad")
    arguments.print_json({"is_fit": is_fit, "findings": [finding.as_dict() for finding in findings]})
    if not is_fit:
        raise SystemExit(1)
