"""The picture of the simulation: how current devices scale."""

from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from megdet.planning.published import Machine
from megdet.planning.scaling import LEAST_EFFICIENCY, Point
from megdet.plotting import panels, save_figure

BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#d9731a", "#3a923a", "0.45"
_PARTS = (
    ("images", "arithmetic", BLUE),
    ("overhead", "overhead of a micro-batch", "#f2c14e"),
    ("stragglers", "waiting for large images", "#9ecae1"),
    ("norms", "batch-norm collectives", ORANGE),
    ("gradients", "gradients", GREEN),
    ("input", "waiting for input", GREY),
)


def plot_scaling(points: list[Point], machine: Machine, path: Path) -> None:
    """Images a second, efficiency and the parts of a step over the devices. Raises InputError as `save_figure`."""
    figure, (speed, share, parts) = panels(3, (13.0, 4.2))
    devices = [point.layout.world_size for point in points]
    ideal = points[0].images_per_second / points[0].efficiency
    speed.plot(devices, [ideal * count for count in devices], "--", color=GREY, label="linear")
    speed.plot(
        devices, [point.images_per_second for point in points], "o-", color=BLUE, label=machine.device, clip_on=False
    )
    speed.set(yscale="log", ylabel="images a second", title="speed")
    speed.legend(frameon=False)
    share.axhline(LEAST_EFFICIENCY, color=GREY, linestyle="--", linewidth=1)
    share.plot(devices, [point.efficiency for point in points], "-", color=BLUE)
    for name, marker, pays in (("pays", "o", True), ("does not pay", "x", False)):
        chosen = [point for point in points if (not point.why_not) == pays]
        if chosen:
            where = [point.layout.world_size for point in chosen]
            share.plot(where, [point.efficiency for point in chosen], marker, color=BLUE, label=name, clip_on=False)
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
        number_axis(axes.xaxis, devices[::2])
    save_figure(figure, path)


def number_axis(axis: Any, places: Any) -> None:
    """Plain numbers at these places only."""
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
