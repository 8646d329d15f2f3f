"""The picture of the paper's times and their predictions."""

from pathlib import Path
from typing import Any

from matplotlib.ticker import PercentFormatter

from megdet.paper.times import GOOD, Prediction
from megdet.planning.pictures import BLUE, GREY, ORANGE, number_axis
from megdet.plotting import panels, save_figure

_COLORS = {"calibrated": "black", "Table 2": ORANGE, "Table 3": BLUE}


def plot_paper(predictions: list[Prediction], path: Path) -> None:
    """Predicted hours over printed hours, and the error of each row. Raises InputError as `save_figure`."""
    figure, (hours, errors) = panels(2, (12.0, 5.4), width_ratios=(1, 1.15))
    ends = (3.0, 200.0)
    hours.plot(ends, ends, color=GREY, linewidth=1)
    hours.fill_between(ends, [end * (1 - GOOD) for end in ends], [end * (1 + GOOD) for end in ends], color="0.92")
    for (name, color), marker in zip(_COLORS.items(), "s^o", strict=True):
        chosen = [prediction for prediction in predictions if _kind(prediction) == name]
        places: list[Any] = [prediction.row.hours for prediction in chosen]
        hours.plot(places, [prediction.hours for prediction in chosen], marker, color=color, label=name, alpha=0.85)
    hours.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="the paper, hours", ylabel="predicted, hours")
    hours.set_title("training time; the band is 20%")
    hours.legend(frameon=False, loc="lower right")
    for axis in (hours.xaxis, hours.yaxis):
        number_axis(axis, (3, 5, 10, 20, 50, 100, 200))
    errors.axvspan(-GOOD, GOOD, color="0.92")
    errors.axvline(0, color=GREY, linewidth=1)
    rows = list(range(len(predictions)))[::-1]
    errors.barh(rows, [p.error for p in predictions], color=[_COLORS[_kind(p)] for p in predictions], height=0.7)
    names = [f"Table {p.row.table[-1]}: {p.row.name}" + (" (calibrated)" if p.calibrated else "") for p in predictions]
    errors.set_yticks(rows, names, fontsize=8)
    errors.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    errors.set(xlim=(-0.5, 0.5), ylim=(-0.7, len(predictions) - 0.3), title="(predicted - paper) / paper")
    save_figure(figure, path)


def _kind(prediction: Prediction) -> str:
    return "calibrated" if prediction.calibrated else f"Table {prediction.row.table[-1]}"
