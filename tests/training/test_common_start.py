"""All ranks start from the same place: run folders and files that rank 0 alone sees, and ranks that disagree."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from megdet.architecture_parts import Backbone
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.inference.trained import load_detector
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import checkpoint_path, latest_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.training import common_start
from megdet.training import run as run_module
from megdet.training import trainer as trainers
from megdet.training.loop import train
from megdet.training.run import RunOptions
from megdet.training.trainer import digest
from run_folders import load_checkpoint, steps
from small_runs import ALONE, furthest, small_recipe, write_small_set, write_small_sets

pytestmark = pytest.mark.distributed
OPTIONS = RunOptions(workers=0)
RUN = RunFolder("run")
"""Relative: every rank has a folder of its own to stand in."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    """13 images in steps of 8, epochs end at steps 2, 4 and 5; with all kinds of state but AGVM's."""
    recipe = small_recipe(write_small_sets(tmp_path_factory.mktemp("data")))
    return replace(
        recipe,
        keep_checkpoints=5,
        noise_interval=1,
        schedule=replace(recipe.schedule, epochs=3.0),
        optimizer=replace(recipe.optimizer, ema_decay=0.9),
    )


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: Any) -> RunFolder:
    """A run of one rank that nobody stopped, with all its checkpoints."""
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    train(recipe, folder, OPTIONS, ALONE)
    assert steps(folder) == [2, 4, 5]
    return folder


def stand(folder: Path, world: World) -> None:
    """Every rank sees a disk of its own."""
    own = folder / f"rank{world.rank}"
    own.mkdir(exist_ok=True)
    os.chdir(own)


def train_apart(world: World, recipe: Recipe, folder: Path) -> None:
    stand(folder, world)
    train(recipe, RUN, OPTIONS, world)


def stopped_at(step: int, whole: RunFolder, folder: Path, rank: int) -> RunFolder:
    """The run as rank sees it that was stopped after so many steps."""
    run = RunFolder(shutil.copytree(whole.path, folder / f"rank{rank}/run"))
    for later in (later for later in steps(run) if later > step):
        shutil.rmtree(checkpoint_path(run, later))
    return run


def latest_of(run: RunFolder) -> str:
    newest = latest_checkpoint(run)
    assert newest is not None
    return newest.name


def state_after(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    tensors, _ = load_checkpoint(checkpoint_path(folder, step))
    return {f"{kind}.{name}": tensor for kind, own in tensors.items() for name, tensor in own.items()}


def test_a_run_folder_that_rank_0_alone_sees_goes_on(recipe: Recipe, whole: RunFolder, tmp_path: Path) -> None:
    run = stopped_at(4, whole, tmp_path, rank=0)
    run_in_ranks(train_apart, 2, recipe, tmp_path)
    worst, where = furthest(state_after(whole, 5), state_after(run, 5))
    assert worst < 1e-9, where
    assert not (tmp_path / "rank1/run").exists()


def test_a_rank_that_sees_an_older_checkpoint_trains_from_that_of_rank_0(
    recipe: Recipe, whole: RunFolder, tmp_path: Path
) -> None:
    run, other = stopped_at(4, whole, tmp_path, rank=0), stopped_at(2, whole, tmp_path, rank=1)
    run_in_ranks(train_apart, 2, recipe, tmp_path)
    worst, where = furthest(state_after(whole, 5), state_after(run, 5))
    assert worst < 1e-9, where
    assert steps(other) == [2]


def test_a_missed_evaluation_is_of_the_checkpoint_of_rank_0(recipe: Recipe, whole: RunFolder, tmp_path: Path) -> None:
    run = stopped_at(4, whole, tmp_path, rank=0)
    file = checkpoint_path(run, 2) / "state.json"
    content = json.loads(file.read_text())
    assert content["state"]["evaluated_step"] == 2
    content["state"]["evaluated_step"], content["check"] = -1, ""
    file.write_text(json.dumps(content))
    run_in_ranks(train_apart, 2, recipe, tmp_path)
    assert json.loads(file.read_text())["state"]["evaluated_step"] == 2


@pytest.mark.parametrize("first", [None, 2])
def test_a_rank_that_sees_a_newer_checkpoint_than_rank_0_is_named_and_refused(
    recipe: Recipe, whole: RunFolder, tmp_path: Path, first: int | None
) -> None:
    own = "none"
    if first is not None:
        own = latest_of(stopped_at(first, whole, tmp_path, rank=0))
    stopped_at(4, whole, tmp_path, rank=1)
    with pytest.raises(
        InputError,
        match=rf"newest checkpoint in run is {own} on rank 0 \(host .*\), step_00000004 on rank 1 \(host .*delete what",
    ):
        run_in_ranks(train_apart, 2, recipe, tmp_path)


def load_apart(world: World, folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    stand(folder, world)
    trained = load_detector(RUN, world.device, world=world)
    return trained.step, trained.model.state_dict()


def test_a_detector_is_loaded_by_rank_0_for_all(whole: RunFolder, tmp_path: Path) -> None:
    stopped_at(4, whole, tmp_path, rank=0)
    stopped_at(2, whole, tmp_path, rank=1)
    (first, ours), (second, theirs) = run_in_ranks(load_apart, 2, tmp_path)
    assert first == second == 4
    assert digest(ours) == digest(theirs)
    averages = load_checkpoint(checkpoint_path(whole, 4))[0]["averages"]
    assert all(torch.equal(tensor, averages[name]) for name, tensor in ours.items())


def train_another_recipe(world: World, recipe: Recipe, folder: Path) -> None:
    rate = 0.01 if world.rank == 2 else 0.02
    changed = replace(recipe, optimizer=replace(recipe.optimizer, base_lr=rate))
    with pytest.raises(
        InputError,
        match=r"optimizer\.base_lr is 0\.02 on ranks 0, 1 \(host .*\), 0\.01 on rank 2 \(host .*same command",
    ):
        train(changed, RunFolder(folder), OPTIONS, world)


def test_another_recipe_on_one_rank_is_refused_by_all(recipe: Recipe, tmp_path: Path) -> None:
    run_in_ranks(train_another_recipe, 3, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def train_other_data(world: World, recipe: Recipe, folder: Path, split: str) -> None:
    if world.rank == 1:
        own = small_recipe(folder / "other").data
        moved = {f"{split}_{kind}": getattr(own, f"{split}_{kind}") for kind in ("annotations", "images")}
        recipe = replace(recipe, data=replace(recipe.data, **moved))
    world = replace(world, local_rank=0)  # each is the first of its host, which reads for itself
    with pytest.raises(InputError, match=r"fingerprint of the \w+ data is \w+\.\.\. on rank 0 \(host .* on rank 1 \("):
        train(recipe, RunFolder(folder / "run"), OPTIONS, world)


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_data_on_one_rank_are_refused_by_all(recipe: Recipe, tmp_path: Path, split: str) -> None:
    write_small_set(tmp_path / "other", split, {"train": 13, "val": 5}[split], seed=9)
    run_in_ranks(train_other_data, 2, recipe, tmp_path, split)
    assert not (tmp_path / "run").exists()


def train_from_other_bits(world: World, recipe: Recipe, folder: Path) -> None:
    """Rank 1 draws weights that differ, as a processor with other vector units does."""
    stand(folder, world)
    detector = trainers.make_detector

    def other(*arguments: Any) -> Any:
        model = detector(*arguments)
        for parameter in model.parameters():
            parameter.data *= 1 + 5e-7
        return model

    if world.rank == 1:
        trainers.make_detector = other
    train(recipe, RUN, OPTIONS, world)


def test_first_weights_are_those_of_rank_0(recipe: Recipe, whole: RunFolder, tmp_path: Path) -> None:
    run_in_ranks(train_from_other_bits, 2, recipe, tmp_path)
    worst, where = furthest(state_after(whole, 5), state_after(RunFolder(tmp_path / "rank0/run"), 5))
    assert worst < 1e-9, where


def train_with_a_changed_bit(world: World, recipe: Recipe, folder: Path, kind: str) -> None:
    compare = run_module.compare_states

    def changed(trainer: Any, step: int, world: World) -> None:
        if world.rank == 1:
            tensor = next(iter(trainer.state()[kind].values()))  # type: ignore[index]
            tensor[(0,) * tensor.dim()] += 1e-12
        compare(trainer, step, world)

    run_module.compare_states = changed
    with pytest.raises(InputError, match=rf"the digest of {kind} is .* on rank 0 .* on rank 1 "):
        train(recipe, RunFolder(folder), OPTIONS, world)


@pytest.mark.parametrize("kind", ["optimizer", "averages", "noise"])
def test_one_number_that_differs_in_the_state_of_a_rank_is_noticed_before_the_first_step(
    recipe: Recipe, whole: RunFolder, tmp_path: Path, kind: str
) -> None:
    run = stopped_at(4, whole, tmp_path, rank=0)
    run_in_ranks(train_with_a_changed_bit, 2, recipe, run.path, kind)
    assert steps(run) == [2, 4]


def test_files_that_a_run_starts_from_are_read_by_rank_0_alone(
    recipe: Recipe, whole: RunFolder, tmp_path: Path
) -> None:
    short = replace(
        recipe,
        schedule=replace(recipe.schedule, epochs=1.0),
        model=replace(recipe.model, backbone=Backbone(name="test_resnet", weights="weights.pth")),
        start_from="source",
    )
    shutil.copytree(whole.path, tmp_path / "rank0/source")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "rank0/weights.pth")
    run_in_ranks(train_apart, 2, short, tmp_path)
    run = RunFolder(tmp_path / "rank0/run")
    assert latest_checkpoint(run) == checkpoint_path(run, 2)
    (tmp_path / "rank0/weights.pth").unlink()
    shutil.rmtree(run.path)
    with pytest.raises(InputError, match=r"backbone\.weights weights\.pth: no such file"):
        run_in_ranks(train_apart, 2, short, tmp_path)


def test_a_run_of_another_recipe_is_refused_where_rank_0_alone_sees_it(
    recipe: Recipe, whole: RunFolder, tmp_path: Path
) -> None:
    stopped_at(4, whole, tmp_path, rank=0)
    other = replace(recipe, optimizer=replace(recipe.optimizer, momentum=0.8))
    with pytest.raises(InputError, match=r"another recipe \(optimizer\.momentum: 0\.8 here, 0\.9 there\)"):
        run_in_ranks(train_apart, 2, other, tmp_path)


def test_many_ranks_are_told_in_a_short_line() -> None:
    class Many(World):
        def gather_objects(self, _: Any) -> list[Any]:
            return [(f"node{rank // 8}.cluster.example.org", {"the step": rank % 9}) for rank in range(128)]

    with pytest.raises(InputError, match=r"the step is 0 on ranks 0, 9, 18, .* and 6 other values: mend") as refused:
        common_start._compare({"the step": 0}, "mend", Many(0, 128, torch.device("cpu")))
    assert len(str(refused.value)) < 600
