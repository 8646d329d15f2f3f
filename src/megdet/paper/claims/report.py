"""The table of a claim: a row each with its trainings over the seeds, and the verdicts below it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megdet.paper.claims.claim import Claim
from megdet.paper.claims.rules import (
    FailMore,
    Keeps,
    Scores,
    Verdict,
    fraction_interval,
    has_failed,
    judge_failures,
    judge_scores,
    score_of,
)
from megdet.paper.claims.variance import Measured, as_records, cells, judge_variances
from megdet.paper.outcome import Outcome
from megdet.paper.report import Report, spread_text
from megdet.recipe import Recipe

COLUMNS = (
    "row",
    "trained",
    "failed",
    "95% interval",
    "failed at step",
    "loss, first 3 to last 10",
    "mmAP",
    "AP50",
    "minutes",
)


def claim_report(
    claim: Claim, results: Mapping[str, Sequence[Outcome]], recipe: Recipe, overrides: Mapping[str, Any]
) -> Report:
    """The report of the trainings that are finished.

    Args:
        claim: that is tested.
        results: the outcomes of each row, by its name.
        recipe: of one of its rows, for the words below the table.
        overrides: keys that the caller changed.
    """
    report = Report(claim.name, claim.scale, COLUMNS, [], [])
    for row in claim.rows:
        found = results.get(row, ())
        report.rows.append(_cells(row, found))
        report.records.append({"row": row, "outcomes": [asdict(own) for own in found]})
    report.notes.append(f"Question: {claim.question}")
    report.notes.append(f"The paper: {claim.paper}")
    report.notes.append(_setting(claim, recipe))
    if overrides:
        changed = ", ".join(f"{key} {value}" for key, value in overrides.items())
        report.notes.append(f"Changed on the command line, so this is not the experiment of the rule: {changed}.")
    report.notes.extend(verdict.sentence() for verdict in verdicts_of(claim, results))
    return report


def verdicts_of(claim: Claim, results: Mapping[str, Sequence[Outcome]]) -> list[Verdict]:
    """What the finished trainings say of every statement of the claim."""
    failures = [own for own in claim.statements if isinstance(own, FailMore)]
    scores = [own for own in claim.statements if isinstance(own, Scores)]
    return [*judge_failures(failures, results), *judge_scores(scores, results)]


def add_measured(report: Report, claim: Claim, measured: Mapping[str, Sequence[Sequence[Measured]]]) -> None:
    """Put what was measured of a claim's trainings into its report: records, a table, the verdicts."""
    for record in report.records:
        record["measured"] = as_records(measured[record["row"]])
    head = "| row | k | trainings | large over small, after step | mean |\n|---|---|---|---|---|\n"
    lines = [cells(row, factor, measured[row]) for row in claim.rows for factor in claim.factors]
    report.notes.append(head + "\n".join(f"| {' | '.join(own)} |" for own in lines))
    keeps = [own for own in claim.statements if isinstance(own, Keeps)]
    report.notes.extend(verdict.sentence() for verdict in judge_variances(keeps, measured))


def _setting(claim: Claim, recipe: Recipe) -> str:
    if recipe.start_from:
        weights = f"the weights of {recipe.start_from}"
    else:
        weights = "trained weights" if recipe.model.backbone.weights else "random weights"
    return (
        f"Every row: {recipe.model.backbone.name} from {weights}, short edge {recipe.data.short_edges[-1]} px, no "
        f"clipping, all stages trained, base rate {recipe.optimizer.base_lr:g} for 16 images unless the row says "
        "another. A number is the mean over the seeds; after it stand the smallest and the largest. A training that "
        f"failed has an mmAP of 0. {claim.seeds} seeds a row are asked for."
    )


def _cells(row: str, found: Sequence[Outcome]) -> list[str]:
    if not found:
        return [row, "not run", *("" for _ in COLUMNS[2:])]
    failed = [own for own in found if has_failed(own)]
    low, high = fraction_interval(len(failed), len(found))
    steps = sorted(own.failure.step if own.failure else own.steps for own in failed)
    losses = [
        (own.first_loss, own.last_loss) for own in found if own.first_loss is not None and own.last_loss is not None
    ]
    first, last = (statistics.fmean(values) for values in zip(*losses, strict=True)) if losses else (None, None)
    return [
        row,
        str(len(found)),
        str(len(failed)),
        f"{100 * low:.0f} to {100 * high:.0f}%",
        ", ".join(map(str, steps)),
        "" if first is None or last is None else f"{first:.2f} to {_loss(last)}",
        spread_text([score_of(own) for own in found]),
        spread_text([0.0 if has_failed(own) or own.ap50 is None else own.ap50 for own in found]),
        spread_text([60 * own.hours for own in found]),
    ]


def _loss(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.0e}"
