"""What the screen shows, by hand arithmetic."""

import math

import pytest
from rich.console import Console

from megdet.screen.drawing import draw
from megdet.screen.standing import RECENT, Standing, duration


def step(number: int, **more: object) -> dict[str, object]:
    own = {
        "step": number,
        "epoch": number / 5,
        "learning_rate": 0.01,
        "loss": 3.0,
        "rpn_box": 1.0,
        "box_head_class": 2.0,
    }
    own |= {"rpn_positive": 16.0, "box_head_positive": 0.25, "gradient_norm": 2.0, "seconds": 2.0, "data_seconds": 0.5}
    return {**own, **more}


def evaluation(number: int, ap: float) -> dict[str, object]:
    return {"step": number, "evaluation": {"bbox": {"AP": ap, "AP50": 0.9}}, "seconds": 1.0}


def standing() -> Standing:
    """40 images, 8 a step: 5 steps an epoch, 3 epochs."""
    return Standing("runs/a", "1 x cpu", 8, 40, 15, {"rpn_positive": 64.0, "box_head_positive": 1.0})


def text(own: Standing, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(draw(own, width, "evaluating step 6"))
    return captured.get().splitlines()


def test_numbers_are_means_over_the_last_steps_and_the_rest_follows_from_them() -> None:
    own = standing()
    for number in range(1, 7):
        own.add(step(number, loss=float(number)))
    assert own.loss_terms() == {"loss": 3.5, "rpn_box": 1.0, "box_head_class": 2.0}
    assert own.epoch == (2, 1, 5)
    assert own.epochs == 3
    assert own.images_a_second == 4.0
    assert own.waiting == 0.25
    assert own.seconds_left == 18.0
    assert own.positives() == {"rpn": 0.25, "box head": 0.25}
    assert not own.is_done


def test_a_run_with_more_steps_than_it_is_said_to_have_has_an_epoch_too() -> None:
    own = Standing("a", "", 8, 40, 15, {})
    own.add(step(40))
    assert own.epoch[0] == 3


def test_only_the_last_steps_count() -> None:
    own = Standing("a", "", 8, 4000, 500, {})
    for number in range(1, 2 * RECENT + 1):
        own.add(step(number, seconds=100.0 if number <= RECENT else 1.0))
    assert own.seconds_a_step == 1.0


def test_the_best_evaluation_stays_and_what_was_survived_is_counted() -> None:
    own = standing()
    own.add(step(1, loss=math.nan, left_out="rpn_box is not finite"))
    own.add(step(5))
    own.add(evaluation(5, 0.5))
    own.add(step(10))
    own.add(evaluation(10, 0.4))
    own.add({"step": 5, "rolled_back": {"from": 12, "why": "x"}})
    own.add({"step": 7, "replaced": [{}, {}]})
    assert own.best_score is not None
    assert (own.best_score.ap, own.best_score.epoch) == (0.5, 1.0)
    assert own.last_score is not None
    assert own.last_score.ap == 0.4
    assert own.survived["updates left out"] == own.survived["roll-backs"] == 1
    assert own.survived["images replaced"] == 2


def test_a_run_is_done_when_its_last_step_is_evaluated() -> None:
    own = standing()
    own.add(step(15))
    assert not own.is_done
    own.add(evaluation(15, -1.0))
    assert own.is_done


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_the_screen_fits_any_width_and_has_every_number(width: int) -> None:
    own = standing()
    own.add(step(6, peak_memory_bytes=3 * 2**29))
    own.add(evaluation(5, 0.5))
    lines = text(own, width)
    assert max(map(len, lines)) <= width
    whole = " ".join(" ".join(lines).split())
    for part in ("epoch 2/3", "loss 3.0000", "rpn box 1.0000", "4.0 images/s", "memory 1.50 GiB", "box head 25.0%"):
        assert part in whole, (part, lines)
    assert "50.0 (AP50 90.0) at epoch 1" in whole
    assert "evaluating step 6" in whole


def test_a_run_before_its_first_step_has_a_screen_too() -> None:
    assert any("0%" in line for line in text(standing(), 80))


def test_lengths_of_time_have_two_units_at_most() -> None:
    given = [0.4, 59.0, 61.0, 3599.0, 3600.0, 90000.0, 10 * 86400.0]
    assert [duration(seconds) for seconds in given] == [
        *("0 s", "59 s", "1 min 01 s", "59 min 59 s", "1 h 00 min", "1 d 1 h", "10 d 0 h")
    ]
