"""A run writes its ledger: which lines, what they say, and that no end of the process breaks the chain."""

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megdet.distributed.local_ranks import RankError, run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.files import read_json
from megdet.recipe import Recipe
from megdet.recipe_file import parse_recipe
from megdet.run_folder.checkpoint_files import checkpoint_path, checkpoint_step, checkpoints
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.ledger import Images, Start, Steps, course, digest_of_images, digest_of_numbers, read_chain
from megdet.run_folder.metrics import read_metrics
from megdet.training import ledger as ledger_module
from megdet.training.datasets import fingerprint
from megdet.training.ledger import RunLedger, digests, file_digest
from megdet.training.loop import train
from megdet.training.run import RunOptions, open_run
from megdet.training.step import read_results
from megdet.training.step_log import line_of_step
from run_folders import load_checkpoint
from small_runs import ALONE, three_epochs, train_set

OPTIONS = RunOptions(workers=0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """13 images in steps of 8, 5 steps, evaluated at the end alone."""
    recipe = three_epochs(tmp_path_factory.mktemp("data"))
    return replace(recipe, checkpoint_epochs=100, evaluation=replace(recipe.evaluation, every_epochs=0))


def trained(recipe: Recipe, folder: Path, **changed: Any) -> RunFolder:
    run = RunFolder(folder)
    train(replace(recipe, **changed), run, OPTIONS, ALONE)
    return run


@pytest.fixture(scope="module")
def every_step(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A line after each step, checkpoints after 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    return trained(recipe, folder, ledger_steps=1, checkpoint_steps=2, keep_checkpoints=5)


def lines_of(run: RunFolder) -> list[Steps]:
    return [entry for entry in read_chain(run.ledger).entries if isinstance(entry, Steps)]


def test_the_first_line_binds_recipe_data_and_the_weights_of_the_start(every_step: RunFolder, recipe: Recipe) -> None:
    start = read_chain(every_step.ledger).entries[0]
    assert isinstance(start, Start)
    own = replace(recipe, ledger_steps=1, checkpoint_steps=2, keep_checkpoints=5)
    assert parse_recipe(start.recipe, "ledger") == own
    assert (start.step, start.num_images, start.data) == (0, 13, fingerprint(train_set(recipe)))
    with open_run(recipe, ALONE, OPTIONS) as run:
        assert start.state == digests(run.trainer.state())
        layout = run.layout
    machine = start.machine
    assert (machine.device, machine.devices, machine.lane_width) == ("cpu", 1, layout.lane_width)


def test_a_line_has_the_state_the_numbers_and_the_images_of_its_steps(every_step: RunFolder, recipe: Recipe) -> None:
    lines = lines_of(every_step)
    assert [(line.since, line.step) for line in lines] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    for path in checkpoints(every_step):
        [line] = [own for own in lines if own.step == checkpoint_step(path)]
        assert line.state == digests(load_checkpoint(path)[0])
    records = {line["step"]: line for line in read_metrics(every_step.metrics) if "loss" in line}
    with open_run(recipe, ALONE, OPTIONS) as run:
        ids = [[run.datasets.train.image_ids[image.index] for group in run.plan.groups(step) for image in group.images]
               for step in range(5)]  # fmt: skip
    for line in lines:
        assert line.metrics == digest_of_numbers([records[line.step]])
        assert line.images == digest_of_images([ids[line.step - 1]])
        assert line.numbers["gradient_norm"] == records[line.step]["gradient_norm"]
        assert line.epoch == pytest.approx(line.step * 8 / 13)


def test_the_content_of_every_image_is_bound(every_step: RunFolder, recipe: Recipe) -> None:
    [bound] = [entry for entry in read_chain(every_step.ledger).entries if isinstance(entry, Images)]
    assert bound.digest == file_digest(every_step.image_digests)
    found = read_json(every_step.image_digests, dict[str, str])
    assert found == {f"{i}.png": file_digest(Path(recipe.data.train_images) / f"{i}.png") for i in range(13)}


def test_without_more_there_are_lines_at_checkpoints_and_a_short_stretch_after_them(
    recipe: Recipe, tmp_path: Path
) -> None:
    run = trained(recipe, tmp_path / "run", checkpoint_steps=1000)
    assert [(line.since, line.step) for line in lines_of(run)] == [(0, 3), (3, 5)]


def test_a_checkpoint_after_a_step_that_has_its_line_writes_no_second_one(recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with open_run(recipe, ALONE, OPTIONS, folder) as run:
        ledger = RunLedger(run, folder, print)
        [result] = run.steps(0, 1)
        ledger.add(line_of_step(result, read_results([result], run.trainer)[0], run.plan))
        write = ledger.line_of(1)
        assert write is not None
        write(run.trainer.state())
        write(run.trainer.state())
        ledger.close()
    assert [(line.since, line.step) for line in lines_of(folder)] == [(0, 1)]


def test_a_run_without_a_ledger_writes_none(recipe: Recipe, tmp_path: Path) -> None:
    run = trained(recipe, tmp_path / "run", ledger_steps=0)
    assert not run.ledger.exists()
    assert not run.image_digests.exists()


def die_in_a_line(world: World, recipe: Recipe, folder: Path, step: int) -> None:
    """Train, and be killed when half of the line of a step is written."""
    append = ledger_module.append_line

    def append_half(path: Path, line: bytes, size: int) -> None:
        if b'"kind":"steps"' in line and f'"step":{step},"epoch"'.encode() in line:
            append(path, line[: len(line) // 2], size)
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, line, size)

    ledger_module.append_line = append_half
    train(recipe, RunFolder(folder), OPTIONS, world)


@pytest.mark.distributed
def test_a_run_that_is_killed_while_it_writes_a_line_goes_on_with_a_chain_that_holds(
    recipe: Recipe, every_step: RunFolder, tmp_path: Path
) -> None:
    own = replace(recipe, ledger_steps=1, checkpoint_steps=2, keep_checkpoints=5)
    with pytest.raises(RankError, match="SIGKILL"):
        run_in_ranks(die_in_a_line, 1, own, tmp_path / "run", 4)
    killed = RunFolder(tmp_path / "run")
    before = read_chain(killed.ledger)
    assert before.is_torn
    assert before.entries[-1].step == 3
    train(own, killed, OPTIONS, ALONE)
    chain = read_chain(killed.ledger)
    assert not chain.is_torn
    assert list(chain.hashes[: len(before.hashes)]) == list(before.hashes), "no line is ever taken back"
    counted = course(chain.entries)
    assert [(type(entry).__name__, entry.step) for entry in counted] == [
        *(("Start", 0), ("Steps", 1), ("Steps", 2), ("Start", 2)),
        *(("Steps", 3), ("Steps", 4), ("Steps", 5)),
    ]
    assert {entry.step: entry.state for entry in counted if isinstance(entry, Steps)} == {
        line.step: line.state for line in lines_of(every_step)
    }
    assert len([entry for entry in chain.entries if isinstance(entry, Images)]) == 1


def test_a_disk_that_refuses_a_line_leaves_no_step_out(
    recipe: Recipe, every_step: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    append, refused = ledger_module.append_line, []

    def refuse_once(path: Path, line: bytes, size: int) -> None:
        if b'"step":3,"epoch"' in line:
            refused.append(line)
            raise InputError("ledger.jsonl cannot be written: no space left")
        append(path, line, size)

    monkeypatch.setattr(ledger_module, "append_line", refuse_once)
    run = trained(recipe, tmp_path / "run", ledger_steps=1, checkpoint_steps=2, keep_checkpoints=5)
    lines = lines_of(run)
    assert refused
    assert [(line.since, line.step) for line in lines] == [(0, 1), (1, 2), (2, 4), (4, 5)]
    assert [line.state for line in lines[2:]] == [line.state for line in lines_of(every_step)[3:]]
    records = [line for line in read_metrics(run.metrics) if "loss" in line]
    assert lines[2].metrics == digest_of_numbers(records[2:4])
    assert "Warning: ledger.jsonl cannot be written: no space left; the run goes on" in capfd.readouterr().err


def test_a_ledger_that_is_broken_is_set_aside_and_said(
    recipe: Recipe, every_step: RunFolder, tmp_path: Path, capfd: Any
) -> None:
    run = trained(recipe, tmp_path / "run", checkpoint_steps=4)
    content = run.ledger.read_bytes()
    run.ledger.write_bytes(content.replace(b'"epoch":', b'"epocj":', 1))
    shutil.rmtree(checkpoint_path(run, 5))
    train(recipe, run, OPTIONS, ALONE)
    said = capfd.readouterr().err
    assert re.search(r"line \d is not what was written", said.replace("\n", " "))
    assert "a new ledger begins at step 4" in said.replace("\n", " ")
    assert run.ledger.with_name("damaged_ledger.jsonl").read_bytes() != content
    assert [entry.step for entry in course(read_chain(run.ledger).entries)] == [4, 5]


def test_an_exact_run_that_goes_on_on_another_kind_of_machine_says_so(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    own = replace(recipe, exact=True)
    run = trained(own, tmp_path / "run", checkpoint_steps=4)
    shutil.rmtree(checkpoint_path(run, 5))
    train(replace(own, checkpoint_steps=4), run, OPTIONS, ALONE)
    assert "another" not in capfd.readouterr().err
    shutil.rmtree(checkpoint_path(run, 5))
    monkeypatch.setattr(ledger_module, "processor_name", lambda: "a new one")
    train(replace(own, checkpoint_steps=4), run, OPTIONS, ALONE)
    said = " ".join(capfd.readouterr().err.split())
    assert "Warning: exact gives the same bits on machines of one kind, and the run goes on on another: " in said
    assert "processor a new one, before " in said


@pytest.mark.distributed
def test_two_ranks_write_one_ledger(recipe: Recipe, every_step: RunFolder, tmp_path: Path) -> None:
    own = replace(recipe, ledger_steps=1, checkpoint_steps=2, keep_checkpoints=5)
    run_in_ranks(_train_rank, 2, own, tmp_path / "run")
    chain = read_chain(RunFolder(tmp_path / "run").ledger)
    start = chain.entries[0]
    assert isinstance(start, Start)
    assert start.machine.devices == 2
    first = read_chain(every_step.ledger).entries[0]
    assert isinstance(first, Start)
    assert start.state == first.state, "the same weights to begin with"
    assert [entry.step for entry in course(chain.entries)] == [0, 1, 2, 3, 4, 5]
    assert [line.images for line in chain.entries if isinstance(line, Steps)] == [
        line.images for line in lines_of(every_step)
    ]


def _train_rank(world: World, recipe: Recipe, folder: Path) -> None:
    train(recipe, RunFolder(folder), OPTIONS, world)
