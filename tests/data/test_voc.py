import json

import pytest

from data_factories import SHARED_DATA, needs_shared_data, save_image
from megdet.data.check import check_dataset
from megdet.data.coco import load_coco
from megdet.data.formats.voc import convert_voc
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
    folder = _voc(tmp_path / "voc", objects, {"train": ["my photo 1", "other"], "val": ["my photo  -1"]})
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
        ("ImageSets/Main/val.txt", "a\nzebra 1\n", r"Annotations/zebra 1\.xml: no such file"),
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


def test_an_image_of_another_size_than_its_xml_says_is_refused_before_anything_is_written(voc, tmp_path):
    save_image(voc / "JPEGImages" / "a.jpg", 20, 15)
    with pytest.raises(InputError, match=r"a\.xml: it says 40 x 30 pixels, but .*a\.jpg has 20 x 15: label the image"):
        convert_voc(voc, tmp_path / "out")
    save_image(voc / "JPEGImages" / "a.jpg", 40, 30, orientation=6)  # and so boxes from before it was turned
    with pytest.raises(InputError, match=r"a\.xml: it says 40 x 30 pixels, but .*a\.jpg has 30 x 40"):
        convert_voc(voc, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert convert_voc(voc, tmp_path / "out", ["train"])[0].num_images == 2


@pytest.mark.parametrize(
    "size", ["", "<size/>", "<size><width>0</width><height>0</height></size>", "<size><width>40</width></size>"]
)
def test_the_size_of_an_image_is_read_where_the_xml_has_none(voc, tmp_path, size):
    (voc / "Annotations" / "b.xml").write_text(f"<a>{size}{_voc_object('dog', (1, 1, 40, 30))}</a>")
    converted = convert_voc(voc, tmp_path / "out", ["train"])[0]
    rows = json.loads(converted.annotations_file.read_text())["images"]
    assert [(row["width"], row["height"]) for row in rows] == [(40, 30)] * 2


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


def test_converted_files_can_be_loaded(voc, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for converted in convert_voc(voc, tmp_path / "out"):
        dataset = load_coco(converted.annotations_file, converted.image_folder, keep_empty=True)
        assert len(dataset) == converted.num_images
        assert dataset.class_names == converted.class_names
