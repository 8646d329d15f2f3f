import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_factories import SHARED_DATA, box_row, image_row, needs_shared_data, save_image, two_images, write_set
from megdet.data.coco import load_coco, write_coco
from megdet.data.coco_rows import box_fault
from megdet.errors import InputError

pytestmark = pytest.mark.usefixtures("cache_folder")


def test_images_keep_the_order_of_the_file_and_classes_that_of_their_ids(tmp_path):
    dataset = load_coco(*write_set(tmp_path, two_images()), keep_empty=False)
    assert len(dataset) == 2
    assert dataset.image_ids == (7, 3)
    assert dataset.file_names == ("a.jpg", "b.jpg")
    assert dataset.category_ids == (4, 9)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.sizes.tolist() == [[30, 40], [30, 40]]
    assert dataset.image_path(1) == tmp_path / "images" / "b.jpg"


def test_annotations_are_corners_labels_crowds_and_areas(tmp_path):
    first, second = load_coco(*write_set(tmp_path, two_images()), keep_empty=False).annotations
    assert first.boxes.tolist() == [[5, 5, 13, 13]]
    assert first.areas.tolist() == [50.0]
    assert second.boxes.tolist() == [[1, 2, 11, 22], [0, 0, 40, 30]]
    assert second.labels.tolist() == [1, 0]
    assert second.is_crowd.tolist() == [False, True]
    assert second.areas.tolist() == [200.0, 1200.0]
    assert second.annotation_ids == (11, 13)


def test_boxes_are_clipped_and_those_without_area_dropped_and_counted(tmp_path):
    document = two_images()
    document["annotations"] += [
        box_row(21, 7, 4, [-10, 20, 30, 50]),
        box_row(22, 7, 4, [3, 3, 0, 9]),
        box_row(23, 7, 4, [3, 3, 9, 0]),
        box_row(24, 7, 4, [50, 3, 9, 9]),
    ]
    dataset = load_coco(*write_set(tmp_path, document), keep_empty=False)
    assert dataset.num_dropped == 3
    assert dataset.annotations[0].annotation_ids == (12, 21)
    assert dataset.annotations[0].boxes[1].tolist() == [0, 20, 20, 30]


@pytest.mark.parametrize(
    "only",
    [
        [],
        [box_row(1, 5, 4, [0, 0, 9, 9], iscrowd=1)],
        [box_row(1, 5, 4, [3, 3, 0, 9])],
        [box_row(1, 5, 4, [99, 3, 5, 9])],
    ],
)
def test_images_without_a_target_are_kept_only_on_request(tmp_path, only):
    document = two_images()
    document["images"].insert(0, image_row(5, "empty.jpg"))
    document["annotations"] += only
    files = write_set(tmp_path, document)
    assert load_coco(*files, keep_empty=False).image_ids == (7, 3)
    kept = load_coco(*files, keep_empty=True)
    assert kept.image_ids == (5, 7, 3)
    assert kept.annotations[0].boxes.shape == (len(kept.annotations[0].labels), 4)


def test_names_and_ids_of_any_script_are_kept(tmp_path):
    document = {
        "images": [image_row("图-1", "фото/картина ü.jpg")],
        "annotations": [box_row("β", "图-1", 0, [1, 1, 5, 5])],
        "categories": [{"id": 0, "name": "кошка 猫"}],
    }
    dataset = load_coco(*write_set(tmp_path, document), keep_empty=False)
    assert (dataset.class_names, dataset.image_ids) == (("кошка 猫",), ("图-1",))
    assert dataset.annotations[0].annotation_ids == ("β",)
    assert dataset.image_path(0).is_file()


def test_sizes_are_those_displayed_whether_or_not_the_file_knows_exif(tmp_path):
    save_image(tmp_path / "images" / "a.jpg", 40, 30, orientation=6)
    save_image(tmp_path / "images" / "b.jpg", 40, 30, orientation=8)
    document = two_images()
    document["images"] = [image_row(7, "a.jpg", 30, 40), image_row(3, "b.jpg", 40, 30)]
    document["annotations"].pop()
    dataset = load_coco(*write_set(tmp_path, document), keep_empty=False)
    assert dataset.sizes.tolist() == [[40, 30], [40, 30]]


def test_boxes_drawn_before_the_exif_rotation_are_refused(tmp_path):
    save_image(tmp_path / "images" / "b.jpg", 40, 30, orientation=6)
    with pytest.raises(InputError, match="image 3: the boxes were drawn before the EXIF rotation"):
        load_coco(*write_set(tmp_path, two_images()), keep_empty=False)


def _set(path, value):
    def change(document):
        *parents, last = path
        for key in parents:
            document = document[key]
        if value is KeyError:
            del document[last]
        else:
            document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(["annotations", 0, "bbox"], KeyError), "image 3, annotation 11: bbox is missing"),
        (_set(["annotations", 0, "bbox"], [1, 2, 3]), "annotation 11: bbox is not a list of four"),
        (_set(["annotations", 0, "bbox"], [1, 2, 3, math.nan]), "line 1, column .*: NaN and Infinity"),
        (_set(["annotations", 0, "bbox"], [1, 2, 3, 1e31]), "annotation 11: bbox .* not a finite number"),
        (_set(["annotations", 0, "bbox"], [1, 2, "3", 4]), "annotation 11: bbox .* not a finite number"),
        (_set(["annotations", 0, "bbox"], [1, 2, True, 4]), "annotation 11: bbox .* not a finite number"),
        (_set(["annotations", 0, "bbox"], [1, 2, -3, 4]), "annotation 11: bbox .* negative width or height"),
        (_set(["annotations", 0, "category_id"], 5), "annotation 11: category_id 5 is not among"),
        (_set(["annotations", 0, "image_id"], 99), "annotation 11: the annotation's image_id is not among"),
        (_set(["annotations", 0, "image_id"], [7]), "annotation 11: the annotation's image_id is not among"),
        (_set(["annotations", 0, "area"], "big"), "annotation 11: area is 'big'"),
        (_set(["annotations", 0, "iscrowd"], 2), "annotation 11: iscrowd is 2"),
        (_set(["annotations", 0, "id"], 12), "annotation 12: two annotations have the same id"),
        (_set(["annotations", 0, "id"], KeyError), "an annotation has the id None"),
        (_set(["images", 0, "id"], 3), "image 3: two images have the same id"),
        (_set(["images", 0, "file_name"], KeyError), "image 7: the image has no 'file_name'"),
        (_set(["images", 0, "width"], "40"), "image 7: its width is '40', not a number of pixels"),
        (_set(["images", 0, "width"], 41), "image 7: the file is 40 x 30 pixels, the annotations say 41 x 30"),
        (_set(["images", 0], image_row(7, "a.jpg", 30, 40)), "image 7: the file is 40 x 30 pixels"),
        (_set(["categories", 0, "id"], 4), "two categories have the id 4"),
        (_set(["categories", 0, "name"], 4), "needs an integer 'id' and a string 'name'"),
        (_set(["categories"], []), "'categories' is empty"),
        (_set(["images"], KeyError), "'images' is not a list of objects"),
        (_set(["annotations"], {}), "'annotations' is not a list of objects"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_at_its_place(tmp_path, change, message):
    file, images = write_set(tmp_path, two_images())
    document = two_images()
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message) as caught:
        load_coco(file, images, keep_empty=False)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [', "not valid JSON: line 1, column 13"),
        (b"\xff\xfe{}", "not UTF-8 text"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[]", "the JSON is not an object"),
        (b"9" * 5000, "integer value out of range"),
    ],
)
def test_a_corrupt_json_is_refused_with_its_place(tmp_path, content, message):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_coco(tmp_path / "bad.json", tmp_path, keep_empty=True)
    with pytest.raises(InputError, match="does not exist"):
        load_coco(tmp_path / "absent.json", tmp_path, keep_empty=True)


def test_a_wrong_image_folder_is_named_with_the_number_of_missing_images(tmp_path):
    file, _ = write_set(tmp_path, two_images())
    with pytest.raises(InputError, match=r"elsewhere: 2 of 2 images .* the first is 'a\.jpg'; wrong image folder\?"):
        load_coco(file, tmp_path / "elsewhere", keep_empty=False)


def test_no_image_with_a_box_is_refused(tmp_path):
    files = write_set(tmp_path, {**two_images(), "annotations": []})
    with pytest.raises(InputError, match="no image with a box"):
        load_coco(*files, keep_empty=False)
    assert len(load_coco(*files, keep_empty=True)) == 2


def test_a_truncated_image_is_refused_while_headers_are_read(tmp_path):
    file, images = write_set(tmp_path, two_images())
    whole = (images / "a.jpg").read_bytes()
    (images / "a.jpg").write_bytes(whole[:-40])
    with pytest.raises(
        InputError, match=r"a\.jpg: cannot be read as an image .* or take the image out of .*start_from"
    ):
        load_coco(file, images, keep_empty=False)
    (images / "a.jpg").write_bytes(whole + b"what a camera puts behind the picture")
    assert len(load_coco(file, images, keep_empty=False)) == 2


def test_a_pipe_in_the_place_of_an_image_is_refused_and_not_waited_for(tmp_path):
    file, images = write_set(tmp_path, two_images())
    (images / "a.jpg").unlink()
    os.mkfifo(images / "a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg: it is a pipe, no image file"):
        load_coco(file, images, keep_empty=False)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match=r"pipe\.json cannot be read: it is not a plain file"):
        load_coco(tmp_path / "pipe.json", images, keep_empty=False)


def test_an_image_of_more_pixels_than_allowed_is_refused(tmp_path):
    files = write_set(tmp_path, two_images())
    assert len(load_coco(*files, keep_empty=False, max_pixels=1200)) == 2
    with pytest.raises(InputError, match=r"image 7: 40 x 30 pixels are more than data.max_pixels 1199"):
        load_coco(*files, keep_empty=False, max_pixels=1199)


@pytest.mark.parametrize("name", ["../secret.jpg", "sub/../../secret.jpg", "{folder}/secret.jpg"])
def test_a_file_name_that_leaves_the_image_folder_is_refused_unless_allowed(tmp_path, name):
    save_image(tmp_path / "secret.jpg", 40, 30)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    document = two_images()
    document["images"][1]["file_name"] = name.format(folder=tmp_path)
    files = write_set(tmp_path, document)
    with pytest.raises(InputError, match=r"image 3: file_name .*secret\.jpg' leads out .* data\.allow_outside_files"):
        load_coco(*files, keep_empty=False)
    allowed = load_coco(*files, keep_empty=False, allow_outside_files=True)
    assert allowed.image_path(1).resolve() == (tmp_path / "secret.jpg").resolve()


def test_names_with_dots_inside_stay_in_the_folder(tmp_path):
    document = two_images()
    document["images"][0]["file_name"] = "a..b.jpg"
    assert load_coco(*write_set(tmp_path, document), keep_empty=False).file_names == ("a..b.jpg", "b.jpg")


def test_a_written_file_is_read_back_and_the_same_bytes_each_time(tmp_path):
    document = two_images()
    _, images = write_set(tmp_path, document)
    written = tmp_path / "new" / "file.json"
    write_coco(written, **document)
    first = written.read_bytes()
    write_coco(written, **document)
    assert written.read_bytes() == first
    assert [path.name for path in written.parent.iterdir()] == ["file.json"]
    assert load_coco(written, images, keep_empty=False).image_ids == (7, 3)


def test_a_file_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        write_coco(tmp_path / "file" / "a.json", **two_images())


@given(st.lists(st.floats() | st.integers() | st.none() | st.booleans() | st.text(max_size=3), min_size=4, max_size=4))
def test_a_box_is_sound_exactly_if_its_numbers_are_finite_and_its_size_not_negative(values):
    is_sound = all(type(v) in (int, float) and math.isfinite(v) and abs(v) < 1e30 for v in values)
    is_sound = is_sound and values[2] >= 0 and values[3] >= 0
    assert (box_fault(values) == "") == is_sound


@needs_shared_data
def test_coco_mini_agrees_with_pycocotools():
    from pycocotools.coco import COCO

    folder = SHARED_DATA / "coco_mini"
    dataset = load_coco(folder / "annotations" / "instances_val2017.json", folder / "val2017", keep_empty=True)
    reference = COCO(folder / "annotations" / "instances_val2017.json")
    assert list(dataset.image_ids) == [image["id"] for image in reference.dataset["images"]]
    assert list(dataset.category_ids) == sorted(reference.getCatIds())
    for index, image_id in enumerate(dataset.image_ids):
        info, found = reference.imgs[image_id], dataset.annotations[index]
        assert dataset.sizes[index].tolist() == [info["height"], info["width"]]
        rows = reference.loadAnns(found.annotation_ids)
        corners = np.array([row["bbox"] for row in rows]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        assert abs(found.boxes - corners).max(initial=0) <= 0.02  # clipped boxes stood out by a rounding
        assert [dataset.category_ids[label] for label in found.labels] == [row["category_id"] for row in rows]
    assert sum(len(one.labels) for one in dataset.annotations) + dataset.num_dropped == 624
