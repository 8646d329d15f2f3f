from types import SimpleNamespace
from typing import Any, cast

from megdet.recipe_file import load_recipe
from megdet.training.report import Reporter


def said_at_the_end_of_an_epoch(recipe: str, **counts: float) -> str:
    said: list[str] = []
    reporter = SimpleNamespace(run=SimpleNamespace(recipe=load_recipe(recipe)), say=said.append)
    Reporter.epoch_ended(cast("Any", reporter), {"epoch": 1, "steps": 2, **counts})
    return said[0]


def test_the_positive_part_of_several_stages_is_told_in_one_breath():
    assert said_at_the_end_of_an_epoch("demo", rpn_positive=8.0, box_head_positive=0.25) == (
        "epoch 1: positive are 25.0% of the sampled RoIs and 12.5% of the sampled anchors (mean of 2 steps)"
    )
    stages = {"box_head_positive": 0.25, "box_head_2_positive": 0.2, "box_head_3_positive": 0.1}
    assert said_at_the_end_of_an_epoch("demo-cascade", rpn_positive=8.0, **stages) == (
        "epoch 1: positive are 25.0%, 20.0%, 10.0% of the sampled RoIs (stage by stage) and 12.5% of the sampled "
        "anchors (mean of 2 steps)"
    )
