"""Table 4 and Figure 5 from rows whose training and testing are replaced by what they would leave behind."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megdet.data.demo import draw_demo
from megdet.distributed.world import World
from megdet.errors import DivergedError, InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.paper import entry_runs as module
from megdet.paper.entry import MEMBERS, PARTS, entry_recipes, member_names, run_name
from megdet.paper.entry_runs import AT_SCALES, ENSEMBLE, EntryOrder, StepCost, reproduce_entry
from megdet.paper.tables import TABLE4
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe, first_difference
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter
from megdet.training.run import RunOptions
from small_runs import ALONE

KEYS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
ROWS = [*(part.name for part in PARTS), AT_SCALES, *MEMBERS, ENSEMBLE]


def fake_training(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> Evaluation:
    """A step of a minute; every seed is a point better than the one before. Atrous ones diverge."""
    folder.create().write_recipe(dump_recipe(recipe))
    with MetricsWriter(folder.metrics) as metrics:
        metrics.write({"step": 1, "epoch": 1.0, "loss": 1.0, "seconds": 60.0})
    if folder.path.name.startswith("entry-atrous"):
        raise DivergedError("step 2: rpn_box is not finite")
    numbers = dict.fromkeys(KEYS, 0.3 + 0.01 * recipe.seed)
    return Evaluation.from_dict({"bbox": {**numbers, "AP50": 0.5, "per_class": {}}})


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EntryOrder:
    """Two seeds on 4 + 2 drawn images; the detectors find all of the second image and nothing in the first."""
    data = tmp_path / "data"
    draw_demo(data, num_train=4, num_val=2, size=64, workers=1)
    changes = {**module.data_changes("demo", data), "data.draw_demo": ""}
    monkeypatch.setattr(module, "data_changes", lambda *_: changes)
    truth = json.loads((data / "annotations" / "val.json").read_text())
    last = truth["images"][-1]["id"]
    found = [
        {**{key: box[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9}
        for box in truth["annotations"]
        if box["image_id"] == last
    ]
    monkeypatch.setattr(module, "_detect", lambda *_: found)
    monkeypatch.setattr(module, "step_cost", lambda _: StepCost(0.25, 2**30))
    return EntryOrder("table4", tmp_path / "runs", data, seeds=2)


def run(order: EntryOrder, said: list[str] | None = None, train_row: Any = fake_training) -> Any:
    lines = [] if said is None else said
    return reproduce_entry(order, RunOptions(workers=0), ALONE, say=lines.append, train_row=train_row)


def test_each_row_has_all_parts_of_the_rows_before_it() -> None:
    recipes = [*entry_recipes({}, 1).values()]
    names = [*entry_recipes({}, 1)]
    assert names == [run_name(row, 0) for row in (*(part.name for part in PARTS), *MEMBERS)]
    for part, before, recipe in zip(PARTS[1:], recipes, recipes[1:], strict=False):
        assert first_difference(before, recipe), f"{part.name} changes nothing"
    assert recipes[len(PARTS) - 1].model.backbone.output_stride == 16
    assert {recipe.batch_size for recipe in recipes} == {16}


def test_a_seed_changes_nothing_but_the_seed() -> None:
    recipes = entry_recipes({}, 2)
    for part in PARTS:
        first, second = recipes[run_name(part.name, 0)], recipes[run_name(part.name, 1)]
        assert replace(second, seed=0) == first
        assert second.seed == 1


def test_the_four_members_have_different_structures() -> None:
    recipes = entry_recipes({}, 1)
    members = [recipes[name].model for name in member_names(0)]
    assert len(members) == 4
    assert all(a != b for i, a in enumerate(members) for b in members[:i])


def test_the_table_has_the_leaderboard_then_every_row_over_its_seeds(order: EntryOrder) -> None:
    report = run(order)
    assert [row[0] for row in report.rows] == [*(entry.name for entry in TABLE4), *ROWS]
    by_name = {record["row"]: record for record in report.records}
    assert by_name["baseline"]["mmap"] == pytest.approx([30, 31])
    assert by_name["MegDet (Ensemble)"]["paper_mmap"] == 52.5
    assert by_name[ENSEMBLE]["paper_mmap"] == 52.5
    assert by_name[AT_SCALES]["paper_mmap"] == 50.5
    assert by_name["atrous"]["mmap"] == []
    cells = dict(zip(report.columns, next(row for row in report.rows if row[0] == "baseline"), strict=True))
    assert (cells["mmAP, here"], cells["seeds"]) == ("30.5 (30.0 to 31.0)", "2")
    assert (cells["minutes a run"], cells["memory of a step"]) == ("1.0 (1.0 to 1.0)", "1.00 GiB")
    assert sum("rpn_box is not finite" in note for note in report.notes) == 2
    assert (order.folder / "table4.png").stat().st_size > 1000
    assert "MegDet (Ensemble)" in (order.folder / "table4.md").read_text()


def test_the_detections_of_the_tests_are_kept_with_their_numbers(order: EntryOrder) -> None:
    report = run(order)
    scores = {record["row"]: record["mmap"] for record in report.records if "mmap" in record}
    assert scores[AT_SCALES] == scores[ENSEMBLE]
    assert len(scores[AT_SCALES]) == 2
    assert 20 < scores[AT_SCALES][0] < 100
    folder = order.folder / run_name(ENSEMBLE, 1)
    assert json.loads((folder / "detections.json").read_text())
    assert 100 * json.loads((folder / "evaluation.json").read_text())["bbox"]["AP"] == scores[ENSEMBLE][1]


def test_the_second_call_trains_and_tests_nothing(order: EntryOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(order)

    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(module, "_detect", never)
    monkeypatch.setattr(module, "step_cost", never)
    assert run(order, train_row=never).rows == first.rows


def test_some_rows_alone_can_be_trained(order: EntryOrder) -> None:
    said: list[str] = []
    report = run(replace(order, rows="baseline, context"), said)
    scores = {record["row"]: record["mmap"] for record in report.records if "mmap" in record}
    assert [row for row, values in scores.items() if values] == ["baseline", "context"]
    assert said[0].startswith("row 1 of 4, entry-baseline-s0")
    cells = next(row for row in report.rows if row[0] == "ohem")
    assert "not run" in cells


def test_an_unknown_row_is_refused_with_the_rows_that_there_are(order: EntryOrder) -> None:
    with pytest.raises(InputError, match="no row 'ohm'; there are baseline, ohem, atrous"):
        run(replace(order, rows="ohm"))


def test_figure_5_shows_what_the_entry_found(order: EntryOrder) -> None:
    report = run(replace(order, item="figure5"))
    assert [picture.name for picture in report.pictures] == ["figure5.png"]
    assert (order.folder / "figure5.png").stat().st_size > 1000


def test_figure_5_without_a_trained_entry_says_so(order: EntryOrder) -> None:
    report = run(replace(order, item="figure5", rows="baseline"))
    assert not report.pictures
    assert "No picture: the detector with all parts is not trained yet." in report.notes
