"""The zip that the COCO server takes."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_factories import SHARED_DATA, needs_shared_data
from megdet.data.image_info import ImageInfo
from megdet.data.result_rows import Detection
from megdet.data.rle import encode_mask
from megdet.errors import InputError
from megdet.files import read_json, typed
from megdet.inference.submission import COCO_CATEGORIES, check_submission, submission_name, write_submission

INFO = ImageInfo(Path("info.json"), {7: "a.jpg", 8: "b.jpg"}, {7: (20.0, 30.0), 8: None}, {1: "person"}, False)
MASK = encode_mask(np.ones((2, 3), np.bool_), 4, 5, (20, 30))
SOUND = {"image_id": 7, "category_id": 90, "bbox": [1.0, 2.0, 3.5, 4.0], "score": 0.5, "segmentation": MASK}


def rows_of(*changes: dict[str, Any]) -> list[Detection]:
    return typed([SOUND | own for own in changes], list[Detection], "detections")


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_zip_has_one_file_of_the_servers_name_with_what_its_kind_counts(kind, tmp_path):
    rows = rows_of({}, {"image_id": 8, "category_id": 1, "score": 1})
    check_submission(rows, INFO, kind, "here")
    path = write_submission(tmp_path / "new", rows, kind, "MegDet-4", "test-dev2017")
    assert path == tmp_path / "new" / "detections_test-dev2017_MegDet-4_results.zip"
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["detections_test-dev2017_MegDet-4_results.json"]
        found = json.loads(archive.read(archive.namelist()[0]))
    what = {"bbox": SOUND["bbox"]} if kind == "bbox" else {"segmentation": MASK}
    assert found == [
        {"image_id": 7, "category_id": 90, "score": 0.5, **what},
        {"image_id": 8, "category_id": 1, "score": 1, **what},
    ]
    content = path.read_bytes()
    assert write_submission(tmp_path / "new", rows, kind, "MegDet-4", "test-dev2017").read_bytes() == content


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        (
            "bbox",
            {"image_id": 9},
            "here: [0] of image 9: there is no such image in info.json: is it the same test set?",
        ),
        ("bbox", {"image_id": "7"}, "there is no such image"),
        ("bbox", {"image_id": 7.0}, "there is no such image"),
        ("bbox", {"category_id": 91}, "category_id 91 is not one of COCO's 80, which lie from 1 to 90"),
        ("bbox", {"category_id": 12}, "category_id 12 is not one of COCO's 80"),
        ("bbox", {"bbox": None}, "it has no bbox"),
        ("segm", {"segmentation": None}, "it has no segmentation"),
        (
            "segm",
            {"segmentation": {**MASK, "size": [30, 20]}},
            "RLE of 30 x 20 pixels (height x width), the image has 20 x 30",
        ),
        ("segm", {"segmentation": {"size": [20, 30], "counts": "0"}}, "add up to 0 pixels, not to 20 x 30"),
        ("segm", {"segmentation": {"size": [20, 30], "counts": "~~"}}, "are no compressed runs"),
        ("segm", {"segmentation": {"size": [20, 30], "counts": [600]}}, "the server takes counts as compressed text"),
    ],
)
def test_what_the_server_would_refuse_is_refused_in_one_line(kind, change, fault):
    with pytest.raises(InputError) as refused:
        check_submission(rows_of(change), INFO, kind, "here")
    assert str(refused.value).startswith("here: [0] of image ")
    assert fault in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_hundred_detections_an_image_are_the_most_and_none_is_no_submission():
    check_submission(rows_of(*[{}] * 100, *[{"image_id": 8}] * 100), INFO, "bbox", "here")
    with pytest.raises(InputError, match="here: image 8 has 101 detections, the server takes the best 100"):
        check_submission(rows_of(*[{}] * 100, *[{"image_id": 8}] * 101), INFO, "bbox", "here")
    with pytest.raises(InputError, match="here: there is no detection"):
        check_submission([], INFO, "bbox", "here")


@pytest.mark.parametrize("word", ["", "my_net", "a b", "../a", "-a", "né"])
def test_a_name_that_the_server_would_not_read_back_is_refused(word):
    with pytest.raises(InputError, match=r"--alg .*take letters, digits"):
        submission_name(word, "test-dev2017")
    with pytest.raises(InputError, match=r"--test-set .*take letters, digits"):
        submission_name("a", word)


def test_cocos_ids_are_eighty_of_ninety():
    assert len(COCO_CATEGORIES) == 80
    assert (min(COCO_CATEGORIES), max(COCO_CATEGORIES)) == (1, 90)


@needs_shared_data
def test_cocos_ids_are_those_of_its_own_annotations():
    file = SHARED_DATA / "coco_mini" / "annotations" / "instances_val2017.json"
    assert {row["id"] for row in read_json(file)["categories"]} == COCO_CATEGORIES
