"""The pictures of the claims: a map of failures, a dot for each training's score, and courses with their spread."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from megdet.paper.claims.claim import Claim
from megdet.paper.claims.rules import has_failed, score_of
from megdet.paper.claims.variance import Measured
from megdet.paper.figures import COLOURS
from megdet.paper.outcome import Outcome
from megdet.plotting import panels, save_figure

_DPI = 160
_MAP = "cividis"
"""Colours that the colour-blind tell apart, and that print in grey."""


def plot_failures(claim: Claim, results: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """A map of the part of the trainings that failed: mini-batches across, BN size and warmup down, by base rate.

    Raises InputError if the picture cannot be written.
    """
    keys = list(claim.rows.values())
    rates = sorted({own["optimizer.base_lr"] for own in keys})
    batches = sorted({own["batch_size"] for own in keys})
    kinds = sorted({(own["bn_size"], own["schedule.warmup_steps"]) for own in keys})
    figure, axes = panels(len(rates), (1.6 + 2.4 * len(rates), 2.6), sharey=True)
    shades = None
    for place, rate in zip(axes, rates, strict=True):
        parts = np.full((len(kinds), len(batches)), np.nan)
        for row, own in claim.rows.items():
            found = results.get(row, ())
            if own["optimizer.base_lr"] != rate or not found:
                continue
            down = kinds.index((own["bn_size"], own["schedule.warmup_steps"]))
            across, failed = batches.index(own["batch_size"]), sum(map(has_failed, found))
            parts[down, across] = failed / len(found)
            colour = "black" if parts[down, across] > 0.6 else "white"
            place.text(across, down, f"{failed} of {len(found)}", ha="center", va="center", fontsize=8, color=colour)
        shades = place.imshow(parts, cmap=_MAP, vmin=0, vmax=1, aspect="auto")
        place.grid(visible=False)
        place.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        place.set(xlabel="images of a mini-batch", title=f"base rate {rate:g}")
        place.title.set_fontsize(9)
    names = [
        f"{f'BN {size}' if size else 'frozen'}, {f'warmup {steps}' if steps else 'no warmup'}" for size, steps in kinds
    ]
    axes[0].set_yticks(range(len(kinds)), names, fontsize=8)
    if shades is not None:
        figure.colorbar(shades, ax=axes, label="failed trainings", shrink=0.9)
    save_figure(figure, path, _DPI)


def plot_scores(claim: Claim, results: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """The mmAP of every row: a dot a training, a bar at their mean. Raises InputError if it cannot be written."""
    figure, (axes,) = panels(1, (6.0, 1.1 + 0.32 * len(claim.rows)))
    for place, row in enumerate(claim.rows):
        values = [score_of(own) for own in results.get(row, ())]
        if values:
            axes.plot(values, [place] * len(values), "o", color=COLOURS[0], markersize=4, alpha=0.7)
            axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=COLOURS[1], linewidth=2)
    axes.set_yticks(range(len(claim.rows)), list(claim.rows), fontsize=8)
    axes.set(xlabel="mmAP (%); a dot a training, a bar at their mean", ylim=(len(claim.rows) - 0.4, -0.6))
    save_figure(figure, path, _DPI)


def plot_ratios(claim: Claim, measured: Mapping[str, Sequence[Sequence[Measured]]], path: Path) -> bool:
    """Eq. 4's ratio over the steps of a training, a panel a row and a line a factor, between the seeds' extremes.

    Returns False, and draws nothing, where nothing was measured. Raises InputError if it cannot be written.
    """
    if not any(points for trainings in measured.values() for points in trainings):
        return False
    figure, axes = panels(len(claim.rows), (3.4 * len(claim.rows), 3.0), sharey=True)
    for place, (row, trainings) in zip(axes, measured.items(), strict=True):
        for factor, colour in zip(claim.factors, COLOURS, strict=False):
            found = [point for points in trainings for point in points if point.factor == factor]
            steps = sorted({point.step for point in found})
            values = [[point.ratio for point in found if point.step == step] for step in steps]
            place.plot(steps, [np.mean(own) for own in values], "o-", color=colour, markersize=3, label=f"k = {factor}")
            place.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2)
        place.axhline(1.0, color="0.55", linestyle="--", linewidth=0.8)
        place.set(xlabel="step", title=row)
    axes[0].set_ylabel("variance, large update over k small")
    axes[0].legend(fontsize=8, frameon=False)
    save_figure(figure, path, _DPI)
    return True


def plot_courses(results: Mapping[str, Sequence[Outcome]], decays: Sequence[float], path: Path) -> bool:
    """mmAP over epochs, the mean of the seeds of each row between their smallest and largest.

    Only epochs that all seeds of a row have are drawn, with dashed lines where the learning rate decays. Returns False,
    and draws nothing, where nothing was evaluated. Raises InputError if the picture cannot be written.
    """
    figure, (axes,) = panels(1, (5.6, 3.4))
    drawn = 0
    for number, (row, outcomes) in enumerate(results.items()):
        scores = [dict(own.course) for own in outcomes if own.course]
        if not scores:
            continue
        epochs = sorted(set.intersection(*(set(own) for own in scores)))
        values = np.array([[own[epoch] for epoch in epochs] for own in scores])
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            epochs, values.mean(0), color=colour, linewidth=1.4, label=f"{row}, {len(scores)} of {len(outcomes)} seeds"
        )
        axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        drawn += 1
    if not drawn:
        return False
    for decay in decays:
        axes.axvline(decay, color="0.55", linestyle="--", linewidth=0.8, zorder=0)
    axes.set(xlabel="epoch", ylabel="mmAP (%)", xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path, _DPI)
    return True
