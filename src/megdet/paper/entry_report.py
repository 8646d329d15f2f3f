"""Table 4 beside our numbers: leaderboard, ablation of the entry's parts, multi-scale testing and ensemble."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megdet.paper.report import SEEDS_NOTE, Report, spread_text
from megdet.paper.rows import EntryItem, Scale
from megdet.paper.tables import TABLE4, LeaderboardEntry

COLUMNS = ("row", "what it adds", "mmAP, paper", "mmAP, here", "AP50, here", "mmAR, paper", "mmAR, here")
COST_COLUMNS = ("seeds", "minutes a run", "s a step", "memory of a step")
NOTES = (
    "The paper's numbers are of COCO: test-dev for the leaderboard, val for its single model. Ours are of drawn "
    "shapes: compare our rows with each other.",
    f"Each row has all parts of the rows above it. {SEEDS_NOTE}",
)


@dataclass(frozen=True)
class Score:
    """The result of one seed of a row, percent."""

    mmap: float
    ap50: float
    mmar: float


@dataclass
class EntryRow:
    """One of our rows, over its seeds."""

    name: str
    adds: str
    scores: list[Score] = field(default_factory=list)
    """scores of the finished seeds"""
    minutes: list[float] = field(default_factory=list)
    """minutes of training, by seed"""
    failures: list[str] = field(default_factory=list)
    """why a seed failed"""
    step_seconds: float | None = None
    """seconds of a step, measured alone"""
    step_bytes: int | None = None
    """peak memory of a step"""
    paper: LeaderboardEntry | None = None
    """the paper's result for this row"""


def entry_report(item: EntryItem, scale: Scale, rows: Sequence[EntryRow], details: Sequence[str]) -> Report:
    """The leaderboard as printed, then our rows; `details` are sentences below the table."""
    report = Report(item, scale, (*COLUMNS, *COST_COLUMNS), [], [], [*details, *NOTES])
    for entry in TABLE4:
        report.rows.append(
            [entry.name, "", f"{entry.mmap:.1f}", "", "", _number(entry.mmar), "", *("" for _ in COST_COLUMNS)]
        )
        report.records.append({"row": entry.name, "paper_mmap": entry.mmap, "paper_mmar": entry.mmar})
    for row in rows:
        report.rows.append(_cells(row))
        report.records.append(_record(row))
        report.notes.extend(f"{row.name} failed: {failure}." for failure in row.failures)
    return report


def _cells(row: EntryRow) -> list[str]:
    names = ("mmap", "ap50", "mmar")
    mmap, ap50, mmar = (spread_text([getattr(score, name) for score in row.scores]) for name in names)
    paper = ("", "") if row.paper is None else (f"{row.paper.mmap:.1f}", _number(row.paper.mmar))
    if not row.scores:
        mmap = "failed" if row.failures else "not run"
    minutes = spread_text(row.minutes)
    seconds = "" if row.step_seconds is None else f"{row.step_seconds:.2f}"
    memory = "" if row.step_bytes is None else f"{row.step_bytes / 2**30:.2f} GiB"
    return [
        row.name,
        row.adds,
        paper[0],
        mmap,
        ap50,
        paper[1],
        mmar,
        str(len(row.scores)),
        minutes,
        seconds,
        memory,
    ]


def _record(row: EntryRow) -> dict[str, Any]:
    return {
        "row": row.name,
        "adds": row.adds,
        "paper_mmap": None if row.paper is None else row.paper.mmap,
        "paper_mmar": None if row.paper is None else row.paper.mmar,
        "mmap": [score.mmap for score in row.scores],
        "ap50": [score.ap50 for score in row.scores],
        "mmar": [score.mmar for score in row.scores],
        "minutes": row.minutes,
        "failures": row.failures,
        "step_seconds": row.step_seconds,
        "step_bytes": row.step_bytes,
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
