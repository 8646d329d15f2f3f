"""A run that is what it says passes its audit; whatever is changed of it is found and named."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image

from ledgers import written
from megdet import ARITHMETIC
from megdet.cli.main import main
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.files import write_json_atomically
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import checkpoint_path, save_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.ledger import Images, Steps, course, read_chain
from megdet.run_folder.metrics import read_metrics
from megdet.studies.audit import stretches
from megdet.studies.audit.audit import Audit, Request, audit
from megdet.studies.replay import replay as replay_module
from megdet.training import run as run_module
from megdet.training.evaluations.evaluations import Evaluations
from megdet.training.loop import train
from megdet.training.run import RunOptions
from run_folders import load_checkpoint
from small_runs import ALONE, three_epochs

OPTIONS = RunOptions(workers=0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """13 images in steps of 8, 5 steps, a checkpoint after 2, 4 and 5."""
    recipe = three_epochs(tmp_path_factory.mktemp("data"))
    often = {"checkpoint_steps": 2, "checkpoint_epochs": 100, "keep_checkpoints": 5}
    return replace(recipe, **often, evaluation=replace(recipe.evaluation, every_epochs=0))


@pytest.fixture(scope="module")
def original(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "a")
    train(recipe, folder, OPTIONS, ALONE)
    return folder


@pytest.fixture
def run(original: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy to change."""
    return RunFolder(shutil.copytree(original.path, tmp_path / "run"))


def audited(run: RunFolder, world: World = ALONE, devices: int | None = None, **asked: Any) -> Audit:
    return audit(Request(run.path, **{"seed": 1, "stretches": 9, **asked}), world, devices)


def test_a_run_that_is_what_it_says_holds_and_is_not_changed(original: RunFolder) -> None:
    before = {path: path.read_bytes() for path in original.path.rglob("*") if path.is_file()}
    found = audited(original)
    assert found.faults == ()
    assert found.holds
    assert (found.places, found.last_step, found.head) == ((0, 2, 4), 5, read_chain(original.ledger).head)
    assert [(own.first, own.last, own.devices) for own in found.again] == [(0, 3, 1), (2, 5, 1), (4, 5, 1)]
    assert [own.states for own in found.again] == [2, 3, 2], "of steps 0, 2; 2, 4, 5; 4, 5"
    assert found.sentence.startswith("holds: the ")
    assert "steps 1 to 3, 3 to 5, 5 to 5 of 5" in found.sentence
    assert {path: path.read_bytes() for path in original.path.rglob("*") if path.is_file()} == before


def test_stretches_are_drawn_by_the_seed(original: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megdet.studies.audit.audit.fault_of", lambda *_, **__: "")

    def nothing(stretch: stretches.Stretch, *_: Any) -> stretches.Made:
        return stretches.Made(stretch.start.machine, [], {})

    monkeypatch.setattr("megdet.studies.audit.audit.compute", nothing)
    drawn = [tuple(own.first for own in audited(original, stretches=1, seed=seed).again) for seed in range(12)]
    assert drawn == [tuple(own.first for own in audited(original, stretches=1, seed=seed).again) for seed in range(12)]
    assert {*drawn} == {(0,), (2,), (4,)}


def change_weight(run: RunFolder) -> None:
    """One weight of a checkpoint, whose own hashes are made to fit."""
    path = checkpoint_path(run, 4)
    tensors, state = load_checkpoint(path)
    tensors["model"]["box_head.deltas.bias"][1] += 1e-9
    other = RunFolder(run.path / "other").create()
    saved = save_checkpoint(other, state, tensors, keep=1)
    shutil.rmtree(path)
    saved.rename(path)


def damage_checkpoint(run: RunFolder) -> None:
    file = checkpoint_path(run, 2) / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit_recipe(run: RunFolder) -> None:
    text = run.recipe.read_text()
    assert "base_lr: 0.02\n" in text
    run.recipe.write_text(text.replace("base_lr: 0.02\n", "base_lr: 0.03\n"))


def edit_ledger(run: RunFolder) -> None:
    content = run.ledger.read_bytes()
    run.ledger.write_bytes(content.replace(b'"since":2', b'"since":1'))


def lose_line(run: RunFolder) -> None:
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    run.ledger.write_bytes(b"".join(lines[:1] + lines[2:]))


def cut_ledger(run: RunFolder) -> None:
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if line.startswith(b'{"kind":"steps"'))
    run.ledger.write_bytes(b"".join(lines[:last]))


def edit_metrics(run: RunFolder) -> None:
    lines = read_metrics(run.metrics)
    wrong = next(line for line in lines if line["step"] == 3 and "loss" in line)
    wrong["loss"] *= 0.5
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_score(run: RunFolder) -> None:
    lines = read_metrics(run.metrics)
    wrong = next(line for line in lines if "evaluation" in line)
    wrong["evaluation"]["bbox"]["AP"] += 0.01
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lose_score(run: RunFolder) -> None:
    lines = [line for line in read_metrics(run.metrics) if line["step"] != 5 or "evaluation" not in line]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def double_step(run: RunFolder) -> None:
    lines = read_metrics(run.metrics)
    false = {**next(line for line in lines if line["step"] == 3 and "loss" in line), "loss": 0.1}
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in [false, *lines]))


def double_score(run: RunFolder) -> None:
    lines = read_metrics(run.metrics)
    false = {"step": 5, "evaluation": {"bbox": {"AP": 0.9}}, "seconds": 1.0}
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in [false, *lines]))


def edit_digests(run: RunFolder) -> None:
    found = json.loads(run.image_digests.read_text())
    found["3.png"] = "0" * 64
    write_json_atomically(run.image_digests, found)


@pytest.mark.parametrize(
    ("tamper", "fault"),
    [
        (change_weight, r"step_00000004: model is not what line \d of ledger.jsonl has$"),
        (damage_checkpoint, r"optimizer.safetensors is not what was saved, its SHA-256 differs"),
        (edit_recipe, r"recipe.yaml is not what the run was trained by: optimizer.base_lr: 0.03 here, 0.02 there"),
        (edit_ledger, r"ledger.jsonl line \d is not what was written"),
        (lose_line, r"ledger.jsonl line 2: here stands what was line 3: line 2 is missing"),
        (cut_ledger, r"step_00000005: no line of ledger.jsonl that counts is of its step"),
        (edit_metrics, r"metrics.jsonl: steps 3 to 4 are not what line \d of ledger.jsonl has"),
        (edit_score, r"metrics.jsonl: the evaluation of step 5 is not what line \d has"),
        (lose_score, r"metrics.jsonl has no line of the evaluation of step 5, line \d has it"),
        (double_step, r"metrics.jsonl has two lines of step 3"),
        (double_score, r"metrics.jsonl has two lines of the evaluation of step 5"),
        (edit_digests, r"image_digests.json is not what line \d of ledger.jsonl stands for"),
    ],
)  # fmt: skip
def test_what_was_changed_is_found_and_named(run: RunFolder, tamper: Callable[[RunFolder], None], fault: str) -> None:
    assert audited(run, stretches=0).holds
    tamper(run)
    found = audited(run)
    assert not found.holds
    assert found.again == (), "what is read is enough"
    assert msgspec.json.decode(json.dumps(found.as_dict()))["holds"] is False
    assert re.search(fault, found.faults[0]), found.faults
    assert found.sentence == f"does not hold: {found.faults[0]}" + (
        f" (and {len(found.faults) - 1} more)" if found.faults[1:] else ""
    )


def test_an_image_with_another_content_is_named(run: RunFolder, recipe: Recipe, tmp_path: Path) -> None:
    images = shutil.copytree(recipe.data.train_images, tmp_path / "train")
    moved = {"data.train_images": str(images)}
    assert audited(run, stretches=0, overrides=moved).holds
    file = images / "7.png"
    with Image.open(file) as picture:
        size = picture.size
    Image.new("RGB", size, "gray").save(file)
    found = audited(run, overrides=moved)
    assert found.faults == ("1 training image has another content than when the run began: 7.png",)


def test_other_boxes_are_found(run: RunFolder, recipe: Recipe, tmp_path: Path) -> None:
    tree = json.loads(Path(recipe.data.train_annotations).read_text())
    tree["annotations"][0]["bbox"][2] += 1
    other = tmp_path / "train.json"
    other.write_text(json.dumps(tree))
    [fault] = audited(run, overrides={"data.train_annotations": str(other)}).faults
    assert "the training data have other names, sizes, boxes or weights than in line 1 of ledger.jsonl" in fault


def test_a_key_that_changes_the_result_is_refused(run: RunFolder) -> None:
    with pytest.raises(InputError, match="audit computes the run's own steps, and this changes them: batch_size"):
        audited(run, overrides={"batch_size": 16})


def test_a_step_that_was_not_computed_as_the_recipe_says_is_found(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patches:
        make = run_module.train_step

        def stepping(*arguments: Any) -> Any:
            if arguments[4] + 1 == 4:
                arguments[0].model.get_parameter("fpn.lateral.0.0.weight").data.view(-1)[3] += 1e-6
            return make(*arguments)

        patches.setattr(run_module, "train_step", stepping)
        train(recipe, folder, OPTIONS, ALONE)
    assert audited(folder, stretches=0).holds, "nothing was changed after it was written"
    found = audited(folder)
    assert [own.first for own in found.again if not own.fault] == [0]
    assert found.again[-1].first == 2
    [fault] = found.faults
    assert fault.startswith("computed again, ")
    assert "step 4" in fault
    assert "may be rounding" not in fault


def test_another_machine_is_said_where_the_bits_differ(run: RunFolder) -> None:
    [stretch, *_] = stretches.stretches_of(run, course(read_chain(run.ledger).entries), 3, Recipe())
    there = msgspec.structs.replace(stretch.start.machine, megdet="0.1.0, arithmetic 99", torch="1.0")
    made = stretches.Made(there, [], {0: {"model": "0" * 64}})
    fault = stretches.fault_of(stretch, made, {}, exact=False)
    assert "before the first step is not that of line 1; it may be rounding, as the machine differs: megdet" in fault
    assert f"arithmetic {ARITHMETIC} there, 0.1.0, arithmetic 99 here, torch {torch.__version__} there" in fault


def test_a_chain_made_anew_holds_unless_the_head_was_published(run: RunFolder) -> None:
    """What a ledger cannot prove: somebody may write all of it again."""
    published = read_chain(run.ledger).head
    entries = [
        msgspec.structs.replace(entry, epoch=entry.epoch + 1) if isinstance(entry, Steps) else entry
        for entry in read_chain(run.ledger).entries
    ]
    run.ledger.write_bytes(written(entries)[0])
    assert audited(run, stretches=0).holds
    found = audited(run, head=published)
    assert not found.holds
    assert f"no line of {run.ledger} has the hash '{published[:12]}" in found.faults[0]


def test_a_run_that_went_on_after_a_kill_holds_by_what_counts(recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    train(recipe, folder, OPTIONS, ALONE)
    published = read_chain(folder.ledger).head
    shutil.rmtree(checkpoint_path(folder, 5))  # as if it was killed before
    shutil.rmtree(checkpoint_path(folder, 4))
    train(recipe, folder, OPTIONS, ALONE)
    with folder.ledger.open("ab") as file:
        file.write(b'{"kind":"st')
    found = audited(folder, stretches=9, head=published)
    assert found.holds, found.faults
    assert found.notes[0].startswith("the run was started 2 times; ")
    assert "half a line follows the last one" in found.notes[1]
    assert [own.first for own in found.again] == [0, 2, 4]


def test_what_cannot_be_computed_again_is_said_with_what_to_set(run: RunFolder, recipe: Recipe) -> None:
    for step in (2, 4):
        shutil.rmtree(checkpoint_path(run, step))
    gone = replace(recipe, start_from=str(run.path / "gone"))
    counted = course(read_chain(run.ledger).entries)
    assert stretches.stretches_of(run, counted, 3, gone) == []
    [from_the_start] = stretches.stretches_of(run, counted, 3, recipe)
    assert from_the_start.first == 0
    nothing = Audit("runs/a", 1, lines=4)
    assert not nothing.holds
    assert "no stretch can be computed again: set keep_checkpoints or keep_every_epochs" in nothing.sentence


def test_a_run_that_ended_before_its_images_were_known_is_noted(run: RunFolder) -> None:
    entries = [entry for entry in read_chain(run.ledger).entries if not isinstance(entry, Images)]
    run.ledger.write_bytes(written(entries)[0])
    found = audited(run, stretches=0)
    assert found.holds
    assert found.notes == (
        "the run ended before it knew the content of all images: only those computed again are checked",
    )


def test_other_detections_are_noted(run: RunFolder) -> None:
    assert audited(run, stretches=0).notes == ()
    run.detections.write_text("[]")
    found = audited(run, stretches=0)
    assert found.holds, "megdet evaluate may have written them"
    assert found.notes[0].startswith("detections.json is not what the training found after step 5; ")
    numbers = json.loads(run.evaluation.read_text())
    numbers["bbox"]["AP"] = 0.99
    run.evaluation.write_text(json.dumps(numbers))
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "evaluation": {"bbox": {"AP": 0.99}}, "seconds": 1.0}\n')
    found = audited(run, stretches=0)
    assert found.notes[0].startswith("metrics.jsonl has evaluations that are in no line (step 3)")
    assert found.notes[1].startswith("evaluation.json is not what the training found after step 5; ")


def test_a_run_killed_between_an_evaluation_and_its_mark_and_again_in_the_next_start_is_not_accused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start takes the evaluation out of metrics.jsonl, to make it again."""
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, every_epochs=1))
    folder, evaluated = RunFolder(tmp_path / "run"), run_module.Run.evaluated

    def dying(run: run_module.Run, step: int, numbers: Any, then: Any) -> None:
        if step == 4:
            assert run.writer is not None
            run.writer.wait()  # what was queued before is on the disk
            raise KeyboardInterrupt
        evaluated(run, step, numbers, then)

    def dying_at_once(*_: Any) -> None:
        raise KeyboardInterrupt

    for owner, name, dies in ((run_module.Run, "evaluated", dying), (Evaluations, "_evaluate", dying_at_once)):
        with monkeypatch.context() as patches:
            patches.setattr(owner, name, dies)
            with pytest.raises(KeyboardInterrupt):
                train(recipe, folder, OPTIONS, ALONE)
    assert [line["step"] for line in read_metrics(folder.metrics) if "evaluation" in line] == [2]
    assert audited(folder, stretches=0).faults == ()
    train(recipe, folder, OPTIONS, ALONE)
    found = audited(folder, stretches=0)
    assert (found.faults, [note for note in found.notes if "in no line" in note]) == ((), [])
    lose_score(folder)
    assert not audited(folder, stretches=0).holds, "an evaluation cannot be taken out unnoticed"


def test_a_run_that_would_not_begin_today_is_resumed_computed_again_and_replayed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions trained a bn_size that no batch norm uses, and anchors without area."""
    norms = {name: "group" for name, norm in recipe.model.norms.items() if norm == "batch" and name != "backbone"}
    model = replace(recipe.model, **{name: replace(getattr(recipe.model, name), norm=n) for name, n in norms.items()})
    backbone = replace(model.backbone, frozen_stages=5)
    anchors = replace(model.anchors, ratios=(0.01, 0.5, 1.0), whole_pixels=True)
    flat, frozen = (
        replace(recipe, model=own) for own in (replace(model, anchors=anchors), replace(model, backbone=backbone))
    )
    folder = RunFolder(tmp_path / "run")
    for own, why in (
        (flat, "would have no area in whole pixels"),
        (frozen, "no batch norm of this detector is trained"),
    ):
        with pytest.raises(InputError, match=why):
            train(own, folder, OPTIONS, ALONE)
    old = replace(recipe, model=replace(model, anchors=anchors, backbone=backbone))
    with monkeypatch.context() as patches:
        patches.setattr(run_module, "check_new_recipe", lambda _: None)
        patches.setattr("megdet.training.trainer.has_statistics", lambda _: True)
        train(old, folder, OPTIONS, ALONE)
    for step in (4, 5):
        shutil.rmtree(checkpoint_path(folder, step))
    train(old, folder, OPTIONS, ALONE)
    found = audited(folder)
    assert found.holds, found.faults
    assert 0 in {own.first for own in found.again}
    assert replay_module.replay(replay_module.Request(folder.path, 1, tmp_path / "replay"), ALONE).started_from == 0


def test_a_run_without_a_ledger_is_refused(run: RunFolder) -> None:
    run.ledger.unlink()
    with pytest.raises(InputError, match=r"has no ledger\.jsonl: it was trained with ledger_steps 0, or by an older"):
        audited(run)


def test_the_verb_prints_the_verdict_and_its_exit_code_tells(run: RunFolder, capfd: Any) -> None:
    words = ["audit", str(run.path), "--stretches", "1", "--seed", "3", "--workers", "0", "--steps", "1"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["holds"], found["seed"], len(found["computed"])) == (True, 3, 1)
    assert found["head"] == read_chain(run.ledger).head
    change_weight(run)
    with pytest.raises(SystemExit, match="1"):
        main(words)
    said = " ".join(capfd.readouterr().out.split())
    assert "verdict does not hold: " in said
    assert "step_00000004: model is not what line" in said


def _train_rank(world: World, recipe: Recipe, folder: Path) -> None:
    train(recipe, RunFolder(folder), OPTIONS, world)


@pytest.mark.distributed
@pytest.mark.parametrize("count", [2, 3])
def test_a_run_on_several_ranks_is_computed_again_on_as_many_and_not_on_one(
    recipe: Recipe, tmp_path: Path, count: int
) -> None:
    folder = RunFolder(tmp_path / "run")
    run_in_ranks(_train_rank, count, replace(recipe, batch_size=2 * count, bn_size=2), folder.path)
    with pytest.raises(InputError, match=rf"were computed on {count} device\(s\), not on 1: without exact: true"):
        audited(folder, devices=1)
    found = audited(folder, stretches=1)
    assert found.holds, found.faults
    assert found.again[0].devices == count
    under_torchrun = run_in_ranks(_audit_rank, count, folder.path)
    assert [own.holds for own in under_torchrun] == [True] * count


@pytest.mark.distributed
def test_an_exact_run_on_one_device_is_computed_again_on_two(recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    train(replace(recipe, exact=True), folder, OPTIONS, ALONE)
    found = audited(folder, devices=2)
    assert found.holds, found.faults
    assert [(own.first, own.last, own.devices) for own in found.again] == [(0, 3, 2), (2, 5, 2), (4, 5, 2)]


def _audit_rank(world: World, folder: Path) -> Audit:
    return audit(Request(folder, seed=2, stretches=1), world)
