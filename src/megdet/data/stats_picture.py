"""What a data set looks like in one picture."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megdet.data.stats import Statistics
from megdet.plotting import save_figure

_INK, _MUTED, _BLUE = "#1f2933", "#7b8794", "#2f6db5"
_MAX_CLASSES_SHOWN = 20
# For names in other scripts than Latin, Greek and Cyrillic, where they are installed.
_WIDE_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "Malgun Gothic",
    "PingFang SC",
    "Arial Unicode MS",
)


def plot_statistics(stats: Statistics, path: Path, title: str = "") -> None:
    """Draw the statistics as one picture (.png, .svg or .pdf): classes, boxes an image, sizes, aspect ratios, images.

    Raises:
        InputError: the picture cannot be written.
    """
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(font for font in _WIDE_FONTS if font in installed)]
    with warnings.catch_warnings(), rc_context({"font.family": fonts}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a script without a font shows as empty boxes
        _plot(stats, path, title)


def _plot(stats: Statistics, path: Path, title: str) -> None:
    figure = Figure(figsize=(13, 7.2), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 3, width_ratios=[1.15, 1, 1])
    summary = f"{_count(stats.num_images, 'image')}, {_count(stats.num_boxes, 'box', 'boxes')}"
    figure.suptitle(f"{_plain(title, 80)}: {summary}" if title else summary, fontsize=15, color=_INK, fontweight="bold")
    _plot_classes(figure.add_subplot(grid[:, 0]), stats.class_counts)
    _plot_counts(figure.add_subplot(grid[0, 1]), stats)
    _plot_box_sizes(figure.add_subplot(grid[0, 2]), stats)
    _plot_aspect_ratios(figure.add_subplot(grid[1, 1]), stats.aspect_ratios)
    _plot_image_sizes(figure.add_subplot(grid[1, 2]), stats.image_sizes)
    save_figure(figure, path, 110)


def _count(number: int, word: str, words: str = "") -> str:
    return f"{number:,} {word if number == 1 else words or word + 's'}"


def _dress(axes: Axes, title: str, x_label: str = "", y_label: str = "") -> None:
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    axes.set_xlabel(x_label, color=_MUTED)
    axes.set_ylabel(y_label, color=_MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
    axes.tick_params(colors=_MUTED, labelsize=9)


def _plot_classes(axes: Axes, counts: dict[str, int]) -> None:
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    shown = ranked[:_MAX_CLASSES_SHOWN]
    rest = ranked[_MAX_CLASSES_SHOWN:]
    names = [_plain(name) for name, _ in shown]
    values = [value for _, value in shown]
    if rest:
        names.append(f"{len(rest)} more")
        values.append(sum(value for _, value in rest))
    places = range(len(names))
    axes.barh(places, values, color=[_BLUE] * len(shown) + ["#b8c4d0"] * bool(rest), height=0.72)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:,}", va="center", fontsize=9, color=_INK)
    axes.set_yticks(places, names)
    axes.set_ylim(max(len(names), 5) - 0.4, -0.6)
    axes.set_xlim(0, max([*values, 1]) * 1.14)
    num_empty = sum(value == 0 for value in counts.values())
    _dress(axes, f"{len(counts)} classes" + (f", {num_empty} without a box" if num_empty else ""), "boxes")
    axes.tick_params(axis="y", length=0, labelcolor=_INK)


def _plain(name: str, length: int = 22) -> str:
    """A name cut to a length, with no mathematics in it."""
    short = name if len(name) <= length else name[: length - 1] + "…"
    return short.replace("$", r"\$")


def _plot_counts(axes: Axes, stats: Statistics) -> None:
    most = int(max(stats.boxes_per_image, default=0))
    width = max(1, -(-(most + 1) // 40))
    axes.hist(
        stats.boxes_per_image, bins=(np.arange(0, most + 1 + width, width) - 0.5).tolist(), color=_BLUE, rwidth=0.9
    )
    median = stats.quantiles(stats.boxes_per_image)[3]
    _dress(axes, f"Boxes an image: median {median:g}, at most {most}", "boxes", "images")


def _plot_box_sizes(axes: Axes, stats: Statistics) -> None:
    _histogram_of_logarithms(axes, stats.box_sizes)
    for limit in (32, 96):
        axes.axvline(limit, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    total = max(stats.num_boxes, 1)
    shares = [f"{100 * n / total:.0f}% {word}" for n, word in _sizes(stats)]
    _dress(axes, "Boxes: " + ", ".join(shares), "square root of width x height, pixels", "boxes")


def _sizes(stats: Statistics) -> Sequence[tuple[int, str]]:
    return (stats.num_small, "small"), (stats.num_medium, "medium"), (stats.num_large, "large")


def _plot_aspect_ratios(axes: Axes, ratios: NDArray[np.float64]) -> None:
    _histogram_of_logarithms(axes, ratios.clip(1 / 16, 16))
    axes.axvline(1, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    _dress(axes, "Aspect ratio of boxes", "width / height", "boxes")


def _histogram_of_logarithms(axes: Axes, values: NDArray[np.float64]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
    if values.size:
        low, high = values.min() * 0.999, values.max() * 1.001
        axes.hist(values, bins=np.geomspace(low, high, 36).tolist(), color=_BLUE, rwidth=0.9)


def _plot_image_sizes(axes: Axes, sizes: NDArray[np.int64]) -> None:
    different, counts = np.unique(sizes, axis=0, return_counts=True)
    area = 30 + 500 * counts / max(int(counts.sum()), 1)
    axes.scatter(different[:, 1], different[:, 0], s=area, color=_BLUE, alpha=0.45, linewidths=0)
    limit = float(sizes.max(initial=1)) * 1.12
    axes.set_xlim(0, limit)
    axes.set_ylim(0, limit)
    axes.set_aspect("equal")
    only = f"Images: all {different[0, 1]} x {different[0, 0]}" if len(different) == 1 else ""
    _dress(axes, only or f"Images: {len(different)} different sizes", "width, pixels", "height, pixels")
