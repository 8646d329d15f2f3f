"""What detect writes of its pictures, with a detector that finds one thing in each."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_factories import save_image
from megdet.cli.pictures import draw_files
from megdet.detections import Detections
from megdet.errors import InputError
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
        draw_files([Path(file) for file in files], find_one, Path("out"), 0.5, told.append, is_own=False)
        rows = read_json(Path("out/detections.json"))
        assert rows == [row for picture in told[0]["images"] for row in picture["detections"]]
        return [(row["image_id"], round(row["bbox"][3])) for row in rows]

    return detect


def test_pictures_of_one_name_in_several_folders_have_ids_of_their_own(names: Names) -> None:
    found = names("same/a/x.png", "same/bb/x.png", "same/bb/y.png")
    assert found == [("same/a/x.png", 1), ("same/bb/x.png", 2), ("y.png", 2)]


def test_a_picture_that_is_named_twice_keeps_its_short_name(names: Names) -> None:
    assert {name for name, _ in names("a/x.png", "a/x.png")} == {"x.png"}


OWN_LIST = [{"image_id": "x.png", "category": "nut", "category_id": 1, "bbox": [1, 1, 4, 1], "score": 1.0}]


@pytest.mark.parametrize(
    ("content", "is_refused"), [(OWN_LIST, False), ([], False), ([{"image_id": 1}], True), ({"a": 1}, True)]
)
def test_a_list_of_somebody_else_is_not_replaced(names: Names, content: Any, is_refused: bool) -> None:
    Path("out").mkdir()
    Path("out/detections.json").write_text(json.dumps(content))
    if is_refused:
        with pytest.raises(InputError, match=r"out/detections.json would be replaced, which is not of detect: name"):
            names("a/x.png")
        assert read_json(Path("out/detections.json")) == content
    else:
        assert names("a/x.png") == [("x.png", 1)]


def odd_png(kind: bytes, content: bytes) -> bytes:
    """A PNG with this chunk before its end."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    body = [(b"IHDR", head), (kind, content), (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*own) for own in body)


@pytest.mark.parametrize("chunk", [(b"zTXt", b"note\0\0" + zlib.compress(bytes(2 << 20))), (b"pHYs", b"1")])
def test_an_odd_png_of_somebody_else_is_refused_and_one_of_the_run_replaced(names: Names, chunk: Any) -> None:
    Path("out").mkdir()
    Path("out/x.png").write_bytes(odd_png(*chunk))
    with pytest.raises(InputError, match=r"out/x\.png would be replaced, which detect did not draw"):
        names("a/x.png")
    draw_files([Path("a/x.png")], find_one, Path("out"), 0.5, lambda _: None, is_own=True)
    assert len(read_json(Path("out/detections.json"))) == 1
