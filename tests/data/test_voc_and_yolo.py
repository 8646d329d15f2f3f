import json
import os

import pytest

from data_factories import SHARED_DATA, needs_shared_data, save_image
from megdet.data.check import check_dataset
from megdet.data.coco import load_coco
from megdet.data.formats.voc import convert_voc
from megdet.data.formats.yolo import convert_yolo
from megdet.errors import InputError


def _voc_object(name, corners, difficult=0):
    box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"


def _voc(folder, objects, splits):
    """A Pascal VOC folder of 40 x 30 images."""
    for stem, rows in objects.items():
        save_image(folder / "JPEGImages" / f"{stem}.jpg", 40, 30)
        (folder / "Annotations").mkdir(exist_ok=True)
        size = "<size><width>40</width><height>30</height></size>"
        text = f"<annotation><filename>other.png</filename>{size}{''.join(rows)}</annotation>"
        (folder / "Annotations" / f"{stem}.xml").write_text(text, encoding="utf-8")
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split, stems in splits.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return folder


@pytest.fixture
def voc(tmp_path):
    objects = {
        "b": [_voc_object("dog", (1, 1, 40, 30)), _voc_object("кот", (5, 6, 10, 16), difficult=1)],
        "a": [_voc_object("ant", (3, 3, 3, 3))],
        "c": [],
    }
    return _voc(tmp_path / "voc", objects, {"train": ["b", "c"], "val": ["a"], "dog_train": ["b  1", "c -1"]})


def test_voc_corners_count_from_one_and_include_the_last_pixel(voc, tmp_path):
    train, val = convert_voc(voc, tmp_path / "out")
    assert train.annotations_file == tmp_path / "out" / "annotations" / "train.json"
    assert train.image_folder == voc / "JPEGImages"
    assert (train.num_images, train.num_boxes, train.class_names) == (2, 2, ("ant", "dog", "кот"))
    document = json.loads(train.annotations_file.read_text(encoding="utf-8"))
    assert [row["bbox"] for row in document["annotations"]] == [[0, 0, 40, 30], [4, 5, 6, 11]]
    assert [row["area"] for row in document["annotations"]] == [1200, 66]
    assert [row["category_id"] for row in document["annotations"]] == [2, 3]
    assert [(row["iscrowd"], row["difficult"]) for row in document["annotations"]] == [(0, 0), (0, 1)]
    assert [(row["id"], row["file_name"]) for row in document["images"]] == [(2, "b.jpg"), (3, "c.jpg")]
    assert json.loads(val.annotations_file.read_text())["annotations"][0]["bbox"] == [2, 2, 1, 1]


def test_voc_edges_counted_from_zero_are_taken_as_they_are(voc, tmp_path):
    (converted,) = convert_voc(voc, tmp_path / "out", ["train"], zero_based=True, difficult_as_crowd=True)
    rows = json.loads(converted.annotations_file.read_text())["annotations"]
    assert [row["bbox"] for row in rows] == [[1, 1, 39, 29], [5, 6, 5, 10]]
    assert [row["iscrowd"] for row in rows] == [0, 1]


def test_a_class_list_of_voc_2012_is_a_split_when_asked_for(voc, tmp_path):
    (converted,) = convert_voc(voc, tmp_path / "out", ["dog_train"])
    assert converted.num_images == 2


def test_names_with_spaces_are_whole_lines(tmp_path):
    objects = {"my photo 1": [], "my photo": [], "other": []}
    folder = _voc(tmp_path / "voc", objects, {"train": ["my photo 1", "other 1"], "val": ["my photo  -1"]})
    train, val = convert_voc(folder, tmp_path / "out")
    named = [
        [row["file_name"] for row in json.loads(own.annotations_file.read_text())["images"]] for own in (train, val)
    ]
    assert named == [["my photo 1.jpg", "other.jpg"], ["my photo.jpg"]]


def test_voc_without_image_sets_is_one_split(voc, tmp_path):
    for path in (voc / "ImageSets" / "Main").iterdir():
        path.unlink()
    (converted,) = convert_voc(voc, tmp_path / "out")
    assert (converted.annotations_file.name, converted.num_images, converted.num_boxes) == ("all.json", 3, 3)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("Annotations/b.xml", "<annotation>", r"b\.xml: not valid XML: .* line 1"),
        ("Annotations/b.xml", "<a><object></object></a>", r"b\.xml: object 1 has no name"),
        ("Annotations/b.xml", "<a><object><name>x</name></object></a>", r"b\.xml: object 1 \(x\) needs a bndbox"),
        ("Annotations/b.xml", f"<a>{_voc_object('x', (1, 'nan', 3, 4))}</a>", r"b\.xml: object 1 \(x\) needs a bndbox"),
        (
            "Annotations/b.xml",
            f"<a>{_voc_object('x', (5, 1, 4, 3))}</a>",
            r"b\.xml: object 1 \(x\): its second corner lies before the first: \[5\.0, 1\.0, 4\.0, 3\.0\]",
        ),
        ("ImageSets/Main/val.txt", "a\na.jpg\n", r"val\.txt: .*a\.xml is named twice"),
        ("ImageSets/Main/val.txt", "a\nzebra 1\n", r"Annotations/zebra\.xml: no such file"),
        ("ImageSets/Main/val.txt", "a\nzebra\n", r"zebra\.xml: no such file, but the split val names it"),
    ],
)
def test_a_malformed_voc_file_is_refused_by_name(voc, tmp_path, file, content, message):
    (voc / file).write_text(content)
    with pytest.raises(InputError, match=message):
        convert_voc(voc, tmp_path / "out")
    with pytest.raises(InputError, match=r"test\.txt: no such split; there are dog_train, train, val"):
        convert_voc(voc, tmp_path / "out", ["test"])


def test_missing_voc_images_and_folders_are_refused(voc, tmp_path):
    (voc / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"no image a\.\* for a\.xml of the split val"):
        convert_voc(voc, tmp_path / "out")
    with pytest.raises(InputError, match="absent: no such folder"):
        convert_voc(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no XML file in this folder or below"):
        convert_voc(tmp_path / "empty", tmp_path / "out")


@needs_shared_data
def test_bccd_fits_its_images_and_its_stray_clicks_are_seen(tmp_path):
    converted = {c.annotations_file.stem: c for c in convert_voc(SHARED_DATA / "bccd" / "BCCD", tmp_path)}
    numbers = {split: (c.num_images, c.num_boxes) for split, c in converted.items()}
    assert numbers == {"train": (205, 2805), "val": (87, 1138), "trainval": (292, 3943), "test": (72, 945)}
    problems = check_dataset(converted["trainval"].annotations_file, converted["trainval"].image_folder)
    assert [(p.kind, p.fatal) for p in problems] == [("tiny box", False)] * 2
    raw = json.loads(converted["trainval"].annotations_file.read_text())
    corners = [(x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in raw["annotations"])]
    low, high = [min(c) for c in zip(*corners, strict=True)], [max(c) for c in zip(*corners, strict=True)]
    assert (low[:2], high[2:]) == ([0, 0], [640, 480])


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


def test_converted_files_can_be_loaded(yolo, voc, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for converted in [*convert_yolo(yolo, tmp_path / "y"), *convert_voc(voc, tmp_path / "v")]:
        dataset = load_coco(converted.annotations_file, converted.image_folder, keep_empty=True)
        assert len(dataset) == converted.num_images
        assert dataset.class_names == converted.class_names


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
    with pytest.raises(InputError, match=r"c\.txt:1: .*and 12 values of keypoints, as `kpt_shape` says, found 5"):
        convert_yolo(yolo, tmp_path / "out")


def test_class_names_are_found_beside_a_yaml_of_something_else(yolo, tmp_path):
    (yolo / "data.yaml").unlink()
    (yolo / "config.yaml").write_text("epochs: 3\n")
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


CHINESE, JAPANESE, RUSSIAN = "犬", "ねこ", "кот"


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        *((encoding, CHINESE) for encoding in ("gb2312", "GBK", "gb18030", "Big5", "utf-8", "UTF-16")),
        *((encoding, JAPANESE) for encoding in ("Shift-JIS", "EUC-JP", "ISO-2022-JP", "cp932")),
        *((encoding, RUSSIAN) for encoding in ("windows-1251", "KOI8-R", "ISO-8859-5")),
        ("EUC-KR", "고양이"),
        ("ISO-8859-1", "café"),
    ],
)
def test_voc_is_read_in_the_encoding_that_it_names(voc, tmp_path, encoding, name):
    text = f'<?xml version="1.0" encoding="{encoding}"?><a>{_voc_object(name, (1, 1, 5, 5))}</a>'
    (voc / "Annotations" / "b.xml").write_bytes(text.encode(encoding))
    assert name in convert_voc(voc, tmp_path / "out")[0].class_names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<?xml version='1.0' encoding='klingon'?><a/>", "its encoding 'klingon' is not known"),
        (b"<?xml version='1.0' encoding='zlib'?><a/>", "its encoding 'zlib' is not known"),
        (b"<?xml version='1.0' encoding='punycode'?><a/>", "its encoding 'punycode' is not known"),
        (b"<?xml version='1.0' encoding='gbk'?><a>\xff</a>", "it names the encoding gbk, but cannot be read so"),
        (b"<a>\xb9\xb7</a>", "it names no encoding and is not UTF-8"),
        (b"<!DOCTYPE a [<!ENTITY b 'bbb'>]><a>&b;</a>", "it defines entities"),
        (b"<!DOCTYPE a [<!ENTITY % b SYSTEM 'file:///etc/passwd'> %b;]><a/>", "it defines entities"),
        (b"<!DOCTYPE a [<!ATTLIST b c CDATA 'ccc'>]><a><b/></a>", "it defines attributes with defaults"),
        (b"<a/>" + b"x" * 30, "not valid XML"),
        (f"<a>{_voc_object('x', (1, 1, 2, '1e308'))}</a>".encode(), "object 1 .x. needs a bndbox of four numbers"),
        (b"\0", "not valid XML"),
        (b"", "not valid XML: no element found"),
    ],
)
def test_xml_that_cannot_be_read_is_refused_by_name(voc, tmp_path, content, message):
    (voc / "Annotations" / "b.xml").write_bytes(content)
    with pytest.raises(InputError, match=rf"b\.xml: {message}"):
        convert_voc(voc, tmp_path / "out")


def test_xml_of_more_bytes_than_any_annotation_has_is_refused_unread(voc, tmp_path):
    with (voc / "Annotations" / "b.xml").open("wb") as file:
        file.truncate((8 << 20) + 1)
    with pytest.raises(InputError, match=r"b\.xml has 8388609 bytes, more than 8388608"):
        convert_voc(voc, tmp_path / "out")


def test_a_folder_that_is_called_like_an_annotation_is_passed_over(voc, tmp_path):
    (voc / "Annotations" / "9.xml").mkdir()
    assert convert_voc(voc, tmp_path / "out")[0].num_images == 2


def test_an_image_name_that_no_file_can_have_is_refused(voc, tmp_path):
    (voc / "JPEGImages" / "b.jpg").unlink()
    (voc / "Annotations" / "b.xml").write_text(f"<a><filename>{'x' * 300}.jpg</filename></a>")
    with pytest.raises(InputError, match="no image b"):
        convert_voc(voc, tmp_path / "out")


def test_an_image_name_that_is_not_utf_8_is_refused(yolo, tmp_path):
    (yolo / "images" / "train" / os.fsdecode(b"caf\xe9.jpg")).symlink_to(next((yolo / "images" / "train").iterdir()))
    with pytest.raises(InputError, match=r"name of 'caf.*jpg' is not UTF-8; rename the file"):
        convert_yolo(yolo, tmp_path / "out")
