"""A run whose images are lost while it goes on: replaced alike on every layout, counted, listed, bounded."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megdet.data.coco import training_set
from megdet.data.loader import LoadingFaults
from megdet.data.unreadable import Replaced
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.model.choice import mask_use
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import latest_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.training.loop import train
from megdet.training.run import RunOptions
from megdet.training.step_log import StepLog
from run_folders import load_checkpoint
from small_runs import ALONE, furthest, three_epochs

OPTIONS = RunOptions(workers=0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    """One image of 13 is lost after the headers were read."""
    recipe = three_epochs(tmp_path_factory.mktemp("data"))
    recipe = replace(recipe, data=replace(recipe.data, unreadable="replace"), checkpoint_steps=1, keep_checkpoints=9)
    training_set(recipe.data, masks=mask_use(recipe.model))
    (Path(recipe.data.train_images) / "5.png").unlink()
    return recipe


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: Any) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    train(recipe, folder, OPTIONS, ALONE)
    return folder


def end_of(folder: RunFolder) -> dict[str, torch.Tensor]:
    found = latest_checkpoint(folder)
    assert found is not None
    return {f"{kind}.{name}": t for kind, tensors in load_checkpoint(found)[0].items() for name, t in tensors.items()}


def listed(folder: RunFolder) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(folder.replaced_images.read_text())
    return rows


def train_in_ranks(world: World, recipe: Recipe, folder: Path) -> None:
    train(recipe, RunFolder(folder), OPTIONS, world)


def test_a_lost_image_is_counted_in_the_metrics_and_listed_once(recipe, whole):
    (row,) = listed(whole)
    assert (row["image_id"], row["file"], row["times"]) == (115, "5.png", 3)
    assert "no such image file" in row["reason"]
    lines = [line for line in read_metrics(whole.metrics) if "replaced" in line]
    assert sum(len(line["replaced"]) for line in lines) == 3
    assert all({"image_id", "file", "by", "reason"} == own.keys() for line in lines for own in line["replaced"])


@pytest.mark.distributed
def test_two_ranks_replace_the_image_as_one_does(recipe, whole, tmp_path):
    run_in_ranks(train_in_ranks, 2, recipe, tmp_path / "run")
    other = RunFolder(tmp_path / "run")
    assert listed(other) == listed(whole)
    assert furthest(end_of(whole), end_of(other))[0] < 1e-9


def test_a_run_that_goes_on_without_the_image_ends_where_one_without_a_stop_does(recipe, whole, tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    add, calls = StepLog.add, itertools.count()

    def interrupted(self, result, **options):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return add(self, result, **options)

    with mock.patch("megdet.training.loop.StepLog.add", interrupted), pytest.raises(KeyboardInterrupt):
        train(recipe, folder, OPTIONS, ALONE)
    train(recipe, folder, OPTIONS, ALONE)
    ours, theirs = end_of(whole), end_of(folder)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert listed(folder) == listed(whole)
    said = " ".join(capsys.readouterr().err.split())
    assert "images that could not be read and were replaced: 1 (5.png)" in said


def test_more_lost_images_than_the_recipe_allows_stop_the_run_with_their_list(recipe, tmp_path):
    folder = RunFolder(tmp_path / "run")
    two = LoadingFaults([Replaced(0, 1, 2, "lost"), Replaced(0, 3, 4, "lost")])
    with (
        mock.patch.object(LoadingFaults, "take", return_value=two),
        pytest.raises(InputError, match=r"2 images of .* could not be read, more than data\.most_replaced 0\.01"),
    ):
        train(recipe, folder, OPTIONS, ALONE)
    assert [row["times"] for row in listed(folder)] == [1, 1]
