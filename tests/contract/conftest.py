"""The recipe of `megdet verify`, for tests."""

from typing import Any

import pytest

from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    """The packaged recipe, its images drawn elsewhere."""
    folder = tmp_path_factory.mktemp("data") / "verify"
    places = {
        "data.train_annotations": folder / "annotations/train.json",
        "data.train_images": folder / "train",
        "data.val_annotations": folder / "annotations/val.json",
        "data.val_images": folder / "val",
    }
    return load_recipe("verify", {key: str(path) for key, path in places.items()})
