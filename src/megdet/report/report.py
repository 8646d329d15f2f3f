"""The report: the pages of one run or of several, as one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megdet.errors import InputError, printable
from megdet.report.page import write_page
from megdet.report.run_page import Places, run_page
from megdet.run_folder.folder import RunFolder
from megdet.studies.comparison.comparison import RESAMPLES, compare_runs
from megdet.studies.comparison.recipes import has_effect, value_text
from megdet.studies.comparison.runs import ScoredRun


def write_report(
    folders: Sequence[Path], out: Path | None = None, places: Places | None = None, *, resamples: int = RESAMPLES
) -> Path:
    """Write the report of runs, by default into the folder of the first; returns the file.

    Several runs are compared too. Raises InputError where a folder is no run, a file of it is damaged, the runs were
    evaluated on different images, or the report cannot be written.
    """
    names = [str(folder) for folder in folders]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{twice} is named twice: name each run once")
    places = places or Places()
    pages, runs = zip(*(run_page(RunFolder(folder), places, resamples) for folder in folders), strict=True)
    path = out or RunFolder(folders[0]).report
    title = printable(folders[0].absolute().name) + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")
    write_page(path, title, {"runs": list(pages), "comparisons": _comparisons(runs, resamples)})
    return path


def _comparisons(runs: Sequence[ScoredRun | None], resamples: int) -> dict[str, Any]:
    """For boxes and, where all have some, for masks; empty for one run, and where one has no detections."""
    known = [run for run in runs if run is not None]
    if len(known) < 2 or len(known) < len(runs):
        return {}
    kinds = [kind for kind in known[0].kinds if all(kind in run.kinds for run in known)]
    found: dict[str, Any] = {kind: compare_runs(known, kind, resamples=resamples).as_dict() for kind in kinds}
    for own in found.values():
        own["recipe_differences"] = [
            [key, has_effect(key), [value_text(value) for value in values]]
            for key, values in own["recipe_differences"].items()
        ]
        for run in own["runs"]:
            run["name"] = printable(run["name"])
        for group in own["groups"]:
            group["runs"] = [printable(name) for name in group["runs"]]
    return found
