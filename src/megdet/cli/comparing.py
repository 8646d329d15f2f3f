"""The verb compare."""

from rich.table import Table
from rich.text import Text

from megdet.cli.options import CONSOLE, Arguments
from megdet.errors import InputError, printable
from megdet.run_folder.folder import RunFolder
from megdet.studies.comparison.comparison import Comparison, compare_runs
from megdet.studies.comparison.recipes import has_effect, value_text
from megdet.studies.comparison.runs import read_scored_run


def run_compare(arguments: Arguments) -> None:
    """Compare runs; print tables and verdicts, or all of it as JSON."""
    names = [str(path) for path in arguments.runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{twice} is named twice: a run does not differ from itself")
    runs = [read_scored_run(RunFolder(path), arguments.annotations) for path in arguments.runs]
    compared = compare_runs(runs, arguments.kind, **arguments.given("resamples"))
    CONSOLE.print(_scores(compared))
    CONSOLE.print(_recipes(compared))
    for group in compared.groups:
        if group.deviation is not None:
            spread = f"{100 * group.AP:.1f} mmAP, standard deviation {100 * group.deviation:.2f}"
            CONSOLE.print(f"{group.name}, {len(group.seeds)} seeds: {spread}")
    for difference in compared.differences:
        CONSOLE.print(difference.words)
    arguments.print_json(compared.as_dict())


def _scores(compared: Comparison) -> Table:
    of = "boxes" if compared.kind == "bbox" else "masks"
    title = f"Scores of {of} on {compared.images} images (percent; 95% over {compared.resamples} draws of the images)"
    table = Table(title=title, title_justify="left")
    for heading in ("recipe", "run", "seed"):
        table.add_column(heading)
    for heading in ("mmAP", "95%", "AP50", "AP75", "mmAR"):
        table.add_column(heading, justify="right")
    for run in compared.runs:
        low, high = run.over_images
        shown = [f"{100 * value:.1f}" if value >= 0 else "-" for value in (run.AP50, run.AP75, run.AR100)]
        ends = f"{100 * low:.1f} to {100 * high:.1f}"
        table.add_row(run.group, Text(printable(run.name)), str(run.seed), f"{100 * run.AP:.1f}", ends, *shown)
    return table


def _recipes(compared: Comparison) -> Table | str:
    if not compared.recipe_differences:
        return "The recipes do not differ."
    table = Table(title="What differs in the recipes", title_justify="left")
    table.add_column("key")
    for group in compared.groups:
        table.add_column(group.name)
    for key, values in compared.recipe_differences.items():
        style = None if has_effect(key) else "dim"
        table.add_row(key, *(Text(value_text(value)) for value in values), style=style)
    return table
