import contextlib
import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_factories import (
    SHARED_DATA,
    box_row,
    image_row,
    needs_shared_data,
    save_image,
    two_images,
    with_masks,
    write_set,
)
from megdet.data.check import check_dataset
from megdet.data.coco import load_coco, training_set
from megdet.errors import InputError
from megdet.recipe import Data


@pytest.fixture(scope="module")
def sound_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield write_set(folder, two_images())


def _found(tmp_path, document):
    file, images = write_set(tmp_path, two_images())
    file.write_text(json.dumps(document))
    return check_dataset(file, images)


def _brief(problems):
    return [(p.kind, p.fatal, p.image_id, p.annotation_id) for p in problems]


def test_a_sound_set_has_no_problem(tmp_path):
    assert check_dataset(*write_set(tmp_path, two_images())) == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (box_row(21, 7, 4, [3, 3, 0, 9]), ("zero-area box", False, 7, 21)),
        (box_row(21, 7, 4, [3, 3, 1, 1]), ("tiny box", False, 7, 21)),
        (box_row(21, 7, 4, [-9, 3, 20, 9]), ("box reaches out of the image", False, 7, 21)),
        (box_row(21, 7, 4, [30, 3, 20, 9]), ("box reaches out of the image", False, 7, 21)),
        (box_row(21, 7, 4, [3, 30, 20, 9]), ("box outside the image", False, 7, 21)),
        (box_row(21, 7, 4, [5, 5, 8, 8]), ("duplicate box", False, 7, 21)),
        (box_row(21, 7, 4, [5, 5, 1e31, 8]), ("bad box", True, 7, 21)),
        (box_row(21, 7, 4, [5, 5, math.nan, 8]), ("unreadable annotations", True, None, None)),  # no JSON
        (box_row(21, 7, 4, [5, 5, -2, 8]), ("bad box", True, 7, 21)),
        (box_row(21, 7, 4, None), ("bad box", True, 7, 21)),
        (box_row(21, 7, 5, [5, 5, 9, 8]), ("unknown category id", True, 7, 21)),
        (box_row(21, 99, 4, [5, 5, 9, 8]), ("unknown image id", True, 99, 21)),
        (box_row(21, {}, 4, [5, 5, 9, 8]), ("unknown image id", True, None, 21)),
        (box_row(11, 7, 4, [5, 5, 9, 8]), ("duplicate annotation id", True, 7, 11)),
        (box_row(None, 7, 4, [5, 5, 9, 8]), ("bad annotation id", True, 7, None)),
        (box_row(21, 7, 4, [5, 5, 9, 8], area="x"), ("bad area", True, 7, 21)),
        (box_row(21, 7, 4, [5, 5, 9, 8], iscrowd="no"), ("bad iscrowd", True, 7, 21)),
        ("no object", ("wrong structure", True, None, None)),
    ],
)
def test_each_bad_annotation_is_one_problem_at_its_ids(tmp_path, row, expected):
    document = two_images()
    document["annotations"].append(row)
    assert _brief(_found(tmp_path, document)) == [expected]


@pytest.mark.parametrize(
    ("table", "row", "expected"),
    [
        ("images", image_row(7, "c.jpg"), ("duplicate image id", True, 7, None)),
        ("images", image_row(2.5, "c.jpg"), ("bad image id", True, None, None)),
        ("images", 3, ("wrong structure", True, None, None)),
        ("categories", {"id": 9, "name": "cow"}, ("duplicate category id", True, None, None)),
        ("categories", {"id": "x", "name": "cow"}, ("bad category", True, None, None)),
        ("categories", {"id": 10, "name": "cow"}, ("empty class", False, None, None)),
    ],
)
def test_each_bad_image_or_category_is_one_problem(tmp_path, table, row, expected):
    document = two_images()
    document[table].append(row)
    assert _brief(_found(tmp_path, document)) == [expected]


def test_duplicate_names_of_files_and_categories_are_warnings(tmp_path):
    document = two_images()
    document["images"].append(image_row(8, "a.jpg"))
    document["categories"].append({"id": 10, "name": "cat"})
    document["annotations"] += [box_row(21, 8, 10, [1, 1, 9, 9])]
    assert _brief(_found(tmp_path, document)) == [
        ("duplicate category name", False, None, None),
        ("duplicate file name", False, 8, None),
    ]


def test_missing_truncated_and_resized_images_are_fatal_and_empty_ones_are_counted(tmp_path):
    file, images = write_set(tmp_path, two_images())
    document = two_images()
    document["images"] += [image_row(20 + i, name) for i, name in enumerate(("gone.jpg", "cut.jpg", "new.jpg"))]
    document["images"].append({"id": 30})
    file.write_text(json.dumps(document))
    cut = save_image(images / "cut.jpg", 40, 30)
    cut.write_bytes(cut.read_bytes()[:-200])
    save_image(images / "new.jpg", 41, 30)

    problems = check_dataset(file, images)
    assert _brief(problems) == [
        ("missing file name", True, 30, None),
        ("missing file", True, 20, None),
        ("unreadable image", True, 21, None),
        ("size disagrees", True, 22, None),
        ("images without annotations", False, None, None),
    ]
    assert [problem.file.name for problem in problems[1:4]] == ["gone.jpg", "cut.jpg", "new.jpg"]
    assert "the file is 41 x 30 pixels, the annotations say 40 x 30" in problems[3].message
    assert problems[4].message == "4 of 6 images have no annotation"


def test_all_problems_are_listed_and_the_fatal_ones_come_first(tmp_path):
    document = two_images()
    document["annotations"] += [box_row(20 + i, 7, 4, [3, 3, 0, 9]) for i in range(2)]
    document["annotations"] += [box_row(30 + i, 7, 5, [3 + i, 3, 9, 9]) for i in range(3)]
    assert [p.annotation_id for p in _found(tmp_path, document)] == [30, 31, 32, 20, 21, 21]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [}', "not valid JSON: line 1, column 13"),
        ("[]", "not an object"),
        ("{}", "'categories' is missing"),
        ('{"images": 3, "annotations": null, "categories": "x"}', "'categories' is not a list"),
    ],
)
def test_a_file_of_another_structure_is_a_fatal_problem(tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    first = check_dataset(tmp_path / "bad.json", tmp_path)[0]
    assert first.fatal
    assert message in first.message


def test_a_missing_annotations_file_is_a_fatal_problem(tmp_path):
    assert _brief(check_dataset(tmp_path / "absent.json", tmp_path)) == [("unreadable annotations", True, None, None)]


def test_a_folder_in_the_place_of_the_file_is_told_once(tmp_path):
    (problem,) = check_dataset(tmp_path, tmp_path)
    assert problem.message == "cannot be read: it is a folder, a file is wanted here; check the path"


def test_another_folder_of_images_is_one_problem(tmp_path):
    file, images = write_set(tmp_path, two_images())
    (tmp_path / "other").mkdir()
    (problem,) = check_dataset(file, tmp_path / "other")
    assert (problem.kind, problem.fatal) == ("missing files", True)
    assert "none of the 2 images is in" in problem.message
    assert problem.message.endswith("wrong image folder?")
    assert check_dataset(file, images) == []


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def _rows(*keys):
    return st.lists(
        st.fixed_dictionaries({}, optional={key: _anything | st.integers(0, 2) for key in keys}), max_size=3
    )


@settings(max_examples=120)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "images": _anything | _rows("id", "file_name", "width", "height"),
            "annotations": _anything | _rows("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
            "categories": _anything | _rows("id", "name"),
        },
    )
)
def test_no_json_makes_the_check_fall_over(tmp_path_factory, document):
    folder = tmp_path_factory.mktemp("weird")
    (folder / "weird.json").write_text(json.dumps(document))
    for problem in check_dataset(folder / "weird.json", folder):
        assert "\n" not in problem.message


@settings(max_examples=150)
@given(st.data())
def test_a_set_can_be_loaded_exactly_if_it_has_no_fatal_problem(sound_set, data):
    file, images = sound_set
    document = two_images()
    row = data.draw(st.sampled_from([row for table in document.values() for row in table]))
    key = data.draw(st.sampled_from([*row, "iscrowd", "area"]))
    numbers = st.integers(-2, 60) | st.floats() | st.sampled_from([1e31, 10**400])
    row[key] = data.draw(numbers | _anything | st.lists(numbers, min_size=4, max_size=4))
    file.write_text(json.dumps(document))
    is_refused = any(problem.fatal for problem in check_dataset(file, images))
    with pytest.raises(InputError) if is_refused else contextlib.nullcontext():
        load_coco(file, images, keep_empty=True)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([[1, 1, 9, 1]], "bad segmentation"),
        ({"size": [30, 40], "counts": [1199]}, "bad segmentation"),
        ({"size": [40, 30], "counts": [1200]}, "bad segmentation"),
        ([[1, 1, 9, 1, 900, 9]], "bad segmentation"),
        ("x", "bad segmentation"),
        ([], "no segmentation"),
        (None, "no segmentation"),
    ],
)
def test_a_bad_or_missing_segmentation_is_fatal_for_masks_and_else_a_warning(tmp_path, value, kind):
    document = with_masks(two_images())
    assert check_dataset(*write_set(tmp_path, document), with_masks=True) == []
    document["annotations"][1]["segmentation"] = value
    files = write_set(tmp_path, document)
    assert _brief(check_dataset(*files, with_masks=True)) == [(kind, True, 7, 12)]
    (warning,) = check_dataset(*files)
    assert (warning.kind, warning.fatal) == (kind, False)
    assert kind == "bad segmentation" or warning.message.startswith("1 of 3 objects have no segmentation")


def test_a_set_without_any_segmentation_has_no_warning_about_it(tmp_path):
    files = write_set(tmp_path, two_images())
    assert check_dataset(*files) == []
    assert [p.annotation_id for p in check_dataset(*files, with_masks=True)] == [11, 12, 13]


_points = st.lists(st.integers(-90, 90) | st.floats(-50, 50), max_size=8)
_outlines = st.lists(_points, max_size=2) | st.sampled_from(
    [{"size": [30, 40], "counts": counts} for counts in ([1200], [3, 1197], [1, 2], "n0n0dS1", "n0n0dS")]
)


@settings(max_examples=150)
@given(st.lists(_outlines | _anything, min_size=3, max_size=3))
def test_a_set_has_all_its_masks_exactly_if_it_has_no_fatal_problem(sound_set, values):
    file, images = sound_set
    document = two_images()
    for row, value in zip(document["annotations"], values, strict=True):
        row["segmentation"] = value
    file.write_text(json.dumps(document))
    is_refused = any(problem.fatal for problem in check_dataset(file, images, with_masks=True))
    data = Data(train_annotations=str(file), train_images=str(images))
    with pytest.raises(InputError) if is_refused else contextlib.nullcontext():
        training_set(data, masks="all")


def test_boxes_drawn_before_the_exif_rotation_are_fatal(tmp_path):
    save_image(tmp_path / "images" / "b.jpg", 40, 30, orientation=6)
    assert _brief(check_dataset(*write_set(tmp_path, two_images()))) == [("box before EXIF rotation", True, 3, 13)]


@needs_shared_data
def test_coco_mini_is_sound():
    folder = SHARED_DATA / "coco_mini"
    problems = check_dataset(folder / "annotations" / "instances_val2017.json", folder / "val2017", with_masks=True)
    assert [problem for problem in problems if problem.fatal] == []


def test_names_that_leave_the_folder_large_images_and_pipes_are_fatal_problems_of_their_own(tmp_path):
    file, images = write_set(tmp_path, two_images())
    save_image(tmp_path / "outside.jpg", 40, 30)
    os.mkfifo(images / "pipe.jpg")
    document = two_images()
    document["images"] += [
        image_row(20, "../outside.jpg"),
        image_row(21, "pipe.jpg"),
        image_row(22, "wide.png", 60, 21),
    ]
    document["annotations"] += [box_row(number, number, 4, [5, 5, 8, 8]) for number in (20, 21, 22)]
    save_image(images / "wide.png", 60, 21)
    file.write_text(json.dumps(document))

    problems = check_dataset(file, images, max_pixels=1259)
    assert _brief(problems) == [
        ("file outside the image folder", True, 20, None),
        ("unreadable image", True, 21, None),
        ("too many pixels", True, 22, None),
    ]
    assert "it is a pipe" in problems[1].message
    assert "60 x 21 pixels are more than data.max_pixels 1259" in problems[2].message
    allowed = check_dataset(file, images, max_pixels=1260, allow_outside_files=True)
    assert _brief(allowed) == [("unreadable image", True, 21, None)]


def test_a_size_that_is_no_number_is_a_problem_of_its_image(tmp_path):
    document = two_images()
    document["images"][0]["width"] = "40"
    assert _brief(_found(tmp_path, document)) == [("bad image size", True, 7, None)]
