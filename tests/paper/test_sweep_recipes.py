"""The paper's trainings at the three scales."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megdet.data.demo import DEMO_SETS
from megdet.errors import InputError
from megdet.paper.pretraining import pretraining_recipe
from megdet.paper.rows import (
    SCALES,
    SWEPT_ITEMS,
    Scale,
    chosen_rows,
    data_changes,
    row_name,
    row_recipe,
    rows_of,
    scale_epoch_factor,
    scaled_schedule,
    weights_changes,
)
from megdet.paper.tables import TABLE2, TABLE3, TRAINING_IMAGES
from megdet.recipe import Schedule
from megdet.recipe_check import check_recipe
from megdet.recipe_file import load_recipe
from megdet.run_length import decay_of
from megdet.training.schedule import learning_rate, scaled_rate

ROWS = TABLE2 + TABLE3[1:]
IMAGES = {"demo": DEMO_SETS["easy"].num_train, "bccd": 292}


@pytest.mark.parametrize("scale", SCALES)
def test_every_row_keeps_the_papers_numbers_of_images_at_every_scale(scale: Scale) -> None:
    for row in ROWS:
        recipe = row_recipe(row, scale, {})
        check_recipe(recipe, row_name(row))
        assert (recipe.batch_size, recipe.bn_size) == (row.batch_size, row.bn_size)
        assert (recipe.model.backbone.frozen_stages == 2) == (row.bn_size == 0)
        assert recipe.optimizer.clip_norm == (0 if scale == "coco" else 1)
        assert recipe.model.backbone.norm == "batch"
        assert (
            recipe.model.fpn.norm == recipe.model.box_head.norm == "none"
        )  # ours: the paper does not say where it has batch norm
        normal, ours = TABLE3[5], row_recipe(TABLE3[5], scale, {})
        assert normal.batch_size == ours.batch_size == 16
        half = 0.5 if row.rate == "half" else 1
        assert scaled_rate(recipe) == pytest.approx(scaled_rate(ours) * half * row.batch_size / 16)


def test_the_names_of_the_rows_are_those_of_the_packaged_recipes() -> None:
    names = [row_name(row) for row in ROWS]
    assert len(set(names)) == 24
    assert row_name(TABLE2[0]) == row_name(TABLE3[0]) == "b16-bn0"
    assert {"b16-bn16", "b2-bn2", "b64-bn0-half", "b256-bn16-long"} < set(names)


def test_decays_lengths_and_warmup_shrink_with_the_data() -> None:
    demo, bccd = row_recipe(TABLE3[0], "demo", {}), row_recipe(TABLE3[-1], "bccd", {})
    assert decay_of(demo.schedule).milestones == (32, 40)  # 4 x (8, 10)
    assert decay_of(demo.schedule).epochs == 44
    assert bccd.schedule.milestones == (132, 168, 204)  # 12 x (11, 14, 17)
    assert bccd.schedule.epochs == 216
    assert bccd.schedule.factors == (0.1, 0.1, 0.5)
    # 500 steps of 118,000 images an epoch: 33.9 steps of 4 x 2,000, 14.8 of 12 x 292
    for scale in ("demo", "bccd"):
        images_an_epoch = IMAGES[scale] * scale_epoch_factor(scale)
        assert row_recipe(ROWS[0], scale, {}).schedule.warmup_steps == round(500 * images_an_epoch / TRAINING_IMAGES)


def test_the_scales_state_the_policy_of_the_row_of_16_images() -> None:
    base = load_recipe("reproduce-bccd").schedule
    assert scaled_schedule(Schedule(), base) == base
    assert scaled_schedule(Schedule(), replace(base, epochs=5.5)).milestones == (4, 5)
    assert scaled_schedule(Schedule(policy="long"), Schedule(warmup_steps=3)) == Schedule("long", warmup_steps=3)


def test_a_row_of_256_images_warms_up_and_decays_where_the_paper_does() -> None:
    recipe, images = row_recipe(TABLE3[13], "demo", {}), 2000
    assert row_name(TABLE3[13]) == "b256-bn16"
    rates = [learning_rate(recipe, images, step) for step in range(344)]
    assert rates[0] == 0.01
    assert rates[17] == pytest.approx(0.01 + 0.15 / 2)
    assert rates[34] == pytest.approx(0.16)
    assert [round(rate, 6) for rate in (rates[249], rates[250])] == [0.16, 0.016]  # epoch 32 lies at step 250
    assert [round(rate, 6) for rate in (rates[312], rates[313])] == [0.016, 0.0016]  # epoch 40 at 312.5


def test_tables_and_figures_share_rows() -> None:
    names = {item: [row_name(row) for row in rows_of(item)] for item in SWEPT_ITEMS}
    assert names["figure1"] == ["b16-bn0", "b256-bn16"]
    assert names["figure4"] == names["table1"] == ["b16-bn16-long", "b256-bn16-long"]
    assert names["figure2"] == ["b16-bn0"]
    assert (len(names["table2"]), len(names["table3"])) == (5, 20)
    assert {name for own in names.values() for name in own} <= {row_name(row) for row in ROWS}


def test_files_of_the_user_that_are_missing_are_named_with_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=re.escape(f"{tmp_path}/annotations/trainval.json: no such") + ".*data convert"
    ):
        data_changes("bccd", tmp_path)
    with pytest.raises(InputError, match=r"instances_train2017.json: no such file or folder; unpack .*--data"):
        data_changes("coco", tmp_path)
    for name in ("annotations/trainval.json", "annotations/test.json", "images/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert data_changes("bccd", tmp_path)["data.val_annotations"] == str(tmp_path / "annotations/test.json")
    assert data_changes("demo", tmp_path / "drawn")["data.train_images"] == str(tmp_path / "drawn/train")
    assert data_changes("demo", None) == {}


def test_scales_that_start_from_imagenet_say_so_without_weights(tmp_path: Path) -> None:
    assert weights_changes("demo", None) == {}
    for scale, network in (("bccd", "MobileNetV2"), ("coco", "ResNet-50")):
        with pytest.raises(InputError, match=f"scale {scale} starts from ImageNet.*{network} with --weights"):
            weights_changes(scale, None)
    with pytest.raises(InputError, match=r"--weights .*none.pth: no such file"):
        weights_changes("demo", tmp_path / "none.pth")


def test_rows_are_chosen_by_name() -> None:
    rows = rows_of("table2")
    assert chosen_rows(rows, None) == rows
    assert [row.rate for row in chosen_rows(rows, "b64-bn0-half,b64-bn0")] == ["normal", "half"]
    for names in ("b64,b16-bn0", ","):
        with pytest.raises(InputError, match=r"--rows .*: no row .*; there are b16-bn0, b32-bn0"):
            chosen_rows(rows, names)


def test_the_pretraining_draws_its_pictures_beside_those_of_the_rows(tmp_path: Path) -> None:
    recipe, rows = pretraining_recipe(tmp_path / "demo"), row_recipe(TABLE3[0], "demo", {})
    assert recipe.data.train_images == str(tmp_path / "demo-hard/train")
    assert recipe.data.draw_demo == "hard" != rows.data.draw_demo
    assert recipe.model.backbone == replace(rows.model.backbone, frozen_stages=0)
    assert pretraining_recipe(None).data.train_annotations == "data/demo-hard/annotations/train.json"
