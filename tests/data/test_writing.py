"""COCO to YOLO and VOC and back: the boxes agree within the rounding of the format."""

import json

import numpy as np
import pytest

from data_factories import SHARED_DATA, box_row, image_row, needs_shared_data, write_set
from megdet.data.check import check_dataset
from megdet.data.coco import load_coco
from megdet.data.formats.voc import convert_voc
from megdet.data.formats.writing import write_voc, write_yolo
from megdet.data.formats.yolo import convert_yolo
from megdet.errors import InputError
from megdet.plain_yaml import parse_yaml


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
    with pytest.raises(InputError, match="a key names of its own: choose another --split"):
        write_yolo(dataset, tmp_path / "new", "names")
    assert not (tmp_path / "new").exists()


def test_images_that_would_share_a_label_file_are_refused(tmp_path):
    document = {"images": [image_row(1, "a.jpg"), image_row(2, "a.png")], "annotations": [], "categories": []}
    document["categories"] = [{"id": 1, "name": "x"}]
    dataset = load_coco(*write_set(tmp_path, document), keep_empty=True)
    for write in (write_yolo, write_voc):
        with pytest.raises(InputError, match="2 images are called 'a': rename all but one"):
            write(dataset, tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


CAT = {"id": 1, "name": "cat"}


def read_rows(folder, images, annotations, categories):
    document = {"images": images, "annotations": annotations, "categories": categories}
    return load_coco(*write_set(folder, document), keep_empty=True)


def test_a_thin_box_at_the_far_edge_stays_in_its_voc_image(tmp_path):
    boxes = [[63.8, 47.9, 0.2, 0.1], [0, 0, 0.2, 0.1], [10.4, 20.2, 8.2, 9.8]]
    rows = [box_row(number, 1, 1, box) for number, box in enumerate(boxes, start=1)]
    write_voc(read_rows(tmp_path, [image_row(1, "a.jpg", 64, 48)], rows, [CAT]), tmp_path / "voc", "train")
    (train,) = convert_voc(tmp_path / "voc", tmp_path / "out")
    found = json.loads(train.annotations_file.read_text())["annotations"]
    assert [row["bbox"] for row in found] == [[63, 47, 1, 1], [0, 0, 1, 1], [10, 20, 9, 10]]
    assert [own.kind for own in check_dataset(train.annotations_file, train.image_folder)] == ["tiny box"] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat", "category 7: its name 'cat' is that of category 1 too"),
        (" cat", "category 7: its name 'cat' is that of category 1 too"),
        ("", "category 7: its name is empty"),
        (" ", "category 7: its name is empty"),
        ("a\x01b", r"category 7: its name 'a\\x01b' has characters that cannot be printed"),
        ("a\nb", r"category 7: its name 'a\\nb' has characters that cannot be printed"),
    ],
)
def test_classes_that_no_reader_tells_apart_are_refused(tmp_path, name, message):
    dataset = read_rows(tmp_path, [image_row(1, "a.jpg")], [], [CAT, {"id": 7, "name": name}])
    for write in (write_yolo, write_voc):
        with pytest.raises(InputError, match=rf"instances\.json, {message}: give it a name of its own"):
            write(dataset, tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


def test_names_with_wide_spaces_and_joiners_are_printable(tmp_path):
    names = ["\u0645\u06cc\u200c\u062e", "\u732b\u3000\u72ac"]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    box = [1, 2, 10, 20]
    dataset = read_rows(tmp_path, [image_row(1, "a.jpg")], [box_row(n, 1, n, box) for n in (0, 1)], categories)
    write_voc(dataset, tmp_path / "voc", "train")
    write_yolo(dataset, tmp_path / "yolo", "train")
    assert convert_voc(tmp_path / "voc", tmp_path / "a")[0].class_names == tuple(sorted(names))
    assert convert_yolo(tmp_path / "yolo", tmp_path / "b")[0].class_names == tuple(names)


@pytest.mark.parametrize("name", ["a\x01.jpg", "a .jpg"])
def test_file_names_that_voc_cannot_have_are_refused(tmp_path, name):
    dataset = read_rows(tmp_path, [image_row(1, name)], [], [CAT])
    with pytest.raises(InputError, match=r"image 1: VOC cannot have file_name 'a.*: rename the file"):
        write_voc(dataset, tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()
    write_yolo(dataset, tmp_path / "yolo", "train")
    assert convert_yolo(tmp_path / "yolo", tmp_path / "out")[0].num_images == 1


@pytest.mark.parametrize("name", [".a.jpg", "one/.two/a.jpg"])
def test_files_that_readers_pass_over_are_refused(tmp_path, name):
    dataset = read_rows(tmp_path, [image_row(1, name)], [], [CAT])
    for write in (write_yolo, write_voc):
        with pytest.raises(InputError, match=r"image 1: readers pass over file_name '.*, for the dot at a beginning"):
            write(dataset, tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


def test_yolo_has_no_folder_called_like_another_split(tmp_path):
    dataset = read_rows(tmp_path, [image_row(1, "Val/a.jpg")], [], [CAT])
    with pytest.raises(InputError, match=r"image 1: its folder 'Val' is called like a split, and .* is train"):
        write_yolo(dataset, tmp_path / "out", "train")
    write_voc(dataset, tmp_path / "voc", "train")
    assert [own.num_images for own in convert_voc(tmp_path / "voc", tmp_path / "back")] == [1]


def test_both_forms_of_an_accent_would_share_a_label_file(tmp_path):
    names = "\u00e9.jpg", "e\u0301.jpg"
    dataset = read_rows(tmp_path, [image_row(number, name) for number, name in enumerate(names)], [], [CAT])
    for write in (write_yolo, write_voc):
        with pytest.raises(InputError, match="2 images are called '\u00e9': rename all but one"):
            write(dataset, tmp_path / "out", "train")


def test_one_file_under_two_ids_is_refused_as_one_file(tmp_path):
    dataset = read_rows(tmp_path, [image_row(1, "z.jpg"), image_row("b", "./z.jpg")], [], [CAT])
    for write in (write_yolo, write_voc):
        with pytest.raises(InputError, match=r"the file '\./z\.jpg' is image 1 and image 'b': keep one of them"):
            write(dataset, tmp_path / "out", "train")
    assert not (tmp_path / "out").exists()


def test_a_data_yaml_with_names_by_number_goes_on(dataset, tmp_path):
    (tmp_path / "yolo").mkdir()
    file = tmp_path / "yolo" / "data.yaml"
    file.write_text("path: .  # mine\nnames:\n  0: 'кот: a'\n  1: dog\n", encoding="utf-8")
    write_yolo(dataset, tmp_path / "yolo", "train")
    content = {"path": ".", "names": ["кот: a", "dog"], "train": "images/train"}
    assert parse_yaml(file.read_text(encoding="utf-8"), "data.yaml") == content
    assert convert_yolo(tmp_path / "yolo", tmp_path / "out")[0].class_names == dataset.class_names
    for other in ("names: {0: dog, 1: 'кот: a'}\n", "names: ['кот: a', dog]\nkpt_shape: [3, 2]\n"):
        file.write_text(other, encoding="utf-8")
        with pytest.raises(InputError, match=r"other classes than those of .*, or keypoints: choose another folder"):
            write_yolo(dataset, tmp_path / "yolo", "val")


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
