"""The picture of `megdet lr-test`."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from megdet.plotting import panels, save_figure
from megdet.studies.rates.trial import RateTest, smooth

_COLOURS = ("#1b6ca8", "#d1721c", "#3a8f3a", "#8e44ad", "#b03060", "#5c6b73")
_STYLES = ("-", "--", ":", "-.")


def plot_rate_test(found: RateTest, title: str, path: Path) -> None:
    """The loss over a rising rate, and the losses of the stability runs. Raises InputError as `save_figure`."""
    figure, (left, right) = panels(2, (10.5, 4.2))
    _draw_range(left, found)
    _draw_stability(right, found)
    for axes in (left, right):
        axes.set_ylabel("loss")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _draw_range(axes: Axes, found: RateTest) -> None:
    test = found.range_test
    losses = np.array(test.course.losses)
    rates = np.array(test.course.rates)
    axes.plot(rates, np.where(np.isfinite(losses), losses, np.nan), color="0.75", linewidth=1, label="each step")
    smoothed = np.array(test.smoothed)
    axes.plot(rates[: len(smoothed)], smoothed, color=_COLOURS[0], linewidth=1.8, label="smoothed")
    axes.axvline(test.steepest, color="0.3", linestyle=":", linewidth=1.2, label=f"steepest fall {test.steepest:.2g}")
    axes.axvline(test.lowest, color="0.3", linestyle="-.", linewidth=1.2, label=f"lowest {test.lowest:.2g}")
    if test.highest is not None:
        axes.axvline(test.highest, color="#c0392b", linewidth=1.2, label=f"diverged {test.highest:.2g}")
    label = f"recommended {test.recommended:.2g}"
    axes.axvline(test.recommended, color="#3a8f3a", linestyle="--", linewidth=1.8, label=label)
    axes.set(
        xscale="log",
        xlabel=f"learning rate ({found.batch_size} images a step)",
        title="range test",
        ylim=_limits(smoothed),
    )
    axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")


def _draw_stability(axes: Axes, found: RateTest) -> None:
    rates = sorted({run.rate for run in found.stability})
    warmups = sorted({run.warmup_steps for run in found.stability})
    drawn: list[NDArray[np.float64]] = []
    for run in found.stability:
        losses = np.array(run.course.losses)
        losses = losses[np.isfinite(losses)]
        if not len(losses):
            continue
        drawn.append(smooth(losses, max(1, len(losses) // 20)))
        colour = _COLOURS[rates.index(run.rate) % len(_COLOURS)]
        style = _STYLES[warmups.index(run.warmup_steps) % len(_STYLES)]
        end = "survives" if run.survives else f"diverges at step {run.course.diverged}"
        steps = np.arange(1, len(losses) + 1)
        label = f"rate {run.rate:.2g}, warmup {run.warmup_steps}: {end}"
        axes.plot(steps, drawn[-1], style, color=colour, linewidth=1.5, label=label)
        if not run.survives:  # at the upper edge, if the line leaves the picture
            end_height = min(drawn[-1][-1], _limits(drawn[-1])[1])
            axes.plot(steps[-1:], [end_height], "x", color=colour, markersize=9, markeredgewidth=2, clip_on=False)
    if drawn:
        axes.set_ylim(_limits(np.concatenate(drawn)))
        axes.legend(fontsize=8, frameon=False)
    axes.set(xlabel="step", title="stability after warmup (smoothed)")


def _limits(losses: NDArray[np.float64]) -> tuple[float, float]:
    """The range of losses to show: all of a run that learns, the lower part of one that diverges."""
    return 0.0, 1.08 * float(min(losses.max(), 2.5 * losses[0]))
