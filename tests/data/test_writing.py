"""COCO to YOLO and VOC and back: the boxes agree within the rounding of the format."""

import json

import numpy as np
import pytest

from data_factories import SHARED_DATA, box_row, image_row, needs_shared_data, write_set
from megdet.data.coco import load_coco
from megdet.data.formats.voc import convert_voc
from megdet.data.formats.writing import write_voc, write_yolo
from megdet.data.formats.yolo import convert_yolo
from megdet.errors import InputError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tmp_path):
    """Images in subfolders, odd fractions, categories with gaps, a crowd, an image without objects."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    document = {
        "images": [image_row(7, "a.jpg", 333, 77), image_row(3, "deep/b.png", 40, 30), image_row(9, "c.jpg")],
        "annotations": [
            box_row(1, 7, 90, [0.3, 0.7, 332.5, 76.1]),
            box_row(2, 7, 4, [100.123, 30.456, 0.2, 0.3]),
            box_row(3, 3, 4, [1, 2, 10, 20]),
            box_row(4, 3, 90, [0, 0, 40, 30], iscrowd=1),
        ],
        "categories": [{"id": 4, "name": "кот: a"}, {"id": 90, "name": "dog"}],
    }
    return load_coco(*write_set(tmp_path, document), keep_empty=True)


def objects(dataset):
    """Image and class -> corners, without crowds, in order."""
    rows = []
    for name, own in zip(dataset.file_names, dataset.annotations, strict=True):
        for box, label, is_crowd in zip(own.boxes, own.labels.tolist(), own.is_crowd.tolist(), strict=True):
            if not is_crowd:
                rows.append((name, dataset.class_names[label], box))
    return sorted(rows, key=lambda row: (row[0], row[1], row[2].tolist()))


def assert_agree(found, wanted, tolerance):
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    assert max(np.abs(a[2] - b[2]).max() for a, b in zip(found, wanted, strict=True)) <= tolerance


def read_again(converted):
    return load_coco(converted.annotations_file, converted.image_folder, keep_empty=True)


def test_yolo_comes_back_to_a_thousandth_of_a_pixel(dataset, tmp_path):
    written = write_yolo(dataset, tmp_path / "yolo", "train")
    assert (written.num_images, written.num_boxes, written.num_crowds) == (3, 3, 1)
    write_yolo(dataset, tmp_path / "yolo", "val")
    train, val = convert_yolo(tmp_path / "yolo", tmp_path / "out")
    assert train.class_names == dataset.class_names
    for own in (train, val):
        again = read_again(own)
        assert sorted(again.file_names) == sorted(dataset.file_names)
        assert_agree(objects(again), objects(dataset), 1.5e-3)  # x and width are rounded to a thousandth each


def test_voc_comes_back_to_half_a_pixel_and_keeps_one(dataset, tmp_path):
    written = write_voc(dataset, tmp_path / "voc", "train")
    assert (written.num_images, written.num_boxes, written.num_crowds) == (3, 3, 1)
    (train,) = convert_voc(tmp_path / "voc", tmp_path / "out", difficult_as_crowd=True)
    again = read_again(train)
    assert sorted(again.file_names) == sorted(dataset.file_names)
    assert int(again.annotations.is_crowd.sum()) == 1
    wanted, found = objects(dataset), objects(again)
    tiny = next(place for place, row in enumerate(wanted) if row[2][2] - row[2][0] < 1)
    assert found.pop(tiny)[2].tolist() == [100, 30, 101, 31]  # 0.2 x 0.3 px
    wanted.pop(tiny)
    assert_agree(found, wanted, 0.5)


def test_names_with_spaces_come_back_from_voc(tmp_path):
    document = {"images": [image_row(1, "my photo 1.jpg")], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    write_voc(load_coco(*write_set(tmp_path, document), keep_empty=True), tmp_path / "voc", "train")
    (train,) = convert_voc(tmp_path / "voc", tmp_path / "out")
    assert [row["file_name"] for row in json.loads(train.annotations_file.read_text())["images"]] == ["my photo 1.jpg"]


def test_what_is_there_already_is_not_overwritten(dataset, tmp_path):
    for write in (write_yolo, write_voc):
        write(dataset, tmp_path / write.__name__, "train")
        with pytest.raises(InputError, match="exists: choose another folder"):
            write(dataset, tmp_path / write.__name__, "train")
    with pytest.raises(InputError, match=r"a\.xml exists"):
        write_voc(dataset, tmp_path / "write_voc", "val")
    (tmp_path / "write_yolo" / "data.yaml").write_text("names: [a]")
    with pytest.raises(InputError, match="other classes than those of"):
        write_yolo(dataset, tmp_path / "write_yolo", "val")


def test_images_that_would_share_a_label_file_are_refused(tmp_path):
    document = {"images": [image_row(1, "a.jpg"), image_row(2, "a.png")], "annotations": [], "categories": []}
    document["categories"] = [{"id": 1, "name": "x"}]
    dataset = load_coco(*write_set(tmp_path, document), keep_empty=True)
    for write in (write_yolo, write_voc):
        with pytest.raises(InputError, match="2 images are called 'a': rename all but one"):
            write(dataset, tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


@needs_shared_data
def test_coco_mini_comes_back_from_yolo_and_voc(tmp_path):
    folder = SHARED_DATA / "coco_mini"
    dataset = load_coco(folder / "annotations/instances_val2017.json", folder / "val2017", keep_empty=True)
    write_yolo(dataset, tmp_path / "yolo", "val")
    (val,) = convert_yolo(tmp_path / "yolo", tmp_path / "from_yolo")
    assert_agree(objects(read_again(val)), objects(dataset), 2e-3)
    write_voc(dataset, tmp_path / "voc", "val")
    (val,) = convert_voc(tmp_path / "voc", tmp_path / "from_voc", difficult_as_crowd=True)
    rows = json.loads(val.annotations_file.read_text())["annotations"]
    assert len(rows) == len(dataset.annotations.boxes)
