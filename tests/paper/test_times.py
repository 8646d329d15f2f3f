"""The paper's hours against prediction."""

from pathlib import Path

import pytest
from PIL import Image

from megdet.errors import InputError
from megdet.paper.tables import TABLE3, TrainingRow, timed_rows
from megdet.paper.times import (
    CALIBRATED_BY,
    OTHERS,
    Assumptions,
    calibrate,
    count_good,
    paper_layout,
    paper_step,
    plain_rule,
    predict_by_rule,
    predict_paper,
)
from megdet.paper.times_picture import plot_paper
from megdet.planning.network import all_reduce_seconds
from megdet.planning.published import TITAN_XP, Recompute


def row_of(batch_size: int, bn_size: int, devices: int) -> TrainingRow:
    return next(row for row in TABLE3 if (row.batch_size, row.bn_size, row.devices) == (batch_size, bn_size, devices))


def test_the_two_calibrated_rows_come_out_as_printed_and_no_other_is_marked() -> None:
    predictions = predict_paper()[1]
    calibrated = [prediction for prediction in predictions if prediction.calibrated]
    assert [(prediction.row.batch_size, prediction.row.devices) for prediction in calibrated] == [(16, 8), (256, 128)]
    for prediction in calibrated:
        assert prediction.hours == pytest.approx(prediction.row.hours, rel=1e-9)


def test_every_row_with_a_time_is_predicted_in_the_papers_order() -> None:
    assert [prediction.row for prediction in predict_paper()[1]] == timed_rows()


def test_most_rows_are_predicted_within_20_percent_and_the_others_are_explained() -> None:
    predicted = [prediction for prediction in predict_paper()[1] if not prediction.calibrated]
    missed = [prediction for prediction in predicted if not prediction.is_good]
    assert len(predicted) == 21
    assert len(missed) <= 3
    for prediction in predicted:
        assert bool(prediction.why_missed) == (prediction in missed)
        assert prediction.why_missed != "unexplained"


def test_trainings_are_counted_once_and_without_those_that_set_the_constants() -> None:
    """23 timed rows less 2 that calibrate, less Table 2's row of 16 images, which Table 3 has too."""
    predictions = predict_paper()[1]
    missed = sum(not prediction.is_good for prediction in predictions)
    assert count_good(predictions) == (20 - missed, 20)
    table2 = [prediction for prediction in predictions if prediction.row.table == "table2"]
    assert count_good(table2) == (1, 3)
    assert count_good([prediction for prediction in predictions if prediction.calibrated]) == (0, 0)


def test_the_page_has_the_count() -> None:
    root = Path(__file__).parents[2]
    good, others = count_good(predict_paper()[1])
    assert f"**{good} of these {others} lie" in (root / "docs" / "simulate.md").read_text()
    counts = [count_good(predict_paper(assumptions)[1]) for assumptions in OTHERS.values()]
    lines = (root / "docs" / "simulate.md").read_text().splitlines()
    shown = [line.split("|")[2].strip() for line in lines if line.endswith(f" of {others} |")]
    assert shown == [f"{good} of {others}" for good, others in counts]


def test_the_page_shows_the_predictions() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text().splitlines()
    for prediction in predict_paper()[1]:
        row = prediction.row
        cells = (
            f"| {row.table[-1]} | {row.name} | {row.hours:.1f} | {prediction.hours:.1f} | {prediction.error:+z.0%} |"
        )
        assert any(line.startswith(cells) for line in lines), cells


def test_the_plain_rule_is_the_line_through_the_two_rows_that_calibrate() -> None:
    """39.5 h for 11 epochs on 8 GPUs, 4.1 h on 128: 35.4 h between 1.375 and 0.0859375 epochs a GPU."""
    rule = plain_rule()
    assert rule.slope == pytest.approx(35.4 / (11 / 8 - 11 / 128))
    assert rule.fixed_hours == pytest.approx(39.5 - 35.4 / (11 / 8 - 11 / 128) * 11 / 8)
    assert all(p.error == pytest.approx(0, abs=1e-9) for p in predict_by_rule() if p.calibrated)
    assert [p.row for p in predict_by_rule()] == timed_rows()


def test_the_page_says_how_well_the_plain_rule_does() -> None:
    page = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text()
    rule, (good, others) = plain_rule(), count_good(predict_by_rule())
    assert f"`hours = {rule.fixed_hours:.2f} + {rule.slope:.2f} epochs / GPUs`" in page
    assert f"has **{good} of {others}** within 20%" in page
    rows = {(p.row.table, p.row.name): p for p in predict_by_rule()}
    for prediction in predict_paper()[1]:
        plain = rows[prediction.row.table, prediction.row.name]
        assert f"| {prediction.error:+z.0%} | {plain.error:+z.0%} |" in page


def test_the_constants_are_those_of_a_real_machine() -> None:
    constants = calibrate(Assumptions())
    assert 0.05 < constants.fraction < 0.6
    assert 0 < constants.fixed_hours < row_of(256, 16, 128).hours  # type: ignore[operator]


@pytest.mark.parametrize("name", OTHERS)
def test_other_readings_of_the_paper_still_predict_most_rows(name: str) -> None:
    predictions = predict_paper(OTHERS[name])[1]
    assert sum(prediction.is_good for prediction in predictions) >= 17
    assert all(prediction.error == pytest.approx(0, abs=1e-9) for prediction in predictions if prediction.calibrated)


def test_a_row_is_spread_as_the_paper_says() -> None:
    """Sec. 3.3: batch norm across the 8 GPUs of a machine, whatever the number of machines."""
    spread = {
        row_of(*row): paper_layout(row_of(*row)) for row in [(256, 16, 128), (256, 32, 64), (16, 2, 8), (16, 0, 8)]
    }
    found = [(layout.largest_share, layout.lane_width, layout.num_groups) for layout in spread.values()]
    assert found == [(2, 8, 16), (4, 8, 8), (2, 1, 8), (2, 1, 8)]
    for row, layout in spread.items():
        assert (layout.world_size, layout.batch_size, layout.rounds) == (row.devices, row.batch_size, 1)


def test_algorithm_1_reduces_mean_and_variance_one_after_the_other_and_folds_nothing() -> None:
    # small messages cost latency: 53 layers, two all-reduces forward and one backward
    least = 53 * 3 * all_reduce_seconds(0.0, 8, TITAN_XP.fabric)
    assert least < paper_step(row_of(16, 16, 8), TITAN_XP).norms < 2 * least
    assert paper_step(row_of(16, 2, 8), TITAN_XP).norms == 0.0
    assert paper_step(row_of(16, 0, 8), TITAN_XP).norms == 0.0


def test_sublinear_memory_costs_time_from_a_bn_size_of_32_on() -> None:
    for row, costs in ((row_of(16, 16, 8), False), (row_of(32, 32, 8), True)):
        kinds: list[Recompute] = ["none", "norms", "backbone"]
        none, norms, backbone = (paper_step(row, TITAN_XP, kind).images for kind in kinds)
        assert (none < norms < backbone) if costs else (none == norms == backbone)


def test_a_run_of_more_gpus_with_as_many_images_each_is_never_slower() -> None:
    hours = {prediction.row.devices: prediction.hours for prediction in predict_paper()[1] if _is_short(prediction.row)}
    assert [hours[devices] for devices in sorted(hours)] == sorted(hours.values(), reverse=True)
    assert len(hours) == 4


def test_the_calibrating_rows_are_of_equal_length() -> None:
    assert len({row.epochs for row in CALIBRATED_BY}) == 1


def _is_short(row: TrainingRow) -> bool:
    return row.bn_size == 16 and row.policy == "normal"


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    plot_paper(predict_paper()[1], tmp_path / "new" / "paper.png")
    with Image.open(tmp_path / "new" / "paper.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("L").getcolors() or ()) > 20


def test_a_picture_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"name it .png, .pdf or .svg"):
        plot_paper(predict_paper()[1], tmp_path / "paper.movie")
