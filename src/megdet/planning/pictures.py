"""The picture of the simulation: how current devices scale."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

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


def plot_scaling(simulated: Sequence[tuple[str, list[Point]]], device: str, path: Path) -> None:
    """Images a second, efficiency and the parts of a step over the devices.

    Args:
        simulated: the points at each speed of programs, slow to fast, with its name.
        device: the name of the device.
        path: .png, .pdf or .svg.

    Raises InputError as `save_figure`.
    """
    figure, axes = panels(2 + len(simulated), (4.3 * (2 + len(simulated)), 4.2))
    speed, share, *parts = axes
    devices = [point.layout.world_size for point in simulated[0][1]]
    for (name, points), color in zip(simulated, (BLUE, ORANGE), strict=False):
        label = device if len(simulated) == 1 else name
        ideal = points[0].images_per_second / points[0].efficiency
        speed.plot(devices, [ideal * count for count in devices], "--", color=GREY, linewidth=1)
        speed.plot(devices, [own.images_per_second for own in points], "o-", color=color, label=label, clip_on=False)
        share.plot(devices, [own.efficiency for own in points], "-", color=color)
        for marker, pays in (("o", True), ("x", False)):
            chosen = [own for own in points if (not own.why_not) == pays]
            where = [own.layout.world_size for own in chosen]
            share.plot(where, [own.efficiency for own in chosen], marker, color=color, clip_on=False)
    speed.set(yscale="log", ylabel="images a second", title=f"{device}: speed")
    speed.legend(frameon=False)
    share.axhline(LEAST_EFFICIENCY, color=GREY, linestyle="--", linewidth=1)
    share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    share.set(ylim=(0, 1.05), title="efficiency (cross: does not pay)")
    for (name, points), own in zip(simulated, parts, strict=True):
        heights = [[getattr(point.step, part) / point.step.total for point in points] for part, _, _ in _PARTS]
        own.stackplot(
            devices, heights, labels=[label for _, label, _ in _PARTS], colors=[color for *_, color in _PARTS]
        )
        own.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        own.set(ylim=(0, 1), title="seconds of a step" if len(simulated) == 1 else f"seconds of a step, {name}")
    parts[0].legend(loc="lower left", fontsize=8, framealpha=0.9)
    for own in axes:
        own.set_xscale("log", base=2)
        own.set_xlabel("devices")
        own.set_xlim(devices[0], devices[-1])
        number_axis(own.xaxis, devices[::2])
    save_figure(figure, path)


def number_axis(axis: Any, places: Any) -> None:
    """Plain numbers at these places only."""
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
