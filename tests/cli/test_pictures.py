"""What detect writes of its pictures, with a detector that finds one thing in each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_factories import save_image
from megdet.cli.pictures import draw_files
from megdet.detections import Detections
from megdet.files import read_json

Names = Callable[..., list[tuple[str, int]]]


def find_one(file: Path) -> Detections:
    """A box whose height in pixels is the length of the folder's name."""
    boxes = np.array([[1, 1, 5, 1 + len(file.parent.name)]], float)
    return Detections(boxes, np.ones(1), np.zeros(1, np.int64), ("nut",), (1,), (30, 40), None, str(file))


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    """The image ids of some files after detecting, with the height of each box."""
    monkeypatch.chdir(tmp_path)

    def detect(*files: str) -> list[tuple[str, int]]:
        for file in files:
            save_image(Path(file), 40, 30)
        told: list[Any] = []
        draw_files([Path(file) for file in files], find_one, Path("out"), 0.5, told.append)
        rows = read_json(Path("out/detections.json"))
        assert rows == [row for picture in told[0]["images"] for row in picture["detections"]]
        return [(row["image_id"], round(row["bbox"][3])) for row in rows]

    return detect


def test_pictures_of_one_name_in_several_folders_have_ids_of_their_own(names: Names) -> None:
    found = names("same/a/x.png", "same/bb/x.png", "same/bb/y.png")
    assert found == [("same/a/x.png", 1), ("same/bb/x.png", 2), ("y.png", 2)]


def test_a_picture_that_is_named_twice_keeps_its_short_name(names: Names) -> None:
    assert {name for name, _ in names("a/x.png", "a/x.png")} == {"x.png"}
