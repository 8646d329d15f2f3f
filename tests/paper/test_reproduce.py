"""Tables and figures from rows whose training only writes metrics."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megdet.data.demo import draw_demo
from megdet.distributed.world import World
from megdet.errors import DivergedError, InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.paper import reproduce as module
from megdet.paper.outcome import Outcome, read_outcome
from megdet.paper.report import TIMES_NOTE, Report, training_report
from megdet.paper.reproduce import Order, reproduce
from megdet.paper.sweep import _ROW_LOCK, Train
from megdet.paper.tables import TABLE2
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter
from megdet.training.run import RunOptions
from small_runs import ALONE

KEYS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()


def fake_training(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> Evaluation:
    """Two epochs, an hour each; frozen statistics diverge from a rate of 0.04 on, as in the paper."""
    folder.create().write_recipe(dump_recipe(recipe))
    with MetricsWriter(folder.metrics) as metrics:
        metrics.write({"step": 1, "epoch": 1.0, "loss": 1.0, "seconds": 3600.0})
        if recipe.bn_size == 0 and recipe.optimizer.base_lr * recipe.batch_size / 16 >= 0.04:
            raise DivergedError("step 2: rpn_box is not finite")
        metrics.write({"step": 1, "evaluation": {"bbox": {"AP": 0.1}}, "seconds": 1.0})
        metrics.write({"step": 2, "epoch": 2.0, "loss": 1.0, "seconds": 3600.0})
        metrics.write({"step": 2, "evaluation": {"bbox": {"AP": 0.3}}, "seconds": 1.0})
    return Evaluation.from_dict({"bbox": {**dict.fromkeys(KEYS, 0.3), "AP50": 0.5, "per_class": {}}})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for the file, which the fake training does not read."""
    file = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    file.touch()
    return file


@pytest.fixture
def order(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    """Table 2 on 4 + 2 drawn images."""
    data = tmp_path / "data"
    draw_demo(data, num_train=4, num_val=2, size=64, workers=1)
    changes = {**module.data_changes("demo", data), "data.draw_demo": ""}
    monkeypatch.setattr(module, "data_changes", lambda *_: changes)
    return Order("table2", "demo", tmp_path / "runs", data, weights)


def diverging_large_batch(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> Evaluation:
    """The ratios of Table 1 over twelve epochs of the paper, 48 of scale demo; 256 images diverge after the first."""
    folder.create().write_recipe(dump_recipe(recipe))
    with MetricsWriter(folder.metrics) as metrics:
        for step in range(1, 49):
            if recipe.batch_size == 256 and step == 5:
                raise DivergedError("step 5: rpn_box is not finite")
            numbers = {"box_head_positive": step / 400, "rpn_positive": 8.0}
            metrics.write({"step": step, "epoch": float(step), "loss": 1.0, "seconds": 3600.0, **numbers})
        metrics.write({"step": 48, "evaluation": {"bbox": {"AP": 0.3}}, "seconds": 1.0})
    return Evaluation.from_dict({"bbox": {**dict.fromkeys(KEYS, 0.3), "per_class": {}}})


def run(order: Order, training: Train = fake_training, **changes: Any) -> tuple[Report, list[str]]:
    heard: list[str] = []
    report = reproduce(replace(order, **changes), RunOptions(), ALONE, say=heard.append, train_row=training)
    assert report is not None
    return report, heard


def test_table_2_stands_beside_the_papers_with_its_failures(order: Order) -> None:
    report, heard = run(order)
    cells = {row[0]: row[5:7] for row in report.rows}
    assert cells == {
        "b16-bn0": ["36.2", "30.0"],
        "b32-bn0": ["36.4", "30.0"],
        "b64-bn0": ["failed", "failed"],
        "b64-bn0-half": ["36.0", "30.0"],
        "b128-bn0-half": ["failed", "failed"],
    }
    assert heard[0] == "row 1 of 5, b16-bn0: training"
    assert heard[1] == "row 1 of 5, b16-bn0: trained mmAP 30.0 after 2 steps in 120.0 min"
    assert heard[5] == "row 3 of 5, b64-bn0: failed after 1 steps in 60.0 min step 2: rpn_box is not finite"
    written = json.loads((order.folder / "table2.json").read_text())
    (failed,), (trained,) = written["rows"][2]["trainings"], written["rows"][0]["trainings"]
    assert (failed["status"], failed["reason"]) == ("failed", "step 2: rpn_box is not finite")
    assert trained | {"seed": 0, "hours": 2.0, "mmap": 30.0} == trained
    assert written["rows"][0]["paper_hours"] == 33.2
    assert (order.folder / "table2.png").stat().st_size > 10_000
    assert "base rate 0.01 for 16 images" in written["notes"][0]


def test_the_markdown_is_a_table_with_picture_and_notes(order: Order) -> None:
    run(order)
    lines = (order.folder / "table2.md").read_text().splitlines()
    assert lines[0].startswith("## Table 2: ")
    assert lines[2].startswith("| row | batch | BN size | policy | rate | mmAP, paper | mmAP, here |")
    assert lines[3] == "|" + "---|" * 14
    assert lines[4] == "| b16-bn0 | 16 | 0 | normal | normal | 36.2 | 30.0 | 50.0 | 30.0 | 33.2 h | 2.0 h | 1 | 2 | 1 |"
    assert lines[6] == "| b64-bn0 | 64 | 0 | normal | normal | failed | failed | - | - | - | 1.0 h | 1 | 1 | 1 |"
    assert len({line.count("|") for line in lines[2:9]}) == 1
    assert re.search(r"!\[.*\]\(table2.png\)", "\n".join(lines))
    assert lines[-3] == "b128-bn0-half failed here: step 2: rpn_box is not finite."
    assert lines[-1].startswith("Times of rows that were trained on different numbers of devices")


def test_rows_are_chosen_and_the_others_are_said_not_to_be_run(order: Order) -> None:
    report, heard = run(order, rows="b32-bn0")
    assert heard[0] == "row 1 of 1, b32-bn0: training"
    assert [row[6] for row in report.rows] == ["not run", "30.0", "not run", "not run", "not run"]
    _, heard = run(order)
    assert next(line for line in heard if line.endswith("training")) == "row 1 of 5, b16-bn0: training"
    assert not any("b32-bn0" in line for line in heard)
    with pytest.raises(InputError, match=r"--rows is for table2 and table3: figure1 needs all of its rows"):
        run(order, item="figure1", rows="b16-bn0")


def test_every_seed_of_a_row_is_a_training_and_the_table_has_their_spread(order: Order) -> None:
    def training(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> Evaluation:
        assert recipe.seed == (1 if folder.path.name.endswith("-s1") else 0)
        if (recipe.batch_size, recipe.seed) == (32, 1):
            folder.create().write_recipe(dump_recipe(recipe))
            raise DivergedError("step 2: rpn_box is not finite")
        found = fake_training(recipe, folder, options, world)
        return replace(found, bbox=replace(found.bbox, AP=0.3 + 0.02 * recipe.seed))

    report, heard = run(order, training, rows="b16-bn0,b32-bn0", seeds=2)
    assert [line.split(",")[1].split(":")[0].strip() for line in heard[::2]] == [
        "b16-bn0",
        "b32-bn0",
        "b16-bn0-s1",
        "b32-bn0-s1",
    ]
    assert [row[6] for row in report.rows[:3]] == ["31.0 (30.0 to 32.0)", "30.0, 1 failed", "not run"]
    assert [row[-1] for row in report.rows[:3]] == ["2", "2", "0"]
    assert [own["seed"] for own in report.records[0]["trainings"]] == [0, 1]
    assert "b32-bn0-s1 failed here: step 2: rpn_box is not finite." in report.notes
    _, heard = run(order, training, rows="b16-bn0,b32-bn0")  # the first seed is there
    assert heard == []


def test_seeds_count_from_a_seed_that_is_given(order: Order) -> None:
    seen: list[int] = []

    def training(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> Evaluation:
        seen.append(recipe.seed)
        return fake_training(recipe, folder, options, world)

    run(order, training, rows="b16-bn0", seeds=2, overrides={"seed": 1})
    assert seen == [1, 2]


def test_a_figure_draws_every_seed_and_one_of_a_single_training_refuses_more(order: Order) -> None:
    report, heard = run(order, item="figure1", seeds=2)
    assert sum(line.endswith("training") for line in heard) == 4
    assert [row[-1] for row in report.rows] == ["2", "2"]
    for item in ("table1", "figure2"):
        with pytest.raises(InputError, match=f"{item} shows one training of each of its rows: leave out --seeds"):
            run(order, item=item, seeds=2)


@pytest.mark.parametrize("item", ["figure1", "figure4"])
def test_figures_share_the_rows_of_the_tables(order: Order, item: str) -> None:
    report, heard = run(order, item=item)
    assert [line.endswith("training") for line in heard] == [True, False, True, False]
    assert (order.folder / f"{item}.png").stat().st_size > 10_000
    assert any(note.startswith("The paper of 256 images: ") for note in report.notes)
    _, heard = run(order, item=item)
    assert heard == []


def test_figure_4_draws_the_curves_that_there_are_and_names_the_row_that_diverged(order: Order) -> None:
    report, _ = run(order, diverging_large_batch, item="figure4")
    assert [row[6] for row in report.rows] == ["30.0", "failed"]
    assert "b256-bn16-long failed at step 5: no curve." in report.notes
    assert (order.folder / "figure4.png").stat().st_size > 10_000
    assert "no curve" in (order.folder / "figure4.md").read_text()


def test_figure_4_is_written_without_a_picture_where_every_row_diverged(order: Order) -> None:
    def training(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> Evaluation:
        folder.create().write_recipe(dump_recipe(recipe))
        raise DivergedError("step 1: rpn_box is not finite")

    report, _ = run(order, training, item="figure4")
    assert report.pictures == []
    assert (order.folder / "figure4.md").exists()
    report, _ = run(order, training, item="figure2")
    assert report.notes[-1] == "b16-bn0 failed at step 1: no weights to find proposals with."


def test_table_1_has_dashes_for_the_epochs_that_a_diverged_row_lacks(order: Order) -> None:
    report, _ = run(order, diverging_large_batch, item="table1")
    ours = {tuple(row[:2]): row[3:] for row in report.rows}
    assert ours["12", "16"] == ["12.00", "25.00"]
    assert ours["1", "256"] == ["1.00", "25.00"]
    assert ours["6", "256"] == ours["12", "256"] == ["-", "-"]
    assert report.records[-1]["ratio"] is None
    assert "b256-bn16-long failed here: step 5: rpn_box is not finite." in report.notes
    assert (order.folder / "table1.md").exists()
    assert (order.folder / "table1.png").stat().st_size > 10_000


def test_a_row_that_another_process_trains_is_said_so(order: Order) -> None:
    for item in ("table1", "figure4"):
        own = replace(order, item=item, folder=order.folder / item)
        other = RunFolder(own.folder / "b256-bn16-long").create()
        lock = other.lock(_ROW_LOCK)
        report, _ = run(own, diverging_large_batch)
        lock.close()
        assert any(note.startswith("b256-bn16-long is not finished: another process") for note in report.notes), item


def test_a_training_that_left_steps_out_has_an_outcome(order: Order) -> None:
    def skipping(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> Evaluation:
        folder.create().write_recipe(dump_recipe(recipe))
        with MetricsWriter(folder.metrics) as metrics:
            for step in range(1, 21):
                bad = {"loss": math.nan, "left_out": "loss"} if step in (2, 20) else {"loss": 21.0 - step}
                metrics.write({"step": step, "epoch": float(step), "seconds": 1.0, "gradient_norm": bad["loss"], **bad})
        return Evaluation.from_dict({"bbox": {**dict.fromkeys(KEYS, 0.3), "per_class": {}}})

    run(order, skipping, rows="b16-bn0")
    outcome = read_outcome(RunFolder(order.folder / "b16-bn0"))
    assert outcome is not None
    assert (outcome.steps, outcome.first_loss, outcome.last_loss) == (20, (20 + 18 + 17) / 3, 6.5)


@pytest.mark.parametrize(
    ("key", "value"), [("bn_size", "4"), ("model.backbone.frozen_stages", "2"), ("schedule.milestones", "[1, 2]")]
)
def test_a_key_that_the_rows_set_is_refused(order: Order, key: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"--{key}: every row has its own, from the paper"):
        run(order, overrides={key: value})


def test_a_row_that_was_not_run_and_one_without_boxes_to_find_have_dashes() -> None:
    outcome = Outcome("trained", "", 5, 0.01, 1, None, None, None, "", "")
    report = training_report("table2", "demo", TABLE2, {"b16-bn0": outcome}, [])
    assert report.rows[0][6:] == ["-", "-", "-", "33.2 h", "0.6 min", "1", "5", "1"]
    assert report.rows[2][5:] == ["failed", "not run", "-", "-", "-", "-", "-", "-", "0"]
    assert report.notes == [TIMES_NOTE]
    mixed = training_report("table2", "demo", TABLE2, {"b16-bn0": replace(outcome, ranks_differ=True)}, [])
    assert mixed.rows[0][-3] == "mixed"
