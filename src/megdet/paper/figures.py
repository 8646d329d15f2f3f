"""Figures in the style of a paper, one function each: curves of runs over epochs and hours, and sweeps by row."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megdet.errors import InputError
from megdet.paper.outcome import Outcome
from megdet.paper.report import row_label
from megdet.paper.tables import TrainingRow
from megdet.plotting import panels, save_figure
from megdet.recipe_file import parse_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics, scores_of
from megdet.run_length import decay_of

COLOURS = ("#1b6ca8", "#d1721c", "#3a8f3a", "#8e44ad", "#7a7a7a", "#b03a48")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_PAPER, _OURS = "0.45", COLOURS[0]
_DPI = 160


@dataclass(frozen=True)
class Curve:
    """The validation accuracy of a run over time."""

    label: str
    epochs: tuple[float, ...]
    """epochs at which it was evaluated"""
    hours: tuple[float, ...]
    """hours of training until each evaluation, on the machine of the run"""
    mmap: tuple[float, ...]
    """percent"""
    decay_epochs: tuple[float, ...]
    """epochs at which the learning rate falls"""
    decay_hours: tuple[float, ...]
    """hours at which the learning rate falls, as far as the run has come"""


def find_curve(folder: RunFolder, label: str) -> Curve | None:
    """The curve of any run, None if nothing was evaluated. Raises InputError if the folder holds no run."""
    text = folder.read_recipe()
    if text is None:
        raise InputError(f"{folder.path}: no run is there (it has no recipe.yaml); name a run folder")
    recipe = parse_recipe(text, str(folder.recipe))
    lines = read_metrics(folder.metrics) if folder.metrics.exists() else []
    steps = [line for line in lines if "loss" in line]
    hours = dict(
        zip((line["step"] for line in steps), np.cumsum([line["seconds"] for line in steps]) / 3600, strict=True)
    )
    epochs = {line["step"]: line["epoch"] for line in steps}
    found = scores_of(lines)
    if not found:
        return None
    decays = decay_of(recipe.schedule).milestones
    passed = [next((step for step, epoch in epochs.items() if epoch >= decay - 1e-5), None) for decay in decays]
    return Curve(
        label,
        tuple(own.epoch for own in found),
        tuple(float(hours[own.step]) for own in found),
        tuple(own.mmap for own in found),
        tuple(decays),
        tuple(float(hours[step]) for step in passed if step is not None),
    )


def plot_curves(curves: Sequence[Curve], path: Path) -> None:
    """Figures 1 and 4: mmAP over epochs and over hours; dashed lines where the learning rate decays.

    Curves of one label are seeds of one row: they have one colour, and only the first is a strong line. Decays that all
    curves share are grey, others have the colour of their curve. Raises InputError if the picture cannot be written.
    """
    figure, (by_epoch, by_hour) = _panels(2, (7.2, 2.9), sharey=True)
    shared = len({curve.decay_epochs for curve in curves}) == 1
    numbers = {label: number for number, label in enumerate(dict.fromkeys(curve.label for curve in curves))}
    labelled: set[str] = set()
    for curve in curves:
        number, is_first = numbers[curve.label], curve.label not in labelled
        colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.3}
        style |= {"label": curve.label} if is_first else {"alpha": 0.45}
        by_epoch.plot(curve.epochs, curve.mmap, **style)
        by_hour.plot(curve.hours, curve.mmap, **style)
        for epoch in curve.decay_epochs if not labelled or (is_first and not shared) else ():
            _mark_decay(by_epoch, epoch, "0.55" if shared else colour)
        for hour in curve.decay_hours if is_first else ():
            _mark_decay(by_hour, hour, colour)
        labelled.add(curve.label)
    by_epoch.set(xlabel="epoch", ylabel="mmAP (%)", xlim=(0, None), ylim=(0, None))
    by_epoch.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    by_hour.set(xlabel="training time (hours)", xlim=(0, None))
    by_hour.xaxis.set_major_locator(MaxNLocator(6))
    handles, labels = by_epoch.get_legend_handles_labels()
    if any(curve.decay_epochs for curve in curves):
        handles.append(Line2D([], [], color="0.55", linestyle="--", linewidth=0.9))
        labels.append("learning rate decay")
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    save_figure(figure, path, _DPI)


def plot_sweep(rows: Sequence[TrainingRow], outcomes: Sequence[Sequence[Outcome]], path: Path, title: str) -> None:
    """Tables 2 and 3: the mmAP of every row, the paper's on the left and ours on the right; the scales differ.

    `outcomes` has those of each row's seeds: a dot is their mean, a bar reaches from the smallest to the largest. The
    first row is the baseline, drawn as a vertical line. A cross is a training that failed; an empty row was not run.
    Raises InputError if the picture cannot be written.
    """
    figure, (paper, ours) = _panels(2, (7.2, 1.3 + 0.22 * len(rows)), sharey=True)
    _dots(paper, [[row.mmap] for row in rows], _PAPER)
    _dots(ours, [[outcome.mmap for outcome in own] for own in outcomes], _OURS)
    paper.set(xlabel="mmAP (%), paper: ResNet-50, COCO")
    ours.set(xlabel=f"mmAP (%), {title}")
    paper.set_yticks(range(len(rows)), [row_label(row) for row in rows])
    paper.set_ylim(len(rows) - 0.4, -0.6)
    legend = [
        Line2D([], [], color="0.3", marker="o", linestyle="", markersize=4, label="trained"),
        Line2D([], [], color="0.3", marker="x", linestyle="", markersize=5, label="failed"),
        Line2D([], [], color="0.3", linestyle=":", linewidth=1, label="first row"),
    ]
    figure.legend(handles=legend, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, path, _DPI)


def plot_ratios(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Table 1: the positive part of the sampled RoIs at the paper's epochs, here (solid) and in the paper (dashed).

    `records` have the keys epoch, batch_size, ratio (None where it is missing) and paper_ratio, both in percent.
    Raises InputError if the picture cannot be written.
    """
    figure, (axes,) = _panels(1, (4.2, 3.1))
    epochs = sorted({record["epoch"] for record in records})
    for number, size in enumerate(sorted({record["batch_size"] for record in records})):
        own = {record["epoch"]: record for record in records if record["batch_size"] == size}
        ours = [math.nan if own[epoch]["ratio"] is None else own[epoch]["ratio"] for epoch in epochs]
        style: dict[str, Any] = {"color": COLOURS[number], "marker": _MARKERS[number], "markersize": 4}
        axes.plot(epochs, ours, label=f"{size} images", **style)
        axes.plot(epochs, [own[epoch]["paper_ratio"] for epoch in epochs], linestyle="--", fillstyle="none", **style)
    axes.set(xlabel="epoch of the paper", ylabel="positive part of sampled RoIs (%)", ylim=(0, None))
    axes.set_xticks(epochs)
    handles, labels = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], color="0.45", marker="o", fillstyle="none", linestyle="--", markersize=4))
    axes.legend(handles, [*labels, "the paper's"], fontsize=8, frameon=False)
    save_figure(figure, path, _DPI)


def _panels(columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    figure, made = panels(columns, size, **options)
    for axes in made:
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
    return figure, made


def _dots(axes: Axes, rows: Sequence[Sequence[float | None]], colour: str) -> None:
    """A line for each row, from the values of its trainings; None is one that failed."""
    found = [[value for value in row if value is not None] for row in rows]
    numbers = [value for own in found for value in own]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    margin = max(0.15 * (high - low), 0.5)
    axes.set_xlim(low - 2 * margin, high + 1.5 * margin)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if found and found[0]:
        axes.axvline(fmean(found[0]), color=colour, linestyle=":", linewidth=1)
    for place, (own, row) in enumerate(zip(found, rows, strict=True)):
        if own:
            value = fmean(own)
            if len(own) > 1:
                axes.plot([min(own), max(own)], [place, place], color=colour, linewidth=1.2, alpha=0.6)
            axes.plot(value, place, "o", color=colour, markersize=4.5)
            over = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}  # over the baseline
            axes.annotate(
                f"{value:.1f}", (value, place), (6, 0), textcoords="offset points", va="center", fontsize=7, bbox=over
            )
        if len(own) < len(row):
            axes.plot(low - margin, place, "x", color=colour, markersize=5.5)


def _mark_decay(axes: Axes, place: float, colour: str) -> None:
    axes.axvline(place, color=colour, linestyle="--", linewidth=0.9, alpha=0.7, zorder=0)
