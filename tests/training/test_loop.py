import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megdet.cli.main import main
from megdet.data.classes import category_ids_for
from megdet.data.plan import TrainingPlan
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.files import read_json
from megdet.inference.predict import detect_dataset
from megdet.inference.trained import load_detector
from megdet.model.faster_rcnn import FasterRcnn
from megdet.recipe import Optimizer, Recipe
from megdet.recipe_file import dump_recipe, load_recipe
from megdet.run_folder.checkpoint_files import checkpoints
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.training import run as run_module
from megdet.training import step_log
from megdet.training.evaluations import evaluations as evaluations_module
from megdet.training.loop import train
from megdet.training.run import RunOptions
from megdet.training.schedule import learning_rate
from run_folders import load_checkpoint
from small_runs import ALONE, run_steps, small_recipe, state_of, val_set, write_small_set, write_small_sets

OPTIONS = RunOptions(workers=0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    return small_recipe(write_small_sets(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def done(recipe: Recipe, tmp_path_factory: Any) -> RunFolder:
    """13 images, 8 a step, 2 epochs: they end at steps 2 and 4."""
    folder = RunFolder(tmp_path_factory.mktemp("done") / "run")
    train(recipe, folder, OPTIONS, ALONE)
    return folder


@pytest.mark.parametrize("how", [shutil.rmtree, lambda path: path.rename(path.with_name("moved"))])
def test_a_run_folder_that_is_deleted_or_moved_stops_the_run_at_the_next_look(recipe, tmp_path, monkeypatch, how):
    make, folder = run_module.train_step, RunFolder(tmp_path / "run")
    done: list[int] = []

    def deleting(*arguments: Any) -> Any:
        done.append(arguments[4])
        if arguments[4] == 0:
            how(folder.path)
        return make(*arguments)

    monkeypatch.setattr(run_module, "train_step", deleting)
    monkeypatch.setattr(step_log, "READ_SECONDS", 0.0)
    with pytest.raises(InputError, match=r"run was moved or deleted while the run went on: put it back"):
        train(recipe, folder, OPTIONS, ALONE)
    assert done == [0]
    assert not folder.path.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is a file of Linux")
def test_a_disk_that_is_full_when_metrics_are_written_is_one_line(recipe, tmp_path, monkeypatch, capsys):
    make, folder = run_module.train_step, RunFolder(tmp_path / "run")

    def filling(*arguments: Any) -> Any:
        for descriptor in Path("/proc/self/fd").iterdir():
            if descriptor.is_symlink() and descriptor.readlink() == folder.metrics:
                os.dup2(os.open("/dev/full", os.O_WRONLY), int(descriptor.name))
        return make(*arguments)

    monkeypatch.setattr(run_module, "train_step", filling)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--run", str(folder.path), "--workers", "0"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        f"megdet: {folder.metrics} cannot be written: No space left on device; check its folder, its permissions and "
        "the free space"
    )


def test_the_folder_holds_the_complete_recipe(recipe, done):
    assert load_recipe(str(done.recipe)) == recipe
    assert done.recipe.read_text() == dump_recipe(recipe)


def test_every_step_and_every_epochs_evaluation_is_in_the_metrics(recipe, done):
    lines = read_metrics(done.metrics)
    kinds = [next(kind for kind in ("loss", "epoch_means", "evaluation") if kind in line) for line in lines]
    assert [(line["step"], kind) for line, kind in zip(lines, kinds, strict=True)] == [
        (1, "loss"), (2, "loss"), (2, "epoch_means"), (2, "evaluation"),
        (3, "loss"), (4, "loss"), (4, "epoch_means"), (4, "evaluation"),
    ]  # fmt: skip
    for line in lines:
        if "loss" in line:
            assert line["loss"] == pytest.approx(sum(line[name] for name in FasterRcnn.loss_names))
            assert line["learning_rate"] == learning_rate(recipe, 13, line["step"] - 1)
            assert line["epoch"] == pytest.approx(line["step"] * 8 / 13, abs=1e-6)
            assert line["gradient_norm"] > 0


def test_the_loop_takes_the_steps_of_the_plan_and_no_others(recipe, done):
    # the same steps without the loop, its evaluations and its checkpoints
    trainer, reported = run_steps(recipe, 4, counts_all=False)
    saved, _ = load_checkpoint(checkpoints(done)[-1])
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, saved["model"][name]), name
    momentum = {name: t for name, t in state_of(trainer).items() if name.startswith("momentum.")}
    assert momentum.keys() == {f"momentum.{name}" for name in saved["optimizer"]}
    assert all(torch.equal(tensor, saved["optimizer"][name[9:]]) for name, tensor in momentum.items())
    losses = [line["gradient_norm"] for line in read_metrics(done.metrics) if "loss" in line]
    assert losses == [float(values[-1]) for values in reported]


def test_what_agvm_and_the_noise_scale_measure_is_in_the_lines_of_their_steps(recipe, tmp_path):
    recipe = replace(
        recipe,
        noise_interval=2,
        optimizer=replace(recipe.optimizer, agvm=True),
        schedule=replace(recipe.schedule, warmup_steps=1),
        evaluation=replace(recipe.evaluation, every_epochs=0),
    )
    folder = RunFolder(tmp_path / "run")
    train(recipe, folder, OPTIONS, ALONE)
    lines = {line["step"]: line for line in read_metrics(folder.metrics) if "loss" in line}
    assert [step for step, line in lines.items() if "noise" in line] == [2, 4]
    assert [step for step, line in lines.items() if "agvm" in line] == [2]
    modules = ["backbone", "fpn", "rpn", "box_head"]
    factors = {module: numbers["rate_factor"] for module, numbers in lines[2]["agvm"].items()}
    assert list(factors) == modules
    assert factors["backbone"] == 1
    assert all(0.97 + 0.03 * 0.5**0.5 <= factor <= 0.97 + 0.03 * 10**0.5 for factor in factors.values())
    noise = lines[4]["noise"]
    assert noise.pop("estimator") == "halves"
    assert noise.pop("measurements") == 2
    assert list(noise) == [*modules, "model"]
    for number in ("gradient_sq", "variance"):
        assert noise["model"][number] == pytest.approx(sum(noise[module][number] for module in modules))
    assert all(numbers["variance"] > 0 for numbers in noise.values())


def test_the_evaluation_left_behind_is_that_of_the_last_checkpoint(recipe, done):
    trained = load_detector(done, ALONE.device)
    assert trained.step == 4
    dataset = val_set(recipe)
    ids = category_ids_for(trained.class_names, dataset)
    results = detect_dataset(trained.model, trained.recipe, dataset, ids, ALONE, workers=0)
    assert read_json(done.detections) == results
    assert len(results) > 10
    assert read_json(done.evaluation)["bbox"]["AP"] == read_metrics(done.metrics)[-1]["evaluation"]["bbox"]["AP"]


def test_averages_are_evaluated_and_the_weights_are_trained_on(recipe, tmp_path):
    averaged = replace(recipe, optimizer=Optimizer(ema_decay=0.5), schedule=replace(recipe.schedule, epochs=1.0))
    folder = RunFolder(tmp_path / "run")
    train(averaged, folder, OPTIONS, ALONE)
    tensors, _ = load_checkpoint(checkpoints(folder)[-1])
    trained = load_detector(folder, ALONE.device)
    name = "rpn.conv.weight"
    assert torch.equal(trained.model.state_dict()[name], tensors["averages"][name])
    assert not torch.equal(tensors["model"][name], tensors["averages"][name])
    ids = category_ids_for(trained.class_names, val_set(recipe))
    assert read_json(folder.detections) == detect_dataset(
        trained.model, trained.recipe, val_set(recipe), ids, ALONE, workers=0
    )


def test_epochs_between_evaluations_and_checkpoints_are_the_recipes(recipe, tmp_path):
    rare = replace(
        recipe,
        schedule=replace(recipe.schedule, epochs=4.5),
        evaluation=replace(recipe.evaluation, every_epochs=3),
        checkpoint_epochs=2,
        keep_checkpoints=1,
        keep_best=False,
        keep_every_epochs=2,
    )
    folder = RunFolder(tmp_path / "run")
    train(rare, folder, OPTIONS, ALONE)
    plan = TrainingPlan(torch.full((13, 2), 64).numpy(), rare)
    ends = [plan.epoch_end(epoch) for epoch in (2, 3, 4, 4.5)]
    assert ends == [4, 5, 7, 8]
    assert [path.name for path in checkpoints(folder)] == [f"step_0000000{step}" for step in (4, 7, 8)]
    assert [line["step"] for line in read_metrics(folder.metrics) if "evaluation" in line] == [5, 8]


def test_a_best_checkpoint_that_is_surpassed_is_deleted(recipe, tmp_path, monkeypatch):
    scores, own = iter((0.3, 0.1, 0.5)), evaluations_module.evaluate_detections

    def scored(*arguments, **options):
        numbers = own(*arguments, **options)
        return replace(numbers, bbox=replace(numbers.bbox, AP=next(scores)))

    monkeypatch.setattr(evaluations_module, "evaluate_detections", scored)
    few = replace(
        recipe,
        keep_checkpoints=1,
        evaluation=replace(recipe.evaluation, every_epochs=1),
        schedule=replace(recipe.schedule, epochs=3.0),
    )
    folder = RunFolder(tmp_path / "run")
    train(few, folder, OPTIONS, ALONE)
    assert next(scores, None) is None
    assert [path.name for path in checkpoints(folder)] == ["step_00000005"]


def test_a_run_that_diverges_stops_with_one_line_and_keeps_its_last_checkpoint(recipe, tmp_path):
    wild = replace(
        recipe,
        precision="float32",
        optimizer=Optimizer(base_lr=1e30),
        schedule=replace(recipe.schedule, warmup_start=0.0, warmup_steps=3, epochs=4.0),
    )
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"step \d: \w+ is not finite: the run failed .*: lower optimizer.base_lr"
    ) as e:
        train(wild, folder, OPTIONS, ALONE)
    assert "\n" not in str(e.value)
    steps = [line["step"] for line in read_metrics(folder.metrics) if "loss" in line]
    assert str(e.value).startswith(f"step {steps[-1] + 1}:")
    for path in checkpoints(folder):
        tensors, _ = load_checkpoint(path)
        assert int(path.name[-1]) <= steps[-1]
        assert all(t.isfinite().all() for t in tensors["model"].values() if steps[-1] > int(path.name[-1]))


def test_more_ranks_than_images_and_too_few_images_are_refused_before_the_folder_is_made(recipe, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match="9 devices for a mini-batch of 8 images"):
        train(recipe, folder, OPTIONS, World(0, 9, torch.device("cpu")))
    with pytest.raises(InputError, match="13 images to train on are not enough for one mini-batch of 16"):
        train(replace(recipe, batch_size=16), folder, OPTIONS, ALONE)
    with pytest.raises(InputError, match="more than 3"):
        train(recipe, folder, RunOptions(max_images_per_device=3), ALONE)
    assert not folder.path.exists()


def test_a_damaged_image_stops_the_run_with_its_name(tmp_path):
    write_small_set(tmp_path, "train", 8)
    write_small_set(tmp_path, "val", 2, seed=1)
    file = tmp_path / "train" / "3.png"
    file.write_bytes(file.read_bytes()[:300])
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"3\.png: cannot be read"):
            train(small_recipe(tmp_path), RunFolder(tmp_path / "run"), RunOptions(workers=workers), ALONE)


def detect_again(world: World, folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    trained = load_detector(RunFolder(folder), world.device)
    dataset = val_set(recipe)
    ids = category_ids_for(trained.class_names, dataset)
    return detect_dataset(trained.model, trained.recipe, dataset, ids, world, workers=world.rank)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_detects_the_same(recipe, done, ranks, tmp_path):
    expected = read_json(done.detections)
    for found in run_in_ranks(detect_again, ranks, done.path, recipe):  # three batches: of four ranks one idles
        assert found == expected


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_trains_with_the_same_command_as_one_process(recipe, done, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megdet",
        "--",
    ]
    words = ["train", str(done.recipe), "--run", str(tmp_path / "run"), "--workers", "1", "--device", "cpu"]
    finished = subprocess.run(
        [*command, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (done.path, tmp_path / "run"))
    for one, other in zip(ours, theirs, strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-9)
