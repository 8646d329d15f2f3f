"""The pictures of `megdet analyse variance`."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megdet.plotting import panels, save_figure
from megdet.studies.gradients.findings import Variance

_STYLES = (("#1b6ca8", "o"), ("#d1721c", "s"), ("#3a8f3a", "^"), ("#8e44ad", "D"), ("#b03060", "v"), ("#6b6b2f", "P"))
"""Colours and marks of the modules, in order; they repeat if there are more modules."""
_STYLE_OF_WHOLE = ("#222222", "*")


def plot_variance(found: Variance, path: Path) -> None:
    """The variance over the size of the mini-batch, by module, with the line of the 1/N law, and the ratio to it.

    Raises InputError where the picture cannot be written.
    """
    figure, (left, right) = panels(2, (9.6, 4.2))
    sizes = np.array([level.batch for level in found.modules[0].levels])
    shifts = np.linspace(-0.06, 0.06, len(found.modules))
    for shift, module, (colour, marker) in zip(shifts, found.modules, _styles(found), strict=True):
        values = np.array([level.variance.value for level in module.levels])
        errors = [level.variance.error for level in module.levels]
        left.plot(sizes, values[0] * sizes[0] / sizes, color=colour, linewidth=1, alpha=0.6)
        left.errorbar(sizes, values, errors, fmt=marker, color=colour, markersize=5, label=module.title)
        ratios = [level.of_law.value for level in module.levels]
        spread = [level.of_law.error for level in module.levels]
        right.errorbar(sizes * 2**shift, ratios, spread, fmt=marker, color=colour, markersize=5, capsize=2)
    right.axhline(1, color="0.4", linewidth=1)
    left.set(xscale="log", yscale="log", ylabel="variance of the gradient", title="measured (marks) and 1/N (lines)")
    right.set(xscale="log", ylabel=r"$k \cdot \mathrm{Var}_{kN}\, /\, \mathrm{Var}_N$", title="over the 1/N law")
    left.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.set_xlabel("images of the mini-batch")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    _finish(figure, found, path)


def plot_updates(found: Variance, path: Path) -> None:
    """The variance of one large update beside that of k small ones, by module, and the distance of the two.

    Raises InputError where the picture cannot be written.
    """
    figure, (left, right) = panels(2, (9.6, 4.2))
    factors = [update.factor for update in found.modules[0].updates]
    places = np.arange(len(factors))
    width = 0.8 / len(found.modules)
    for number, (module, (colour, marker)) in enumerate(zip(found.modules, _styles(found), strict=True)):
        x = places + (number - (len(found.modules) - 1) / 2) * width
        scale = np.array([update.law for update in module.updates])
        for name, fill, offset in (("small", colour, -0.18), ("large", "white", 0.18)):
            estimates = [getattr(update, name) for update in module.updates]
            left.errorbar(
                x + offset * width,
                np.array([estimate.value for estimate in estimates]) / scale,
                np.array([estimate.error for estimate in estimates]) / scale,
                fmt=marker,
                color=colour,
                markerfacecolor=fill,
                markersize=5,
                label=module.title if name == "small" else None,
            )
        distances = [update.distance for update in module.updates]
        right.plot(places, distances, f"{marker}-", color=colour, linewidth=1, markersize=5)
    left.axhline(1, color="0.4", linewidth=1)
    left.set(
        ylabel=r"variance of the update over $k\, r^2\, \mathrm{Var}_N$",
        title=f"$k$ small updates (filled), one large (open), $r$ = {found.rate:.3g}",
        ylim=(0, None),
    )
    right.set(ylabel="|small $-$ large| / |large|", title="how far the two updates are apart", ylim=(0, None))
    left.legend(fontsize=8, frameon=False, loc="lower left", ncols=2)
    for axes in (left, right):
        axes.set_xlabel("$k$")
        axes.set_xticks(places, [str(factor) for factor in factors])
    _finish(figure, found, path)


def _styles(found: Variance) -> list[tuple[str, str]]:
    """The colour and the mark of every module; the last one is the whole model."""
    parts = len(found.modules) - 1
    return [*(_STYLES[number % len(_STYLES)] for number in range(parts)), _STYLE_OF_WHOLE]


def _finish(figure: Figure, found: Variance, path: Path) -> None:
    if found.overrides:
        figure.suptitle(f"{Path(found.run).name}{found.changes}", fontsize=9)
    save_figure(figure, path)
