"""Claims whose trainings only write metrics, and one with real trainings in two processes."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from claim_runs import claim_order, run_claim, training
from megdet.data.demo import draw_demo
from megdet.errors import DivergedError, InputError
from megdet.paper.claims import run as module
from megdet.paper.claims.claim import CLAIMS, Claim
from megdet.paper.claims.report import verdicts_of
from megdet.paper.claims.run import ClaimOrder, reproduce_claim
from megdet.paper.outcome import read_outcome
from megdet.paper.report import Report
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.run_folder.folder import RunFolder
from megdet.run_length import total_steps
from megdet.training.run import RunOptions
from small_runs import ALONE


def score_of(recipe: Recipe, folder: RunFolder) -> float:
    """Frozen statistics fail from 128 images on, and so does everything without warmup at 256; scores grow with BN."""
    if recipe.batch_size >= 128 and not (recipe.bn_size and (recipe.schedule.warmup_steps or recipe.batch_size < 256)):
        raise DivergedError("step 21: rpn_box is not finite: lower it", 21, "rpn_box is not finite")
    return 0.3 + 0.01 * recipe.bn_size + 0.001 * recipe.seed


@pytest.fixture
def order(tmp_path: Path) -> ClaimOrder:
    return claim_order(tmp_path, "claim-failing")


def run(order: ClaimOrder, **changes: Any) -> tuple[Report, list[str]]:
    return run_claim(order, training(score_of), **changes)


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_the_rows_of_a_claim_differ_in_the_keys_that_name_them_and_nowhere_else(claim: Claim) -> None:
    for keys in claim.rows.values():
        recipe = load_recipe(claim.recipe, {**claim.keys, **keys})
        assert (recipe.optimizer.clip_norm, recipe.watch.explodes_at) == (0, 0)
        assert recipe.model.backbone.frozen_stages == 0
    asked = {name for own in claim.statements for name in (own.row, getattr(own, "than", own.row))}
    assert asked <= set(claim.rows)
    assert all(own.word == "not run" for own in verdicts_of(claim, {}))


def test_short_rows_end_twenty_steps_after_their_warmup() -> None:
    claim = CLAIMS["claim-failing"]
    for name, keys in claim.rows.items():
        recipe = load_recipe(claim.recipe, {**claim.keys, **keys})
        assert total_steps(recipe, 2000) == recipe.schedule.warmup_steps + 20, name


def test_all_rows_of_256_against_16_warm_up_over_as_many_images() -> None:
    claim = CLAIMS["claim-large-batch"]
    recipes = [load_recipe(claim.recipe, {**claim.keys, **keys}) for keys in claim.rows.values()]
    assert {recipe.schedule.warmup_steps * recipe.batch_size for recipe in recipes} == {8704}


def test_failures_are_results_with_step_term_and_norm_and_the_verdicts_follow_the_rule(order: ClaimOrder) -> None:
    rows = [row for row in CLAIMS["claim-failing"].rows if row.endswith("r0.01") and not row.startswith("b64")]
    report, heard = run(order, rows=",".join(rows))
    assert len(heard) == 2 * 5 * len(rows)
    verdicts = {
        note.split(":")[0]: note.split(": ")[1].split(" ")[0] for note in report.notes if " base rate of " in note
    }
    assert verdicts == {
        f"{batch} images fail without {what}": word
        for rate in ("0.0025", "0.01")
        for batch, words in ((64, ("not", "not")), (128, ("shown", "not")), (256, ("shown", "shown")))
        for what, word in (
            (f"batch norm, at a base rate of {rate} with a warmup", words[0] if rate == "0.01" else "not"),
            (f"a warmup, at a base rate of {rate} with batch norm", words[1] if rate == "0.01" else "not"),
        )
    }
    kept = json.loads((order.folder / "b256-bn0-w34-r0.01-s3" / "outcome.json").read_text())
    assert kept["failure"] == {"step": 21, "why": "rpn_box is not finite", "last_norm": 2.0}
    assert kept["first_loss"] == pytest.approx((3 + 1.5 + 1) / 3)
    written = json.loads((order.folder / "claim-failing.json").read_text())
    outcomes = {row["row"]: row["outcomes"] for row in written["rows"]}
    assert (len(outcomes["b256-bn0-w34-r0.01"]), len(outcomes["b64-bn0-w34-r0.01"])) == (5, 0)
    assert (order.folder / "claim-failing.png").stat().st_size > 10_000
    cells = {row[0]: row[1:5] for row in report.rows}
    assert cells["b256-bn0-w34-r0.01"] == ["5", "5", "48 to 100%", "21, 21, 21, 21, 21"]
    assert cells["b16-bn0-w34-r0.01"] == ["5", "0", "0 to 52%", ""]


def test_scores_are_judged_over_seeds_and_a_second_call_trains_nothing(order: ClaimOrder) -> None:
    own = {"item": "claim-bn-size", "folder": order.folder / "bn"}
    report, heard = run(order, **own, seeds=2, rows="bn2,bn16")
    assert [row[1] for row in report.rows] == ["not run", "2", "not run", "2"]
    assert any(
        note.startswith("a BN size of 2 scores less than 16: worse (bn2 has -14.0 points") for note in report.notes
    )
    assert heard[0] == "row 1 of 4, bn2-s0: training"
    assert {path.name for path in report.pictures} == {"claim-bn-size.png", "claim-bn-size-course.png"}
    assert all(path.stat().st_size > 10_000 for path in report.pictures)
    assert any(note.startswith("Changed on the command line") for note in report.notes)
    again, heard = run(order, **own, seeds=2, rows="bn2,bn16")
    assert (heard, again.rows) == ([], report.rows)
    elsewhere = {"folder": order.folder / "elsewhere", "outcomes": order.folder / "bn" / "claim-bn-size.json"}
    taken, heard = run(order, **own | elsewhere, seeds=2, rows="bn2,bn16")
    assert (heard, taken.records) == ([], report.records)
    assert [len(course) for row in taken.records for course in (own["course"] for own in row["outcomes"])] == [1] * 4
    assert "claim-bn-size-course.png" in {path.name for path in taken.pictures}, "courses are taken over too"
    with pytest.raises(InputError, match=r"--rows bn3: no row 'bn3'; there are bn0, bn2, bn4, bn16"):
        run(order, **own, rows="bn3")


def test_trainings_of_another_machine_are_taken_over_and_not_made_again(order: ClaimOrder) -> None:
    row = "b16-bn16-w0-r0.01"
    first, _ = run(order, rows=row, seeds=2)
    numbers, elsewhere = order.folder / "claim-failing.json", order.folder.with_name("elsewhere")
    again, heard = run(order, folder=elsewhere, rows=row, seeds=2, outcomes=numbers)
    assert (heard, again.records) == ([], first.records)
    more, heard = run(order, folder=elsewhere, rows=row, seeds=3, outcomes=numbers)
    assert heard[0] == f"row 3 of 3, {row}-s2: training"
    assert [record["seeds"] for record in more.records if record["row"] == row] == [[0, 1, 2]]
    nowhere = order.folder.with_name("nowhere")
    for changes, message in (
        ({"item": "claim-bn-size", "rows": "bn2"}, "it holds claim-failing, not claim-bn-size"),
        ({"overrides": {"data.draw_demo": "", "optimizer.momentum": 0.8}}, "was trained with optimizer.momentum None"),
    ):
        with pytest.raises(InputError, match=message):
            run(order, **{"folder": nowhere, "rows": row, "outcomes": numbers, **changes})
    assert not list(nowhere.glob("*/outcome.json"))


def test_jobs_train_the_rows_in_processes_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    draw_demo(data, num_train=8, num_val=2, size=64, workers=1)
    keys: Mapping[str, Any] = {
        "batch_size": 4,
        "group_size": 4,
        "bn_size": 4,
        "schedule.warmup_steps": 0,
        "schedule.epochs": 1,
        "data.draw_demo": "",
        "model.backbone.weights": "",
    }
    small = replace(CLAIMS["claim-failing"], rows={name: {} for name in "ab"}, keys=CLAIMS["claim-failing"].keys)
    monkeypatch.setattr(module, "CLAIMS", {"claim-failing": small})
    monkeypatch.setattr(module, "pretrained_backbone", lambda *_: "")
    monkeypatch.setattr(module, "_draw", lambda *_: [])
    order = ClaimOrder("claim-failing", tmp_path / "runs", data, seeds=1, jobs=2, overrides=keys)
    heard: list[str] = []
    report = reproduce_claim(order, RunOptions(workers=0), ALONE, say=heard.append)
    assert report is not None
    assert [row[1] for row in report.rows] == ["1", "1"]
    assert len(heard) == 2
    assert any("step" in log.read_text() for log in order.folder.glob("job-*.log"))
    sessions = json.loads((order.folder / "a-s0" / "environment.json").read_text())["sessions"]
    assert sessions[0]["command"] == shlex.join(sys.orig_argv)  # not that of the job


def test_a_job_that_fails_stops_the_others_and_says_why(tmp_path: Path) -> None:
    data = tmp_path / "data"
    draw_demo(data, num_train=8, num_val=2, size=64, workers=1)
    for image in (data / "train").iterdir():
        image.unlink()
    weights = tmp_path / "mobilenet.pth"
    weights.touch()
    order = ClaimOrder("claim-bn-size", tmp_path / "runs", data, weights, jobs=2)
    with pytest.raises(InputError):
        reproduce_claim(order, RunOptions(workers=0), ALONE, say=lambda _: None)


def test_the_folders_of_a_row_are_those_of_its_finished_trainings_whichever_seeds_they_have(order: ClaimOrder) -> None:
    run(order, item="claim-bn-size", rows="bn2", seeds=1)
    outcome = read_outcome(RunFolder(order.folder / "bn2-s0"))
    assert outcome is not None
    found = module.runs_of(CLAIMS["claim-bn-size"], 3, {"bn2-s2": outcome}, order.folder)
    assert {row: [own.path.name for own in runs] for row, runs in found.items() if runs} == {"bn2": ["bn2-s2"]}
