"""Figures: their numbers by hand, their files, their axes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from megdet.errors import InputError
from megdet.paper.figures import (
    Curve,
    find_curve,
    plot_curves,
    plot_ratios,
    plot_sweep,
)
from megdet.paper.outcome import Outcome
from megdet.paper.tables import TABLE2
from megdet.recipe import Recipe, Schedule
from megdet.recipe_file import dump_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter

LONG = Curve("16 (long)", (6.0, 12.0, 18.0), (1.0, 2.0, 3.0), (10.0, 30.0, 32.0), (11.0, 14.0, 17.0), (1.8, 2.3, 2.8))


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: object, **options: object) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def write_run(folder: Path, schedule: Schedule, evaluated: Sequence[int] = (2, 4)) -> RunFolder:
    """Four steps of half an epoch and half an hour; mmAP is the step over 10."""
    run = RunFolder(folder).create()
    run.write_recipe(dump_recipe(Recipe(schedule=schedule)))
    with MetricsWriter(run.metrics) as metrics:
        for step in range(1, 5):
            metrics.write({"step": step, "epoch": step / 2, "loss": 1.0, "seconds": 1800.0})
            if step in evaluated:
                metrics.write({"step": step, "evaluation": {"bbox": {"AP": step / 10}}, "seconds": 99.0})
    return run


def test_the_curve_of_a_run_counts_the_hours_of_its_steps(tmp_path: Path) -> None:
    schedule = Schedule("step", epochs=3.0, milestones=(1.5, 2.5), factors=(0.1, 0.1))
    curve = find_curve(write_run(tmp_path, schedule), "a run")
    assert curve == Curve("a run", (1.0, 2.0), (1.0, 2.0), (20.0, 40.0), (1.5, 2.5), (1.5,))  # 2.5 is still to come


def test_a_run_without_evaluations_has_no_curve_and_no_run_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no run is there"):
        find_curve(RunFolder(tmp_path / "nowhere"), "")
    run = write_run(tmp_path / "young", Schedule(), evaluated=())
    assert find_curve(run, "") is None


def test_curves_stand_over_epochs_and_hours_with_their_decays(tmp_path: Path, saved: list[Figure]) -> None:
    fast = Curve("256 (long)", LONG.epochs, (0.1, 0.2, 0.3), (4.0, 20.0, 33.0), LONG.decay_epochs, (0.18, 0.23))
    plot_curves([LONG, fast], tmp_path / "figure4.png")
    by_epoch, by_hour = saved[0].axes
    assert (by_epoch.get_xlabel(), by_epoch.get_ylabel()) == ("epoch", "mmAP (%)")
    assert by_hour.get_xlabel() == "training time (hours)"
    drawn = [(list(line.get_xdata()), line.get_linestyle()) for line in by_epoch.lines]
    assert ([6.0, 12.0, 18.0], "-") in drawn
    assert [x[0] for x, style in drawn if style == "--"] == [11, 14, 17]  # shared: drawn once
    assert [line.get_xdata()[0] for line in by_hour.lines if line.get_linestyle() == "--"] == [
        1.8,
        2.3,
        2.8,
        0.18,
        0.23,
    ]
    assert matplotlib.image.imread(tmp_path / "figure4.png").shape[:2] == (2.9 * 160, 7.2 * 160)


def test_decays_that_differ_have_the_colour_of_their_curve(tmp_path: Path, saved: list[Figure]) -> None:
    plot_curves([LONG, Curve("normal", (6.0,), (1.0,), (9.0,), (8.0, 10.0), ())], tmp_path / "a.png")
    marks = [(line.get_xdata()[0], line.get_color()) for line in saved[0].axes[0].lines if line.get_linestyle() == "--"]
    assert [place for place, _ in marks] == [11, 14, 17, 8, 10]
    assert marks[0][1] == marks[2][1] != marks[3][1]


def test_a_sweep_shows_failures_as_crosses_and_leaves_out_what_was_not_run(tmp_path: Path, saved: list[Figure]) -> None:
    rows = [TABLE2[0], *TABLE2[2:4]]
    trained = Outcome("trained", "", 9, 1.0, 1, 50.0, None, None, "", "")
    failed = Outcome("failed", "why", 9, 1.0, 1, None, None, None, "", "")
    plot_sweep(rows, [[trained], [failed], []], tmp_path / "table2.png", "here")
    paper, ours = saved[0].axes
    assert paper.get_xlabel() == "mmAP (%), paper: ResNet-50, COCO"
    assert ours.get_xlabel() == "mmAP (%), here"
    labels = [text.get_text() for text in paper.get_yticklabels()]
    assert labels == ["16, frozen", "64, frozen", "64 (half rate), frozen"]
    marks = [[(line.get_marker(), line.get_ydata()[0]) for line in axes.lines[1:]] for axes in (paper, ours)]
    assert marks == [[("o", 0), ("x", 1), ("o", 2)], [("o", 0), ("x", 1)]]
    assert ours.lines[0].get_xdata()[0] == 50.0  # the baseline
    plot_sweep([TABLE2[2]], [[]], tmp_path / "empty.png", "here")
    assert np.ptp(matplotlib.image.imread(tmp_path / "empty.png")) > 0


def test_seeds_of_a_row_are_a_bar_with_their_mean_and_a_cross_for_those_that_failed(
    tmp_path: Path, saved: list[Figure]
) -> None:
    trained = [Outcome("trained", "", 9, 1.0, 1, mmap, None, None, "", "") for mmap in (40.0, 44.0)]
    failed = Outcome("failed", "why", 9, 1.0, 1, None, None, None, "", "")
    plot_sweep([TABLE2[0]], [[*trained, failed]], tmp_path / "table2.png", "here")
    drawn = [(line.get_marker(), list(line.get_xdata())) for line in saved[0].axes[1].lines[1:]]
    assert drawn[:2] == [("None", [40.0, 44.0]), ("o", [42.0])]
    assert drawn[2][0] == "x"


def test_seeds_of_a_row_are_curves_of_one_colour_and_one_label(tmp_path: Path, saved: list[Figure]) -> None:
    plot_curves([LONG, replace(LONG, mmap=(9.0, 29.0, 31.0)), replace(LONG, label="256 (long)")], tmp_path / "a.png")
    curves = [line for line in saved[0].axes[0].lines if line.get_linestyle() == "-"]
    colours = [line.get_color() for line in curves]
    assert colours[0] == colours[1] != colours[2]
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == [
        "16 (long)",
        "256 (long)",
        "learning rate decay",
    ]


def test_ratios_stand_beside_those_of_the_paper(tmp_path: Path, saved: list[Figure]) -> None:
    ratios = {1: (4.0, 5.58), 6: (9.0, 11.77), 12: (None, 16.59)}
    records = [
        {"epoch": epoch, "batch_size": 16, "ratio": ours, "paper_ratio": paper}
        for epoch, (ours, paper) in ratios.items()
    ]
    plot_ratios(records, tmp_path / "table1.png")
    (axes,) = saved[0].axes
    ours, paper = (list(line.get_ydata()) for line in axes.lines)
    assert (ours[:2], paper) == ([4.0, 9.0], [5.58, 11.77, 16.59])
    assert np.isnan(ours[2])
    assert "positive" in axes.get_ylabel()


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"figure.png cannot be written"):
        plot_curves([LONG], tmp_path / "file" / "figure.png")
