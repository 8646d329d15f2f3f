import json
import os

import pytest

from data_factories import save_image
from megdet.data.coco import load_coco
from megdet.data.formats.yolo import convert_yolo
from megdet.errors import InputError


@pytest.fixture
def yolo(tmp_path):
    folder = tmp_path / "yolo"
    save_image(folder / "images" / "train" / "a.jpg", 40, 30)
    save_image(folder / "images" / "train" / "sub" / "b.png", 100, 200)
    save_image(folder / "images" / "val" / "c.jpg", 40, 30)
    for name in ("train/sub", "val"):
        (folder / "labels" / name).mkdir(parents=True)
    (folder / "labels" / "train" / "a.txt").write_text("1 0.5 0.5 0.25 0.2\n\n0 0.5 0.5 1 1\n")
    (folder / "labels" / "val" / "c.txt").write_text("0 0.25 0.5 0.75 0.5 0.5 1.0\n")
    (folder / "data.yaml").write_text("names: {1: dog, 0: 猫}\n", encoding="utf-8")
    return folder


def test_yolo_centres_become_corners_in_pixels(yolo, tmp_path):
    train, val = convert_yolo(yolo, tmp_path / "out")
    assert (train.num_images, train.num_boxes, train.class_names) == (2, 2, ("猫", "dog"))
    document = json.loads(train.annotations_file.read_text(encoding="utf-8"))
    assert [row["file_name"] for row in document["images"]] == ["a.jpg", "sub/b.png"]
    assert [row["bbox"] for row in document["annotations"]] == [[15, 12, 10, 6], [0, 0, 40, 30]]
    assert [row["category_id"] for row in document["annotations"]] == [2, 1]
    polygon = json.loads(val.annotations_file.read_text(encoding="utf-8"))["annotations"][0]
    assert polygon["bbox"] == [10, 15, 20, 15]
    assert polygon["segmentation"] == [[10, 15, 30, 15, 20, 30]]


@pytest.mark.parametrize("layout", ["roboflow", "flat"])
def test_other_yolo_layouts_are_found(yolo, tmp_path, layout):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "classes.txt").write_text("cat\ndog\n")
    target = folder / "test" if layout == "roboflow" else folder
    target.mkdir(exist_ok=True)
    (yolo / "images" / "train").rename(target / "images")
    (yolo / "labels" / "train").rename(target / "labels")
    (target / "images" / "sub" / "b.png").rename(target / "images" / "b.png")
    (target / "images" / "sub").rmdir()
    (target / "labels" / "sub").rmdir()
    (converted,) = convert_yolo(folder, tmp_path / "out")
    assert converted.annotations_file.stem == ("test" if layout == "roboflow" else "all")
    assert (converted.num_images, converted.num_boxes, converted.class_names) == (2, 2, ("cat", "dog"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 x 0.1", "a class number and then numbers"),
        ("0 0.5 0.5 nan 0.1", "a class number and then numbers"),
        ("0.5 0.5 0.5 0.1 0.1", "a class number and then numbers"),
        ("2 0.5 0.5 0.1 0.1", r"class 2 is not one of the 2 names \(0 to 1\)"),
        ("-1 0.5 0.5 0.1 0.1", "class -1 is not one"),
        ("0 0.5 0.5 -0.1 0.1", "negative width or height"),
        ("0 20 15 10 10", "these look like pixels"),
        ("0 10 10 20 10 20 20", "points should be relative to the image, 0 to 1; these look like pixels"),
        ("0 0.5 0.5 0.1", "found 4 values"),
        ("0 0.5 0.5 0.1 0.1 0.1", "found 6 values"),
    ],
)
def test_a_bad_yolo_line_is_refused_with_its_number(yolo, tmp_path, line, message):
    (yolo / "labels" / "train" / "a.txt").write_text(f"1 0.5 0.5 0.25 0.2\n\n{line}\n")
    with pytest.raises(InputError, match=rf"a\.txt:3: .*{message}"):
        convert_yolo(yolo, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: 3", "names: expected object | array, got int, here stands 3"),
        ("names: {0: a, 2: b}", "`names` should be a list"),
        ("[]", "expected object, got array"),
        ("{}", "object missing required field names"),
        ("names: [a, [b]]", r"names\[1\]: expected"),
        ("names: &a [x, *a]", "line 1, column 8: anchors and aliases"),
        ("names: [!!timestamp x]", "line 1, column 9: a tag"),
        (f"names: {'[' * 100_000}", "nested more than 32 deep"),
        ("names: []", "no class names"),
        ("names: [a, b, a]", "two classes are called 'a'"),
        ("names: ['', b, '']", "two classes are called ''"),
        ("names: [a, b]\nkpt_shape: [x]", r"kpt_shape\[0\]: expected"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_class_names_are_refused(yolo, tmp_path, content, message):
    (yolo / "data.yaml").write_text(content)
    with pytest.raises(InputError, match=rf"data\.yaml: .*{message}"):
        convert_yolo(yolo, tmp_path / "out")


def test_of_a_pose_the_box_is_taken(yolo, tmp_path):
    (yolo / "data.yaml").write_text("names: [cat, dog]\nkpt_shape: [4, 3]\n")
    pose = "1 0.5 0.5 0.25 0.2 " + "0.4 0.4 2 " * 4
    for name in ("train/a.txt", "val/c.txt"):
        (yolo / "labels" / name).write_text(pose)
    train, _ = convert_yolo(yolo, tmp_path / "out")
    (row,) = json.loads(train.annotations_file.read_text())["annotations"]
    assert row["bbox"] == [15, 12, 10, 6]
    assert "segmentation" not in row
    (yolo / "labels" / "val" / "c.txt").write_text("1 0.5 0.5 0.25 0.2\n")
    _, val = convert_yolo(yolo, tmp_path / "out")
    assert json.loads(val.annotations_file.read_text())["annotations"][0]["bbox"] == [15, 12, 10, 6], "a box alone"
    (yolo / "labels" / "val" / "c.txt").write_text("1 0.5 0.5 0.25 0.2 0.4 0.4\n")
    with pytest.raises(InputError, match=r"c\.txt:1: .*with 12 values of keypoints, as `kpt_shape` says, found 7"):
        convert_yolo(yolo, tmp_path / "out")


@pytest.mark.parametrize("shape", ["", " null", " []"])
def test_an_empty_shape_of_keypoints_is_none(yolo, tmp_path, shape):
    (yolo / "data.yaml").write_text(f"names: [cat, dog]\nkpt_shape:{shape}\n")
    assert convert_yolo(yolo, tmp_path / "out")[0].num_boxes == 2


@pytest.mark.parametrize(
    "text",
    [
        "names : [cat, dog]\n",
        "  names:\n    - cat\n    - dog\n  nc: 2\n",
        "--- {names: [cat, dog]}\n",
        '"names" : [cat, dog]\n',
        "# ours\nnc: 2\nnames: {0: cat, 1: dog}\n",
    ],
)
def test_names_are_found_in_any_yaml_that_has_them(yolo, tmp_path, text):
    (yolo / "data.yaml").rename(yolo / ".data.yaml")
    (yolo / "animals.yaml").write_text(text)
    (yolo / "a.yml").write_text("note: names are in the other file\n")
    assert convert_yolo(yolo, tmp_path / "out")[0].class_names == ("cat", "dog")


@pytest.mark.parametrize("name", ["data.yaml", "data.yml", "animals.yaml"])
def test_a_yaml_of_something_else_may_be_anything(yolo, tmp_path, name):
    (yolo / "data.yaml").rename(yolo / name)
    (yolo / "a_note.yaml").write_bytes("# résumé".encode("latin-1"))
    (yolo / ".hidden.yml").write_bytes(b"\xff\xfe\x00")
    assert convert_yolo(yolo, tmp_path / "out")[0].class_names == ("猫", "dog")
    (yolo / name).unlink()
    with pytest.raises(InputError, match=r"no class names: add data\.yaml .*\(.*a_note\.yaml"):
        convert_yolo(yolo, tmp_path / "out")


def test_class_names_are_found_beside_a_yaml_of_something_else(yolo, tmp_path):
    (yolo / "data.yaml").unlink()
    (yolo / "config.yaml").write_text("epochs: 3\n")
    (yolo / "a.yaml").write_text("names: {db: mine, web: yours}\n")
    (yolo / "env.yaml").write_text("names: null\n")
    (yolo / "classes.txt").write_text("cat\ndog\n\n")
    assert convert_yolo(yolo, tmp_path / "out")[0].class_names == ("cat", "dog")
    (yolo / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(InputError, match=r"classes\.txt:2: an empty line among the class names"):
        convert_yolo(yolo, tmp_path / "out")


def test_missing_yolo_parts_are_refused(yolo, tmp_path):
    with pytest.raises(InputError, match="absent: no such folder"):
        convert_yolo(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(InputError, match="no images in this folder"):
        convert_yolo(yolo, tmp_path / "out", yolo / "labels")
    (yolo / "images" / "val" / "c.jpg").unlink()
    with pytest.raises(InputError, match=r"c\.txt: no image c\.\* in"):
        convert_yolo(yolo, tmp_path / "out")
    for path in yolo.rglob("*.txt"):
        path.unlink()
    with pytest.raises(InputError, match="no YOLO data set"):
        convert_yolo(yolo, tmp_path / "out")
    (yolo / "data.yaml").unlink()
    with pytest.raises(InputError, match="no class names: add"):
        convert_yolo(yolo, tmp_path / "out")


@pytest.mark.parametrize("layout", ["beside", "deep", "elsewhere", "other folders"])
def test_yolo_labels_are_found_in_any_layout(tmp_path, layout):
    folder, images = tmp_path / "set", None
    image, text = {
        "beside": ("obj_train_data/a.jpg", "obj_train_data/a.txt"),
        "deep": ("farm/images/train/a.jpg", "farm/labels/train/a.txt"),
        "elsewhere": ("../photos/2024/a.jpg", "labels/a.txt"),
        "other folders": ("pictures/a.jpg", "boxes/a.txt"),
    }[layout]
    if layout == "elsewhere":
        images = tmp_path / "photos"
    save_image(folder / image, 40, 30)
    save_image((folder / image).with_name("b.jpg"), 40, 30)
    (folder / text).parent.mkdir(parents=True, exist_ok=True)
    (folder / text).write_text("0 0.5 0.5 0.5 0.5\n")
    (folder / text).with_name("classes.txt").write_text("cat\n")
    (converted,) = convert_yolo(folder, tmp_path / "out", images)
    assert (converted.num_images, converted.num_boxes, converted.class_names) == (2, 1, ("cat",))
    assert converted.annotations_file.stem == ("train" if layout == "deep" else "all")
    document = json.loads(converted.annotations_file.read_text())
    assert document["annotations"][0]["bbox"] == [10, 7.5, 20, 15]
    assert document["images"][0]["file_name"] == "a.jpg"


def test_a_label_file_that_may_be_of_two_images_is_refused(yolo, tmp_path):
    save_image(yolo / "images" / "train" / "a.png", 40, 30)
    with pytest.raises(InputError, match=r"a\.txt: it may belong to .*a\.jpg or .*a\.png"):
        convert_yolo(yolo, tmp_path / "out")


def test_folders_in_images_with_a_partner_in_labels_are_splits(yolo, tmp_path):
    for kind in ("images", "labels"):
        (yolo / kind / "train").rename(yolo / kind / "train2017")
        (yolo / kind / "val").rename(yolo / kind / "val2017")
    assert [own.annotations_file.stem for own in convert_yolo(yolo, tmp_path / "out")] == ["train2017", "val2017"]


def test_an_image_name_that_is_not_utf_8_is_refused(yolo, tmp_path):
    (yolo / "images" / "train" / os.fsdecode(b"caf\xe9.jpg")).symlink_to(next((yolo / "images" / "train").iterdir()))
    with pytest.raises(InputError, match=r"name of 'caf.*jpg' is not UTF-8; rename the file"):
        convert_yolo(yolo, tmp_path / "out")


def test_converted_files_can_be_loaded(yolo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for converted in convert_yolo(yolo, tmp_path / "out"):
        dataset = load_coco(converted.annotations_file, converted.image_folder, keep_empty=True)
        assert len(dataset) == converted.num_images
        assert dataset.class_names == converted.class_names


def test_an_image_without_labels_takes_none_of_one_whose_name_is_in_another_case(yolo, tmp_path):
    save_image(yolo / "images" / "train" / "A.jpg", 40, 30)
    (train, _) = convert_yolo(yolo, tmp_path / "out")
    rows = json.loads(train.annotations_file.read_text())
    names = {row["id"]: row["file_name"] for row in rows["images"]}
    assert sorted(names.values()) == ["A.jpg", "a.jpg", "sub/b.png"]
    assert {names[row["image_id"]] for row in rows["annotations"]} == {"a.jpg"}


def test_labels_near_an_image_come_before_those_of_its_exact_name_in_another_split(yolo, tmp_path):
    (yolo / "labels" / "train" / "a.txt").rename(yolo / "labels" / "train" / "A.txt")
    save_image(yolo / "images" / "val" / "a.jpg", 40, 30)
    (yolo / "labels" / "val" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    train, val = convert_yolo(yolo, tmp_path / "out")
    assert (train.num_boxes, val.num_boxes) == (2, 2)


def test_labels_of_one_name_in_two_folders_that_match_none_are_refused(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        save_image(tmp_path / "set" / "pictures" / name, 40, 30)
    for place in ("one/a.txt", "two/a.txt", "three/b.txt"):
        file = tmp_path / "set" / place
        file.parent.mkdir()
        file.write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "set" / "classes.txt").write_text("cat\n")
    with pytest.raises(InputError, match=r"a\.jpg: its labels may be .*one/a\.txt or .*two/a\.txt: keep one"):
        convert_yolo(tmp_path / "set", tmp_path / "out")
