"""The pictures of the simulation: the paper's times against prediction, and how devices of today scale."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from megdet.analysis.cluster.machines import Machine
from megdet.analysis.cluster.paper import GOOD, Prediction
from megdet.analysis.cluster.scaling import LEAST_EFFICIENCY, Point
from megdet.errors import InputError

_BLUE, _ORANGE, _GREEN, _GREY = "#1f6fb4", "#d9731a", "#3a923a", "0.45"
_PARTS = (
    ("images", "arithmetic", _BLUE),
    ("overhead", "overhead of a micro-batch", "#f2c14e"),
    ("stragglers", "waiting for large images", "#9ecae1"),
    ("norms", "batch-norm collectives", _ORANGE),
    ("gradients", "gradients", _GREEN),
    ("input", "waiting for input", _GREY),
)


def plot_paper(predictions: list[Prediction], path: Path) -> None:
    """Hours as printed against hours as predicted, and the error of each row. Raises InputError on a bad file name."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    hours, errors = figure.subplots(1, 2, width_ratios=(1, 1.15))
    ends = (3.0, 200.0)
    hours.plot(ends, ends, color=_GREY, linewidth=1)
    hours.fill_between(ends, [end * (1 - GOOD) for end in ends], [end * (1 + GOOD) for end in ends], color="0.92")
    for name, color, marker in (("calibrated", "black", "s"), ("Table 2", _ORANGE, "^"), ("Table 3", _BLUE, "o")):
        chosen = [prediction for prediction in predictions if _kind(prediction) == name]
        places = [prediction.row.hours for prediction in chosen]
        hours.plot(places, [prediction.hours for prediction in chosen], marker, color=color, label=name, alpha=0.85)
    hours.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="the paper, hours", ylabel="predicted, hours")
    hours.set_title("training time; the band is 20%")
    hours.legend(frameon=False, loc="lower right")
    for axis in (hours.xaxis, hours.yaxis):
        _number_axis(axis, (3, 5, 10, 20, 50, 100, 200))
    colors = {"calibrated": "black", "Table 2": _ORANGE, "Table 3": _BLUE}
    errors.axvspan(-GOOD, GOOD, color="0.92")
    errors.axvline(0, color=_GREY, linewidth=1)
    rows = list(range(len(predictions)))[::-1]
    errors.barh(rows, [p.error for p in predictions], color=[colors[_kind(p)] for p in predictions], height=0.7)
    names = [f"Table {p.row.table[-1]}: {p.row.name}" + (" (calibrated)" if p.calibrated else "") for p in predictions]
    errors.set_yticks(rows, names, fontsize=8)
    errors.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    errors.set(xlim=(-0.5, 0.5), ylim=(-0.7, len(predictions) - 0.3), title="(predicted - paper) / paper")
    _finish(figure, [hours, errors], path)


def plot_scaling(points: list[Point], machine: Machine, path: Path) -> None:
    """Images a second, efficiency and the parts of a step over the devices. Raises InputError on a bad file name."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    speed, share, parts = figure.subplots(1, 3)
    devices = [point.job.devices for point in points]
    ideal = points[0].images_per_second / points[0].efficiency
    speed.plot(devices, [ideal * count for count in devices], "--", color=_GREY, label="linear")
    speed.plot(
        devices, [point.images_per_second for point in points], "o-", color=_BLUE, label=machine.device, clip_on=False
    )
    speed.set(yscale="log", ylabel="images a second", title="speed")
    speed.legend(frameon=False)
    share.axhline(LEAST_EFFICIENCY, color=_GREY, linestyle="--", linewidth=1)
    share.plot(devices, [point.efficiency for point in points], "-", color=_BLUE)
    for name, marker, pays in (("pays", "o", True), ("does not pay", "x", False)):
        chosen = [point for point in points if (not point.why_not) == pays]
        if chosen:
            where = [point.job.devices for point in chosen]
            share.plot(where, [point.efficiency for point in chosen], marker, color=_BLUE, label=name, clip_on=False)
    share.legend(frameon=False, loc="lower left")
    share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    share.set(ylim=(0, 1.05), title="efficiency")
    heights = [[getattr(point.step, name) / point.step.total for point in points] for name, _, _ in _PARTS]
    parts.stackplot(devices, heights, labels=[label for _, label, _ in _PARTS], colors=[color for *_, color in _PARTS])
    parts.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    parts.set(ylim=(0, 1), title="where the seconds of a step go")
    parts.legend(loc="lower left", fontsize=8, framealpha=0.9)
    for axes in (speed, share, parts):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("devices")
        axes.set_xlim(devices[0], devices[-1])
        _number_axis(axes.xaxis, devices[::2])
    _finish(figure, [speed, share, parts], path)


def _kind(prediction: Prediction) -> str:
    return "calibrated" if prediction.calibrated else f"Table {prediction.row.table[-1]}"


def _number_axis(axis: Any, places: Any) -> None:
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _finish(figure: Figure, all_axes: list[Any], path: Path) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path}: no such kind of picture: name it .png, .pdf or .svg") from None
