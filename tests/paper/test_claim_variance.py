"""Eq. 4 along a training, and rows that start from one training: what is measured, judged, drawn and taken over."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from claim_runs import claim_order, run_claim, training
from megdet.errors import DivergedError, InputError
from megdet.files import write_json_atomically
from megdet.paper.claims.claim import CLAIMS
from megdet.paper.claims.rules import Keeps
from megdet.paper.claims.run import ClaimOrder, reproduce_claim
from megdet.paper.claims.variance import Measured, judge_variances, keep_measured, measure_updates, read_measured
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.studies.gradients.statistics import Estimate
from megdet.training.run import RunOptions
from small_runs import ALONE, CPU, four_images_a_step, save_run


def points(*ratios: float, factor: int = 2) -> list[Measured]:
    return [Measured(step, factor, ratio, 0.1) for step, ratio in enumerate(ratios, 1)]


@pytest.mark.parametrize(
    ("trainings", "word"),
    [
        ([points(1.0, 1.1), points(1.05, 1.0), points(0.95, 1.0)], "shown"),
        ([points(2.0, 2.1), points(2.0, 2.2), points(1.9, 2.0)], "not shown"),
        ([points(0.4), points(0.45), points(0.42)], "not shown"),
        ([points(0.6), points(1.0), points(2.0)], "undecided"),
        ([points(1.0)], "not run"),
        ([points(1.0, factor=4), points(1.0, factor=4)], "not run"),
    ],
)
def test_a_training_counts_with_the_mean_of_its_checkpoints(trainings: list[list[Measured]], word: str) -> None:
    [verdict] = judge_variances([Keeps("Eq. 4 holds for k = 2", "bn0", 2, 0.25)], {"bn0": trainings})
    assert verdict.word == word


def test_the_interval_is_that_of_logarithms() -> None:
    [verdict] = judge_variances([Keeps("", "bn0", 2, 0.25)], {"bn0": [points(0.5, 2.0), points(1.0, 1.0)]})
    assert verdict.evidence.startswith("1.00, 90% interval 1.00 to 1.00 over 2 seeds, margin 0.80 to 1.25")
    [verdict] = judge_variances([Keeps("", "bn0", 2, 0.25)], {"bn0": [points(math.e), points(1 / math.e)]})
    # Student's t for one degree of freedom at 95% is 6.314, the standard error of the mean 1
    assert verdict.evidence.startswith(f"1.00, 90% interval {math.exp(-6.3138):.2f} to {math.exp(6.3138):.0f}")


def test_several_statements_share_the_level_of_equality() -> None:
    trainings = {"bn0": [points(1.0), points(1.05), points(1.1)]}
    asked = [Keeps("", "bn0", 2, 0.25)]
    assert judge_variances(asked, trainings)[0].word == "shown"
    found = judge_variances(asked * 20, trainings)[0]
    assert found.word == "undecided"
    assert "99.5% interval" in found.evidence


def test_every_kept_checkpoint_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = four_images_a_step(tmp_path, 33)
    save_run(tmp_path / "run", replace(recipe, batch_size=2))
    folder, heard = RunFolder(tmp_path / "run"), list[str]()
    found = measure_updates(folder, (2, 4), CPU, 0, heard.append)
    assert [(own.step, own.factor) for own in found] == [(7, 2), (7, 4)]
    assert all(own.ratio > 0 and own.error > 0 for own in found)
    assert len(heard) == 1
    assert heard[0].startswith("run, step 7: the large update varies ")
    assert Estimate(found[0].ratio, found[0].error).__str__() in heard[0]
    monkeypatch.setattr("megdet.paper.claims.variance.measure_variance", None)
    assert measure_updates(folder, (2, 4), CPU, 0, heard.append) == found == read_measured(folder)


@pytest.fixture
def order(tmp_path: Path) -> ClaimOrder:
    return claim_order(tmp_path, "claim-variance")


def measured_elsewhere(recipe: Recipe, folder: RunFolder) -> float:
    """Eq. 4 holds up to k = 8, and under frozen statistics not for 16."""
    wide = 3.0 if recipe.bn_size == 0 else 1.0
    keep_measured(
        folder,
        [
            Measured(step, factor, (wide if factor == 16 else 1.0) + 0.01 * recipe.seed, 0.1)
            for step in (10, 20)
            for factor in (2, 4, 8, 16)
        ],
    )
    return 0.3


def test_the_report_has_the_ratios_by_step_and_another_machine_takes_them_over(order: ClaimOrder) -> None:
    report, _ = run_claim(order, training(measured_elsewhere))
    table = next(note for note in report.notes if note.startswith("| row | k |"))
    assert "| bn0 | 16 | 3 | 10: 3.01, 20: 3.01 | 3.01 |" in table
    verdicts = [note.split(": ")[1].split(" (")[0] for note in report.notes if note.startswith("Eq. 4 holds for k")]
    assert verdicts == ["shown"] * 3 + ["not shown"] + ["shown"] * 4
    assert [path.name for path in report.pictures] == ["claim-variance.png"]
    numbers, elsewhere = order.folder / "claim-variance.json", order.folder.with_name("elsewhere")
    assert len(json.loads(numbers.read_text())["rows"][0]["measured"][2]) == 8
    again, heard = run_claim(order, training(measured_elsewhere), folder=elsewhere, outcomes=numbers)
    assert (heard, again.records, again.notes) == ([], report.records, report.notes)


def test_all_rows_start_from_one_training_whose_noise_scale_is_told(order: ClaimOrder) -> None:
    started: list[str] = []

    def score(recipe: Recipe, folder: RunFolder) -> float:
        started.append(recipe.start_from)
        if folder.path.name == "trunk":
            scale = {"scale": {"value": 321.0, "error": 12.0}, "is_resolved": True}
            write_json_atomically(folder.path / "noise.json", scale)
        return 0.4 - (0.2 if recipe.batch_size > 128 else 0.0) + 0.001 * recipe.seed

    own = {"item": "critical-batch", "folder": order.folder / "critical"}
    report, heard = run_claim(order, training(score), **own)
    rows = CLAIMS["critical-batch"].rows
    assert started == ["", *[str(order.folder / "critical" / "trunk")] * 3 * len(rows)]
    assert heard[0] == "row 1 of 1, trunk: training"
    assert "Noise scale at the weights from which all rows start: 321 ± 12 images." in report.notes
    words = {
        int(note.split()[0]): note.split(": ")[1].split(" (")[0] for note in report.notes if " bring as " in note[:40]
    }
    assert words == {32: "equal", 64: "equal", 128: "equal", 256: "worse", 512: "worse"}
    _, heard = run_claim(order, training(score), **own)
    assert heard == []


def test_rows_cannot_start_from_a_training_that_failed(order: ClaimOrder) -> None:
    def fails(recipe: Recipe, folder: RunFolder) -> float:
        raise DivergedError("step 9: loss is not finite: lower it", 9, "loss is not finite")

    with pytest.raises(InputError, match=r"trunk failed, so no row can start from it: step 9: loss is not finite"):
        run_claim(order, training(fails), item="critical-batch")


@pytest.mark.parametrize("item", ["claim-variance", "critical-batch"])
def test_measuring_is_for_one_process(order: ClaimOrder, item: Any) -> None:
    with pytest.raises(InputError, match=f"{item} measures gradients in one process, not in 2"):
        reproduce_claim(replace(order, item=item), RunOptions(), replace(ALONE, size=2), say=lambda _: None)
