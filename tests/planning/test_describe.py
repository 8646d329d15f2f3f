"""The table of `megdet describe`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from factories import TINY, with_model
from megdet.data.demo import draw_demo
from megdet.planning.describe import describe
from megdet.recipe import Data, Recipe, Schedule
from megdet.training.schedule import why_no_warmup


def values(recipe: Recipe, devices: int) -> dict[str, Any]:
    return {row.key: row.value for row in describe(recipe, devices)}


def test_rates_before_and_after_warmup_follow_the_linear_scaling_rule() -> None:
    rows = values(replace(TINY, batch_size=64, bn_size=16), 4)
    assert rows["rate_first"] == 0.02
    assert rows["rate_after_warmup"] == 0.02 * 64 / 16
    assert (rows["lanes"], rows["micro_batch"], rows["accumulation"]) == (4, 16, 1)


def test_a_warmup_that_does_nothing_is_said_to_do_nothing() -> None:
    texts = {
        batch: next(
            row.text for row in describe(replace(TINY, batch_size=batch, bn_size=16), 1) if row.key == "warmup_steps"
        )
        for batch in (16, 32)
    }
    assert texts[16] == "none: " + why_no_warmup(replace(TINY, batch_size=16, bn_size=16))
    assert "nothing" not in texts[32]
    assert texts[32].startswith("500 steps = 16000 images")


def test_frozen_stages_are_not_counted_as_trained() -> None:
    recipe = with_model(TINY, backbone={"frozen_stages": 2})
    rows = {row.key: row.text for row in describe(recipe, 1, count_parameters=True)}
    whole, trained = rows["parameters"].removesuffix(" trained").split(" million, ")
    assert float(trained.split()[0]) < float(whole)


def test_missing_data_is_said_and_counted_as_coco() -> None:
    recipe = replace(TINY, data=Data(train_annotations="nowhere.json"), schedule=Schedule(policy="long"))
    rows = {row.key: row for row in describe(recipe, 1)}
    assert "nowhere.json is not here" in rows["data"].text
    assert rows["steps"].value == -(-18 * 117266 // 4)


def test_the_data_that_is_here_is_counted(tmp_path: Path) -> None:
    draw_demo(tmp_path, num_train=12, num_val=1, size=64, workers=1)
    data = Data(train_annotations=str(tmp_path / "annotations/train.json"), train_images=str(tmp_path / "train"))
    recipe = replace(TINY, data=data, schedule=Schedule(policy="step", epochs=2.5, milestones=(1.0,), factors=(0.1,)))
    rows = values(recipe, 1)
    assert rows["data"]["images"] == 12
    assert rows["data"]["classes"] == 8
    assert rows["canvases"]["number"] == 1  # all its images are squares of one size
    assert rows["canvases"]["padding"] == 0
    assert rows["steps"] == 8  # 2.5 epochs of 12 images, 4 a step, rounded up


def test_the_layout_is_told_with_its_uneven_shares_and_rounds() -> None:
    recipe = replace(TINY, batch_size=256, bn_size=32)
    rows = {row.key: row for row in describe(recipe, 6)}
    assert (rows["lanes"].value, rows["lane_width"].value, rows["accumulation"].value) == (2, 3, 4)
    assert sorted(rows["shares"].value) == [10, 11, 11]
    assert rows["shares"].text == "2 x 11 + 1 x 10"
    assert rows["images_a_device"].value == 44
    assert rows["idle"].text == "3.0%"  # 256 of 6 x 44
    assert rows["better_devices"].value == [4, 8, 2]
    assert "8 (0.0% idle, 32 images a device)" in rows["better_devices"].text
    recipe = replace(TINY, batch_size=20, bn_size=4)
    rows = {row.key: row for row in describe(recipe, 4, lane_width=2)}
    assert rows["accumulation"].text == "3 (1 lane(s) have one less)"  # 5 groups over 2 lanes


def test_better_numbers_of_devices_keep_what_is_forced() -> None:
    recipe = replace(TINY, batch_size=256, bn_size=32)
    free, limited = (
        {row.key: row.value for row in describe(recipe, 5, max_images_per_device=limit)}["better_devices"]
        for limit in (None, 8)
    )
    assert free == [4, 6, 3]
    # 3 devices make shares of 11 images; 6 now need a lane of 6, with 48 images a device; 7, 9 and 10 gain nothing
    assert limited == [4, 8, 11]
