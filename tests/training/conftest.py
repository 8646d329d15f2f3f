"""A run of three epochs without a stop, for the tests of runs that go on."""

from typing import Any

import pytest

from megdet.evaluation.coco_numbers import Evaluation
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.training.loop import train
from megdet.training.run import RunOptions
from small_runs import ALONE, three_epochs

OPTIONS = RunOptions(workers=0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    return three_epochs(tmp_path_factory.mktemp("data"), clip_norm=5.0)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: Any) -> tuple[RunFolder, Evaluation]:
    """A run without a stop."""
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    return folder, train(recipe, folder, OPTIONS, ALONE)
