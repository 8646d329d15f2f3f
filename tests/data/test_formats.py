"""COCO boxes written in the format of each tool, read back, and compared."""

import base64
import csv
import json
import math

import pytest

from data_factories import save_image
from megdet.data.formats.csv_table import convert_csv
from megdet.data.formats.cvat import convert_cvat
from megdet.data.formats.label_studio import convert_label_studio
from megdet.data.formats.labelme import convert_labelme
from megdet.errors import InputError

BOXES = {
    "train/a.jpg": [("dog", (1.25, 2, 10, 20.5)), ("кот", (0, 0, 40, 30))],
    "train/deep/b.png": [("dog", (5, 6.75, 7, 8))],
    "train/empty.jpg": [],
    "val/a.jpg": [("кот", (3, 3, 30, 20))],
}
"""Boxes x, y, width, height of images of 40 x 30; two images have one name."""
SIZE = (40, 30)
POLYGON = [1, 2, 11, 2, 11, 22.5]


@pytest.fixture
def photos(tmp_path):
    for name in BOXES:
        save_image(tmp_path / "photos" / name, *SIZE)
    return tmp_path / "photos"


def write_csv(folder, photos):
    """TensorFlow's table, in pixels."""
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"])
        for name, rows in BOXES.items():
            for label, (x, y, w, h) in rows:
                writer.writerow([name, *SIZE, label, x, y, x + w, y + h])
            if not rows:
                writer.writerow([name, *SIZE, "", "", "", "", ""])


def write_open_images(folder, photos):
    """Parts of an image, names of classes in a table of their own, images named without an ending."""
    ids = {"dog": "/m/0bt9lr", "кот": "/m/01yrx"}
    (folder / "class-descriptions-boxable.csv").write_text("".join(f"{i},{n}\n" for n, i in ids.items()), "utf-8")
    with (folder / "all-annotations-bbox.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", "IsGroupOf"])
        for name, rows in BOXES.items():
            stem = name.rsplit(".", 1)[0]
            for label, (x, y, w, h) in rows:
                writer.writerow([stem, "x", ids[label], 1, x / 40, (x + w) / 40, y / 30, (y + h) / 30, 0])
            if not rows:
                writer.writerow([stem, "x", "", 1, "", "", "", "", 0])


def write_labelme(folder, photos):
    for name, rows in BOXES.items():
        shapes = [
            {"label": label, "points": [[x + w, y + h], [x, y]], "shape_type": "rectangle", "group_id": None}
            for label, (x, y, w, h) in rows
        ]
        content = {"version": "5.4", "shapes": shapes, "imagePath": f"..\\photos\\{name}".replace("/", "\\")}
        data = base64.b64encode((photos / name).read_bytes()).decode()
        path = folder / f"{name.replace('/', '_')}.json"
        path.write_text(json.dumps({**content, "imageData": data, "imageHeight": 30, "imageWidth": 40}))


def write_cvat(folder, photos):
    images = []
    for number, (name, rows) in enumerate(BOXES.items()):
        boxes = [
            f'<box label="{label}" occluded="0" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}" z_order="0"></box>'
            for label, (x, y, w, h) in rows
        ]
        images.append(f'<image id="{number}" name="{name}" width="40" height="30">{"".join(boxes)}</image>')
    labels = "<labels><label><name>dog</name></label><label><name>кот</name></label></labels>"
    text = f"<annotations><version>1.1</version><meta><job>{labels}</job></meta>{''.join(images)}</annotations>"
    (folder / "annotations.xml").write_text(f'<?xml version="1.0" encoding="utf-8"?>{text}', encoding="utf-8")


def regions(rows, kind="rectanglelabels"):
    sizes = {"original_width": 40, "original_height": 30}
    return [
        {
            "type": kind,
            **sizes,
            "value": {
                "x": x / 0.4,
                "y": y / 0.3,
                "width": w / 0.4,
                "height": h / 0.3,
                "rotation": 0,
                kind: [label],
            },
        }
        for label, (x, y, w, h) in rows
    ]


def write_label_studio(folder, photos):
    """The second image has the prefix of an upload, the first two are local files."""
    tasks = []
    for name, rows in BOXES.items():
        address = f"/data/local-files/?d=photos/{name}"
        if name == "train/deep/b.png":
            address = "/data/upload/1/0a1b2c3d-b.png"
        result = [*regions(rows), {"type": "choices", "value": {"choices": ["sharp"]}}]
        annotations = [{"result": result}, {"result": [], "was_cancelled": True}]
        tasks.append({"id": 1, "data": {"image": address, "note": "x"}, "annotations": annotations})
    (folder / "export.json").write_text(json.dumps(tasks))


def write_label_studio_min(folder, photos):
    tasks = []
    for name, rows in BOXES.items():
        tasks.append({"image": f"s3://bucket/{name}", "id": 3, "label": [own["value"] for own in regions(rows)]})
    (folder / "export.json").write_text(json.dumps(tasks))


FORMATS = {
    "csv": (write_csv, convert_csv),
    "open-images": (write_open_images, convert_csv),
    "labelme": (write_labelme, convert_labelme),
    "cvat": (write_cvat, convert_cvat),
    "label-studio": (write_label_studio, convert_label_studio),
    "label-studio-min": (write_label_studio_min, convert_label_studio),
}


def boxes_of(converted):
    """As `BOXES`, from the COCO files; every number in them must be rounded to a thousandth."""
    found = {}
    for part in converted:
        document = json.loads(part.annotations_file.read_text(encoding="utf-8"))
        names = {row["id"]: row["name"] for row in document["categories"]}
        paths = {row["id"]: part.image_folder / row["file_name"] for row in document["images"]}
        assert all(path.is_file() for path in paths.values())
        assert {(row["width"], row["height"]) for row in document["images"]} == {SIZE}
        found[part.annotations_file.stem] = {
            str(path): [
                (names[row["category_id"]], tuple(row["bbox"]))
                for row in document["annotations"]
                if row["image_id"] == image_id
            ]
            for image_id, path in paths.items()
        }
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_boxes_come_back_from_every_format(photos, tmp_path, name):
    write, convert = FORMATS[name]
    labels = tmp_path / "labels"
    labels.mkdir()
    write(labels, photos)
    found = boxes_of(convert(labels, tmp_path / "out", photos))
    assert set(found) == {"train", "val"}
    wanted = {str(photos / name): rows for name, rows in BOXES.items()}
    read = found["train"] | found["val"]
    assert set(read) == set(wanted)
    for path, rows in wanted.items():
        assert [label for label, _ in read[path]] == [label for label, _ in rows]
        for (_, box), (_, own) in zip(read[path], rows, strict=True):
            assert box == pytest.approx(own, abs=1e-3)


def test_outlines_become_boxes_with_a_segmentation(photos, tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    points = [POLYGON[i : i + 2] for i in (0, 2, 4)]
    shape = {"label": "dog", "points": points}
    far = {"label": "dog", "points": [[20, 20], [30, 20], [30, 29]], "group_id": 1}
    circle = {"label": "dog", "points": [[20, 15], [23, 19]], "shape_type": "circle"}
    content = {"imagePath": "val/a.jpg", "shapes": [shape, {**shape, "group_id": 1}, far, circle]}
    (folder / "a.json").write_text(json.dumps(content))
    (labelme,) = convert_labelme(folder, tmp_path / "labelme", photos)
    one, two, three = json.loads(labelme.annotations_file.read_text())["annotations"]
    assert (one["bbox"], one["segmentation"]) == ([1, 2, 10, 20.5], [POLYGON])
    assert two["bbox"] == [1, 2, 29, 27]
    assert len(two["segmentation"]) == 2
    assert three["bbox"] == [15, 10, 10, 10]  # radius 5, of 3 and 4
    assert "segmentation" not in three

    text = "".join(f"{x},{y};" for x, y in points).rstrip(";")
    image = f'<image name="val/a.jpg" subset="Test"><polygon label="dog" points="{text}"/><ellipse label="dog" '
    image += 'cx="20" cy="15" rx="3" ry="4"/>'
    image += '<ellipse label="dog" cx="20" cy="15" rx="3" ry="8" rotation="90"/>'
    image += '<mask label="dog" rle="1" left="2" top="3" width="4" height="5"/>'
    image += '<box label="dog" xtl="10" ytl="10" xbr="20" ybr="14" rotation="90"/><tag label="x"/></image>'
    (folder / "a.xml").write_text(f"<annotations>{image}</annotations>")
    (cvat,) = convert_cvat(folder / "a.xml", tmp_path / "cvat", photos)
    assert cvat.annotations_file.stem == "Test"
    rows = json.loads(cvat.annotations_file.read_text())["annotations"]
    assert rows[0]["segmentation"] == [POLYGON]
    # a box of 10 x 4 that is turned by 90 degrees about its centre (15, 12)
    assert [row["bbox"] for row in rows] == [
        [1, 2, 10, 20.5],
        [17, 11, 6, 8],
        [12, 12, 16, 6],
        [2, 3, 4, 5],
        [13, 7, 4, 10],
    ]

    polygon = {"points": [[x / 0.4, y / 0.3] for x, y in points], "polygonlabels": ["dog"]}
    # 8 x 6 px, turned by 90 degrees clockwise about its upper left corner (20, 10): x from 14 to 20, y from 10 to 18
    turned = {"x": 50, "y": 100 / 3, "width": 20, "height": 20, "rotation": 90, "labels": ["dog"]}
    ellipse = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 10, "rotation": 90, "ellipselabels": ["dog"]}
    result = [
        {"type": "polygonlabels", "value": polygon},
        {"type": "labels", "value": turned},
        {"type": "ellipselabels", "value": ellipse},
        {"type": "relation", "from_id": "a", "to_id": "b", "direction": "right"},
    ]
    (folder / "a.json").write_text(json.dumps([{"data": {"image": "val/a.jpg"}, "annotations": [{"result": result}]}]))
    (studio,) = convert_label_studio(folder / "a.json", tmp_path / "studio", photos)
    rows = json.loads(studio.annotations_file.read_text())["annotations"]
    assert rows[0]["segmentation"] == [POLYGON]
    assert [row["bbox"] for row in rows] == [[1, 2, 10, 20.5], [14, 10, 6, 8], [17, 11, 6, 8]]


def test_tables_of_one_name_belong_to_the_splits_of_their_folders(tmp_path):
    for split, label in (("train", "dog"), ("valid", "cat"), ("test", "cat")):
        save_image(tmp_path / "in" / split / f"{split}.jpg", *SIZE)
        text = f"filename,class,xmin,ymin,xmax,ymax\n{split}.jpg,{label},1,2,3,4\n"
        (tmp_path / "in" / split / "_annotations.csv").write_text(text)
    found = convert_csv(tmp_path / "in", tmp_path / "out")
    assert [(own.annotations_file.stem, own.num_images) for own in found] == [("test", 1), ("train", 1), ("valid", 1)]
    (alone,) = convert_csv(tmp_path / "in" / "valid" / "_annotations.csv", tmp_path / "alone")
    assert alone.num_images == 1


def test_parts_of_an_image_may_be_rounded_beyond_it(photos, tmp_path):
    text = "image,label,x1,y1,x2,y2\ntrain/a.jpg,dog,0.5,0.1,1.0002,0.4\n"
    (tmp_path / "labels.csv").write_text(text)
    (found,) = convert_csv(tmp_path / "labels.csv", tmp_path / "out", photos)
    assert json.loads(found.annotations_file.read_text())["annotations"][0]["bbox"] == [20, 3, 20.008, 9]


def test_several_tables_are_splits_and_groups_are_crowds(photos, tmp_path):
    header = "image,label,x1,y1,x2,y2,IsGroupOf\n"
    (photos / "train_labels.csv").write_text(header + "a.jpg,dog,1,2,3,4,1\n".replace("a.jpg", "train/a.jpg"))
    (photos / "test_labels.csv").write_text(header + "val/a.jpg,cat,1,2,3,4,0\n")
    test, train = convert_csv(photos, tmp_path / "out")
    assert (test.annotations_file.stem, train.annotations_file.stem) == ("test", "train")
    assert test.class_names == train.class_names == ("cat", "dog")
    assert [json.loads(own.annotations_file.read_text())["annotations"][0]["iscrowd"] for own in (test, train)] == [
        0,
        1,
    ]
    (photos / "train_2.csv").write_text(
        header + "train/deep/b.png,dog,1,2,3,4,0\n"
    )  # two of one split keep their names
    names = [own.annotations_file.stem for own in convert_csv(photos, tmp_path / "three")]
    assert names == ["test", "train_2", "train_labels"]
    (photos / "train_2.csv").unlink()
    (photos / "test_labels.csv").unlink()
    (train,) = convert_csv(photos, tmp_path / "alone")
    assert train.annotations_file.stem == "train"


def test_an_image_in_two_tables_is_refused_with_what_to_convert(photos, tmp_path):
    for name in ("all_labels.csv", "train_labels.csv"):
        (photos / name).write_text("image,label,x1,y1,x2,y2\ntrain/a.jpg,dog,1,2,3,4\n")
    with pytest.raises(
        InputError, match=r"train_labels.csv:2: .*a.jpg is in .*all_labels.csv:2 too: convert one table"
    ):
        convert_csv(photos, tmp_path / "out")


def test_images_that_lie_elsewhere_are_asked_for(photos, tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.csv").write_text("image,label,x1,y1,x2,y2\ntrain/a.jpg,dog,1,2,3,4\n")
    with pytest.raises(InputError, match=r"tables: no images in this folder .*: give theirs by --images FOLDER"):
        convert_csv(tmp_path / "tables", tmp_path / "out")


def test_a_rotated_ellipse_is_bounded_by_arithmetic(photos, tmp_path):
    value = {"x": 50, "y": 50, "radiusX": 25, "radiusY": 10, "rotation": 30, "ellipselabels": ["dog"]}
    result = {"type": "ellipselabels", "value": value}
    (tmp_path / "a.json").write_text(
        json.dumps([{"data": {"image": "val/a.jpg"}, "annotations": [{"result": [result]}]}])
    )
    (studio,) = convert_label_studio(tmp_path / "a.json", tmp_path / "out", photos)
    (row,) = json.loads(studio.annotations_file.read_text())["annotations"]
    turns = [2 * math.pi * k / 100_000 for k in range(100_000)]  # the outline, point by point: radii 10 and 3
    xs = [20 + 10 * math.cos(t) * math.cos(math.pi / 6) - 3 * math.sin(t) * math.sin(math.pi / 6) for t in turns]
    assert row["bbox"][0] == pytest.approx(min(xs), abs=1e-3)
    assert row["bbox"][2] == pytest.approx(max(xs) - min(xs), abs=1e-3)
