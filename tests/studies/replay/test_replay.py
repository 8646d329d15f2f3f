"""A step of a run is made again, looked at, and compared with what the run wrote of it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from divergence import diverge_at
from megdet.cli.main import main
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.drawing import enlargement
from megdet.errors import InputError
from megdet.recipe import Recipe, Watch
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.studies.replay import replay as replay_module
from megdet.studies.replay.replay import Replay, Request, replay
from megdet.training import run as run_module
from megdet.training.loop import train
from megdet.training.run import RunOptions, open_run
from megdet.training.schedule import learning_rate
from small_runs import ALONE, three_epochs

OPTIONS = RunOptions(workers=0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """13 images in steps of 8, float64, 5 steps; the gradient is clipped."""
    recipe = three_epochs(tmp_path_factory.mktemp("data"), clip_norm=0.5)
    checkpoints = {"checkpoint_steps": 2, "checkpoint_epochs": 100, "keep_checkpoints": 5}
    return replace(recipe, **checkpoints, evaluation=replace(recipe.evaluation, every_epochs=0))


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Checkpoints after steps 2, 4 and 5."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "a")
    train(recipe, folder, OPTIONS, ALONE)
    return folder


def look(run: RunFolder, step: int, **asked: Any) -> Replay:
    return replay(Request(run.path, step, run.path / "replay", **asked), ALONE)


def line(run: RunFolder, step: int) -> dict[str, Any]:
    return next(own for own in read_metrics(run.metrics) if own["step"] == step and "loss" in own)


@pytest.mark.parametrize(("step", "start"), [(2, 0), (4, 2), (5, 4)])
def test_a_step_made_again_is_to_the_bit_what_the_run_wrote(
    run: RunFolder, recipe: Recipe, step: int, start: int
) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and "replay" not in path.parts}
    found = look(run, step)
    assert found.started_from == start
    assert [own.step for own in found.comparison.steps] == list(range(start + 1, step + 1))
    assert {own.difference for own in found.comparison.steps} == {0.0}
    there = line(run, step)
    assert {name: there[name] for name in found.numbers if name != "step"} == {
        name: value for name, value in found.numbers.items() if name != "step"
    }
    assert (found.rate, found.not_finite, found.wrong_gradients) == (there["learning_rate"], None, [])
    assert len(found.images) == 8
    assert sum(own.loss for own in found.images) / 8 == pytest.approx(there["loss"], rel=1e-12)
    for name in found.images[0].losses:
        assert sum(own.losses[name] for own in found.images) / 8 == pytest.approx(there[name], rel=1e-12)
    whole = math.sqrt(sum(norm**2 for norm in found.norms.values()))
    assert whole == pytest.approx(there["gradient_norm"], rel=1e-5), "before clipping"
    with open_run(recipe, ALONE, OPTIONS) as opened:
        ids = [opened.datasets.train.image_ids[i.index] for group in opened.plan.groups(step - 1) for i in group.images]
    assert [own.image_id for own in found.images] == ids
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and "replay" not in path.parts}
    assert after == before


@pytest.mark.distributed
def test_a_step_made_again_on_two_ranks_agrees(run: RunFolder) -> None:
    one, two = look(run, 4), replay(Request(run.path, 4, run.path / "replay"), None, devices=2)
    assert two.devices == 2
    assert two.comparison.first_wrong is None
    assert [own.image_id for own in two.images] == [own.image_id for own in one.images]
    assert [own.loss for own in two.images] == pytest.approx([own.loss for own in one.images], rel=1e-9)
    assert sorted(two.pictures) == sorted(one.pictures)


def train_with_a_flipped_bit(world: World, recipe: Recipe, folder: Path, step: int) -> None:
    """Rank 1 flips a bit of one of its weights before a step, as a broken memory does."""
    make = run_module.train_step

    def stepping(*arguments: Any) -> Any:
        if world.rank == 1 and arguments[4] + 1 == step:
            weight = arguments[0].model.get_parameter("fpn.lateral.0.0.weight").data
            weight.view(-1).view(torch.int64)[3] ^= 1 << 51
        return make(*arguments)

    pytest.MonkeyPatch().setattr(run_module, "train_step", stepping)
    train(recipe, RunFolder(folder), OPTIONS, world)


@pytest.mark.distributed
def test_a_rank_with_a_flipped_bit_in_a_weight_is_found(recipe: Recipe, tmp_path: Path) -> None:
    broken = RunFolder(tmp_path / "run")
    run_in_ranks(train_with_a_flipped_bit, 2, recipe, broken.path, 4)
    found = replay(Request(broken.path, 4, tmp_path / "out"), None, devices=2)
    wrong = found.comparison.first_wrong
    assert wrong is not None
    assert (found.started_from, wrong.step) == (2, 4)
    assert found.comparison.steps[0].difference < 1e-9, "step 3 was computed well"
    assert wrong.difference > 1e-6
    sentence = found.comparison.sentence()
    assert sentence.startswith("step 4 differs: ")
    assert "the steps before it agree, so it was computed wrongly by a machine" in sentence


def test_without_an_image_only_its_group_changes(run: RunFolder) -> None:
    whole = look(run, 4)
    groups_of: dict[int | str, set[int]] = {}  # an epoch ends in this step, so some images are in it twice
    for own in whole.images:
        groups_of.setdefault(own.image_id, set()).add(own.place[0])
    left = next(image_id for image_id, groups in groups_of.items() if len(groups) == 1)
    found = look(run, 4, without=str(left))
    assert [own.place for own in found.images] == [own.place for own in whole.images if own.image_id != left]
    before = {own.place: own for own in whole.images}
    for own in found.images:
        is_same = own.losses == before[own.place].losses
        assert is_same == (own.place[0] not in groups_of[left]), "batch statistics are a group's"
    assert found.numbers["loss"] == pytest.approx(sum(own.loss for own in found.images) / 8)
    assert [own.step for own in found.comparison.steps] == [3], "step 4 is another one"


def test_the_first_layer_that_is_not_finite_is_named_with_its_image(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, seen = run_module.make_trainer, look(run, 3)
    victim = seen.images[5]

    def broken(*arguments: Any, **options: Any) -> Any:
        trainer = make(*arguments, **options)

        def overflow(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            row = victim.place[1]
            return output if len(calls) != 1 + victim.place[0] else output * _only(len(output), row, math.inf)

        trainer.model.get_submodule("fpn.lateral.1").register_forward_hook(overflow)
        return trainer

    calls: list[int] = []
    monkeypatch.setattr(run_module, "make_trainer", broken)
    found = look(run, 3)
    assert found.not_finite is not None
    assert (found.not_finite.group, found.not_finite.layer) == (victim.place[0], "fpn.lateral.1")
    assert found.not_finite.image_ids == (victim.image_id,)
    assert "not finite" in found.numbers["left_out"]
    assert found.wrong_gradients
    wrong = found.comparison.first_wrong
    assert wrong is not None
    assert wrong.difference == math.inf


def _only(rows: int, row: int, factor: float) -> torch.Tensor:
    factors = torch.ones(rows, 1, 1, 1, dtype=torch.float64)
    factors[row] = factor
    return factors


def test_a_step_before_a_roll_back_can_still_be_looked_at(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = replace(recipe, watch=Watch(action="roll_back", rewarm_steps=4))
    run = RunFolder(tmp_path / "run")
    diverge_at([4], math.nan, monkeypatch)
    train(back, run, OPTIONS, ALONE)
    monkeypatch.undo()
    scheduled = learning_rate(back, 13, 3)
    went_on, failed = look(run, 4), look(run, 4, roll_backs=0)
    assert (went_on.rate, failed.rate) == (scheduled / 2, scheduled)
    assert {own.difference for own in went_on.comparison.steps} == {0.0}
    assert not failed.comparison.steps
    with pytest.raises(InputError, match="--roll-backs 2: before step 4 the run went back 1 times"):
        look(run, 4, roll_backs=2)


def test_the_command_prints_writes_and_draws(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = look(run, 4).images[0]
    words = [
        "replay",
        str(run.path),
        "--step",
        "4",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--image", str(own.image_id)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in (
        "step 4, from the checkpoint of step 2, on 1 device(s): loss",
        own.file_name,
        f"{own.loss:.5g}",
        "every layer, loss and gradient is finite",
        "steps 3 to 4 agree with metrics.jsonl: the largest relative difference is 0, allowed 1e-09",
    ):
        assert part in printed
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert pictures[0].name == f"group_0_0_image_{own.image_id}.png"
    assert all(path.name.endswith(f"_image_{own.image_id}.png") for path in pictures)
    assert (tmp_path / "out/replay.json").is_file()
    with Image.open(pictures[0]) as picture:
        factor = enlargement(80, 80)
        assert max(picture.size) in range(48 * 5, 80 * (factor + 5))
    content = run.metrics.read_text()
    wrong = content.replace(f'"loss": {line(run, 4)["loss"]!r}', '"loss": 1.0')
    assert wrong != content
    run.metrics.write_text(wrong)
    try:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--json"])
    finally:
        run.metrics.write_text(content)
    assert ended.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["agrees"], found["step"], len(found["images"])) == (False, 4, 8)
    assert found["verdict"].startswith("step 4 differs: loss is ")


@pytest.mark.parametrize(
    ("step", "asked", "message"),
    [
        (6, {}, "--step 6: the run has 5 steps"),
        (0, {}, "--step 0: steps count from 1"),
        (3, {"image": "7"}, "--image '7': no such image in step 3, which has "),
        (3, {"without": "7"}, "--without '7': no such image in step 3"),
        (3, {"overrides": {"batch_size": "4"}}, "this changes it: batch_size: 4 here, 8 there"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_one_line(
    run: RunFolder, step: int, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        look(run, step, **asked)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        look(RunFolder(tmp_path), 1)


def test_several_ranks_are_on_the_device_that_is_asked_for(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def started(*_: Any, device: str, **__: Any) -> Any:
        asked.append(device)
        raise InputError("enough")

    monkeypatch.setattr(replay_module, "run_in_ranks", started)
    for gpus, device in ((8, "cpu"), (8, None), (0, None), (8, "cuda")):
        monkeypatch.setattr(replay_module, "num_gpus", lambda gpus=gpus: gpus)
        with pytest.raises(InputError, match="enough"):
            replay(Request(run.path, 3, run.path), None, 2, device=device)
    assert asked == ["cpu", "cuda", "cpu", "cuda"]
    monkeypatch.setattr(replay_module, "num_gpus", lambda: 1)
    with pytest.raises(InputError, match=r"--device cuda --devices 2: this machine has 1 GPU"):
        replay(Request(run.path, 3, run.path), None, 2, device="cuda")
    with pytest.raises(InputError, match=r"--device gpu: choose cpu or cuda"):
        replay(Request(run.path, 3, run.path), None, 2, device="gpu")
    assert len(asked) == 4, "no rank was started"
