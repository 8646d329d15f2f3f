"""The line that ends an epoch in metrics.jsonl."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from factories import TINY
from megdet.data.plan import TrainingPlan
from megdet.training.epoch_means import EpochMeans

PLAN = TrainingPlan(np.full((10, 2), 64), replace(TINY, batch_size=4))
"""10 images, 4 a step: epochs end at steps 3, 5, 8; the RPN samples 32 anchors an image."""


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "box_head_positive": 0.01 * step, "rpn_positive": 2.0 * step}


def test_an_epoch_ends_with_the_means_of_its_own_steps() -> None:
    means = EpochMeans(PLAN, [])
    found = [means.add(line(step)) for step in range(1, 9)]
    assert [own is not None for own in found] == [False, False, True, False, True, False, False, True]
    assert found[4] == {
        "step": 5,
        "epoch_means": {
            "epoch": 2,
            "steps": 2,
            "loss": pytest.approx((1 / 4 + 1 / 5) / 2),
            "box_head_positive": pytest.approx(0.045),
            "rpn_positive": pytest.approx(9.0),
            "rpn_positive_ratio": pytest.approx(9 / 32),
        },
    }


def test_steps_whose_update_was_left_out_do_not_count() -> None:
    means = EpochMeans(PLAN, [])
    for step in (1, 2):
        assert means.add(line(step)) is None
    found = means.add({**line(3), "loss": math.nan, "left_out": "loss is not finite"})
    assert found is not None
    assert (found["epoch_means"]["steps"], found["epoch_means"]["loss"]) == (2, pytest.approx((1 + 1 / 2) / 2))
    assert [means.add({**line(step), "left_out": "all of an epoch"}) for step in (4, 5)] == [None, None]


def test_a_run_that_goes_on_within_an_epoch_counts_what_was_done() -> None:
    whole, resumed = EpochMeans(PLAN, []), EpochMeans(PLAN, [line(step) for step in range(1, 5)])
    for step in range(1, 5):
        whole.add(line(step))
    assert resumed.add(line(5)) == whole.add(line(5))


def test_lines_that_were_lost_are_not_counted() -> None:
    means = EpochMeans(PLAN, [])
    assert means.add(line(4)) is None
    assert means.add(line(8)) == {
        "step": 8,
        "epoch_means": {
            "epoch": 3,
            "steps": 1,
            "loss": 1 / 8,
            "box_head_positive": 0.08,
            "rpn_positive": 16.0,
            "rpn_positive_ratio": 0.5,
        },
    }
