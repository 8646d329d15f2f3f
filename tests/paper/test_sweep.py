"""Sweeps with trainings that only write metrics."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megdet.distributed.world import World
from megdet.errors import DivergedError, InputError
from megdet.evaluation.coco_numbers import Evaluation
from megdet.paper.outcome import Outcome, read_outcome
from megdet.paper.sweep import run_sweep
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter
from megdet.run_folder.sessions import write_environment
from megdet.training.resume import check_folder
from megdet.training.run import RunOptions
from small_runs import ALONE, small_recipe, write_small_set

NUMBERS = Evaluation.from_dict(
    {
        "bbox": {
            **dict.fromkeys("AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split(), 0.25),
            "AP50": 0.5,
            "per_class": {},
        }
    }
)


class FakeTraining:
    """Notes what it is asked to train; rows of 16 images diverge at their second step."""

    def __init__(self) -> None:
        self.trained: list[str] = []

    def __call__(self, recipe: Recipe, folder: RunFolder, _options: RunOptions, _world: World) -> Evaluation:
        self.trained.append(folder.path.name)
        check_folder(folder, recipe)
        folder.create().write_recipe(dump_recipe(recipe))
        with MetricsWriter(folder.metrics) as metrics:
            metrics.write({"step": 1, "epoch": 0.5, "loss": 2.0, "seconds": 9.0})
            if recipe.batch_size == 16:
                raise DivergedError("step 2: rpn_box is not finite")
            metrics.write({"step": 2, "epoch": 1.0, "loss": 1.0, "seconds": 27.0})
            metrics.write({"step": 2, "evaluation": {"bbox": {"AP": 0.25}}, "seconds": 1000.0})
        return NUMBERS


Sweep = Callable[..., dict[str, Outcome]]


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Recipe]:
    for split in ("train", "val"):
        write_small_set(tmp_path, split, 4, seed=len(split))
    recipe = small_recipe(tmp_path)
    return {"small": recipe, "large": replace(recipe, batch_size=16)}


@pytest.fixture
def sweep(tmp_path: Path, rows: dict[str, Recipe]) -> Sweep:
    def run(training: FakeTraining, **options: object) -> dict[str, Outcome]:
        told = options.pop("told", lambda *_: None)
        own = options.pop("rows", rows)
        return run_sweep(  # type: ignore[arg-type]
            own, tmp_path / "runs", RunOptions(), ALONE, told=told, train_row=training, **options
        )

    return run


def test_a_row_that_diverges_is_a_result_and_the_sweep_goes_on(sweep: Sweep, rows: dict[str, Recipe]) -> None:
    training = FakeTraining()
    outcomes = sweep(training, rows=dict(reversed(rows.items())))
    assert training.trained == ["large", "small"]
    failed, trained = outcomes["large"], outcomes["small"]
    assert (failed.status, failed.reason) == ("failed", "step 2: rpn_box is not finite")
    assert (failed.mmap, failed.ap50, failed.steps, failed.hours) == (None, None, 1, 9 / 3600)
    assert (trained.status, trained.mmap, trained.ap50, trained.mmar) == ("trained", 25, 50, 25)
    assert (trained.steps, trained.hours) == (2, 36 / 3600)  # evaluations do not count


def test_finished_rows_are_not_trained_again(sweep: Sweep) -> None:
    first, second = FakeTraining(), FakeTraining()
    before = sweep(first, chosen=["large"])
    assert first.trained == list(before) == ["large"]
    after = sweep(second)
    assert second.trained == ["small"]
    assert after["large"] == before["large"]
    third = FakeTraining()
    assert sweep(third) == after
    assert third.trained == []


def test_each_row_is_told_before_and_after(sweep: Sweep) -> None:
    heard: list[tuple[str, list[str]]] = []
    sweep(FakeTraining(), told=lambda name, outcomes: heard.append((name, list(outcomes))))
    assert heard == [("small", []), ("small", ["small"]), ("large", ["small"]), ("large", ["small", "large"])]


def test_other_errors_stop_the_sweep_and_leave_no_outcome(sweep: Sweep, tmp_path: Path) -> None:
    def training(recipe: Recipe, folder: RunFolder, options: RunOptions, world: World) -> Evaluation:
        raise InputError("the disk is full")

    with pytest.raises(InputError, match="the disk is full"):
        sweep(training)
    assert read_outcome(RunFolder(tmp_path / "runs/small")) is None


def test_rows_of_another_recipe_or_of_other_data_do_not_compare(
    sweep: Sweep, rows: dict[str, Recipe], tmp_path: Path
) -> None:
    sweep(FakeTraining())
    other = {name: replace(recipe, seed=1) for name, recipe in rows.items()}
    with pytest.raises(InputError, match=r"runs/small holds a run of another recipe \(seed: 1 here, 0 there\)"):
        sweep(FakeTraining(), rows=other)
    write_small_set(tmp_path, "val", 4, seed=9)
    with pytest.raises(InputError, match=r"runs/small was trained or evaluated on other images .*val\.json"):
        sweep(FakeTraining())


def test_rows_from_other_weights_do_not_compare_wherever_the_file_lies(
    sweep: Sweep, rows: dict[str, Recipe], tmp_path: Path
) -> None:
    def started_from(name: str) -> dict[str, Recipe]:
        backbone = replace(rows["small"].model.backbone, weights=str(tmp_path / name))
        return {name: replace(recipe, model=replace(recipe.model, backbone=backbone)) for name, recipe in rows.items()}

    for name, content in (("a.pth", b"one"), ("moved.pth", b"one"), ("b.pth", b"two")):
        (tmp_path / name).write_bytes(content)
    first = sweep(FakeTraining(), rows=started_from("a.pth"))
    assert first["small"].weights == hashlib.sha256(b"one").hexdigest()
    assert sweep(FakeTraining(), rows=started_from("moved.pth")) == first
    with pytest.raises(
        InputError, match=r"runs/small started from other weights than .*b\.pth: rows would not compare"
    ):
        sweep(FakeTraining(), rows=started_from("b.pth"))
    (tmp_path / "runs/small/outcome.json").unlink()  # as if it was interrupted
    training = FakeTraining()
    assert sweep(training, rows=started_from("moved.pth"))["small"] == first["small"]
    assert training.trained == ["small"]
    assert "moved.pth" in (tmp_path / "runs/small/recipe.yaml").read_text()
    (tmp_path / "runs/small/outcome.json").unlink()
    (tmp_path / "a.pth").write_bytes(b"two")
    with pytest.raises(InputError, match="runs/small started from other weights"):
        sweep(FakeTraining(), rows=started_from("a.pth"))


def test_outcomes_from_before_the_weights_were_noted_are_accepted(sweep: Sweep, tmp_path: Path) -> None:
    sweep(FakeTraining())
    file = tmp_path / "runs/small/outcome.json"
    old = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("weights", "ranks_differ")}
    file.write_text(json.dumps(old))
    training = FakeTraining()
    assert sweep(training)["small"].weights == ""
    assert training.trained == []


def test_starts_with_different_ranks_are_noted(sweep: Sweep, tmp_path: Path) -> None:
    write_environment(RunFolder(tmp_path / "runs/small").create(), {"world_size": 2})
    outcomes = sweep(FakeTraining())
    assert (outcomes["small"].ranks_differ, outcomes["large"].ranks_differ) == (True, False)


def test_a_row_that_does_not_fit_the_ranks_is_refused_before_any_training(
    rows: dict[str, Recipe], tmp_path: Path
) -> None:
    training = FakeTraining()
    with pytest.raises(
        InputError, match=r"row small: lane width 3 does not divide 1 device.*choose the rows that fit with --rows"
    ):
        run_sweep(
            rows,
            tmp_path / "runs",
            RunOptions(lane_width=3),
            ALONE,
            told=lambda *_: None,
            train_row=training,
        )
    assert training.trained == []


def test_a_damaged_outcome_is_named(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text('{"status": "trained"}')
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/outcome.json is no outcome of a row")):
        read_outcome(RunFolder(tmp_path))
