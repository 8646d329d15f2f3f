"""Published speeds beside the model: what sets its two speeds, and how far the others are."""

from pathlib import Path

import pytest

from megdet.planning.published import PLAIN, TUNED
from megdet.planning.published_speeds import PUBLISHED_SPEEDS, PublishedSpeed, error, mean_errors

OTHERS = [own for own in PUBLISHED_SPEEDS if not own.calibrates]


def test_four_speeds_set_the_two_ends_of_the_range() -> None:
    setting = [own for own in PUBLISHED_SPEEDS if own.calibrates]
    assert [own.speed for own in setting] == [PLAIN, PLAIN, TUNED, TUNED]
    assert [error(own.predicted(own.speed), own) for own in setting] == pytest.approx([0.0] * 4, abs=2e-3)


@pytest.mark.parametrize("own", OTHERS, ids=lambda own: f"{own.devices} x {own.machine.device}, {own.micro_batch}")
def test_a_speed_that_sets_nothing_is_predicted_within_14_percent(own: PublishedSpeed) -> None:
    assert abs(error(own.predicted(own.speed), own)) < 0.14


def test_the_model_beats_the_plain_rule_where_there_are_several_gpus() -> None:
    ours, rule = mean_errors(PUBLISHED_SPEEDS)
    assert ours < 0.08 < 0.13 < rule
    alone = [own for own in OTHERS if own.devices == 1]
    assert [own.predicted(PLAIN) for own in alone] == pytest.approx([own.predicted_by_rule() for own in alone])


def test_the_page_shows_the_speeds() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text().splitlines()
    for own in PUBLISHED_SPEEDS:
        predicted = own.predicted(own.speed)
        off = "calibrated" if own.calibrates else f"{error(predicted, own):+z.0%}"
        where = f"| {own.devices} x {own.machine.device} | {own.micro_batch} | {own.images_per_second:.4g} "
        row = f"{where}| {predicted:.4g} | {off} | {error(own.predicted_by_rule(), own):+z.0%} |"
        assert row in lines, row
