"""The paper's numbers, against the packaged recipes and against what the paper's text says of them."""

import pytest

from megdet.paper.tables import FIGURES, TABLE2, TABLE3, TrainingRow, recipe_of, timed_rows
from megdet.recipe_file import load_recipe, packaged_recipes


@pytest.mark.parametrize("row", TABLE2 + TABLE3, ids=lambda row: f"{row.table}: {row.name}")
def test_every_row_has_a_recipe_of_its_sizes_rate_and_policy(row: TrainingRow) -> None:
    recipe = load_recipe(recipe_of(row))
    assert (recipe.batch_size, recipe.bn_size) == (row.batch_size, row.bn_size)
    assert recipe.schedule.policy == row.policy
    assert recipe.optimizer.base_lr == (0.01 if row.rate == "half" else 0.02)


@pytest.mark.parametrize("row", TABLE2 + TABLE3, ids=lambda row: f"{row.table}: {row.name}")
def test_the_header_of_a_rows_recipe_says_its_numbers(row: TrainingRow) -> None:
    header = " ".join(packaged_recipes()[recipe_of(row)].split())
    gpus = "" if row.num_gpus is None or row.bn_size == 0 else f" on {row.num_gpus} GPUs"
    if row.failed:
        assert "did not converge" in header
    else:
        assert f"{row.mmap} mmAP{gpus}" in header
        assert f"{row.hours} h{gpus}" in header


def test_every_recipe_of_the_paper_is_a_row() -> None:
    paper = {name for name in packaged_recipes() if name.startswith("megdet-r50")} - {"megdet-r50-modern"}
    assert {recipe_of(row) for row in TABLE2 + TABLE3} == paper


def test_the_tables_are_whole() -> None:
    assert [len(table) for table in (TABLE2, TABLE3)] == [5, 20]
    assert len(timed_rows()) == 23
    assert len({(row.table, row.name) for row in TABLE2 + TABLE3}) == 25


def test_a_cross_gpu_row_has_the_images_a_gpu_that_the_text_says() -> None:
    """Sec. 3.3: batch norm within a machine of 8 GPUs, 2 images each for 16; 32 or 64 with sublinear memory."""
    for row in TABLE3:
        if row.bn_size >= 16:
            assert row.batch_size // row.devices == row.bn_size // 8


def test_a_row_without_gpus_has_two_images_a_device() -> None:
    assert [row.devices for row in TABLE2] == [8, 16, 32, 32, 64]


def test_the_drawn_curves_are_rows_of_table_3() -> None:
    rows = {(row.batch_size, row.bn_size, row.devices, row.policy) for row in TABLE3}
    assert {(curve.batch_size, curve.bn_size, curve.num_gpus, curve.policy) for curve in FIGURES} <= rows
