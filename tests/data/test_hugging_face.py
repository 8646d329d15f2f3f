"""Data sets of the library `datasets`, in the forms that its versions and users write."""

import io
import json

import pytest
from PIL import Image

from megdet.data.formats.hugging_face import convert_hugging_face
from megdet.errors import InputError

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")
BOXES = [[[1.25, 2.0, 10.0, 20.5], [0.0, 0.0, 40.0, 30.0]], []]


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rows(boxes=BOXES, classes=((1, 0), ()), column="objects"):
    pictures = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    objects = [{"bbox": own, "category": list(labels)} for own, labels in zip(boxes, classes, strict=True)]
    return {"image": pictures, column: objects, "note": ["a", "b"]}


def features(class_type, column="objects"):
    own = {"bbox": datasets.List(datasets.List(datasets.Value("float32"), 4)), "category": datasets.List(class_type)}
    return datasets.Features({"image": datasets.Image(), column: own, "note": datasets.Value("string")})


def saved(tmp_path, content, kinds, split=""):
    made = datasets.Dataset.from_dict(content, features=kinds)
    made = datasets.DatasetDict({split: made}) if split else made
    made.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def boxes_of(part):
    document = json.loads(part.annotations_file.read_text())
    names = {row["id"]: row["name"] for row in document["categories"]}
    assert [row["file_name"] for row in document["images"]] == ["000000.png", "000001.png"]
    return [(row["image_id"], names[row["category_id"]], row["bbox"]) for row in document["annotations"]]


WANTED = [(1, "dog", [1.25, 2, 10, 20.5]), (1, "cat", [0, 0, 40, 30])]


def test_boxes_with_named_classes_come_back(tmp_path):
    source = saved(tmp_path, rows(), features(datasets.ClassLabel(names=["cat", "dog", "cow"])), "train")
    (part,) = convert_hugging_face(source, tmp_path / "out")
    assert (part.annotations_file.stem, part.class_names) == ("train", ("cat", "dog", "cow"))
    assert boxes_of(part) == WANTED
    with Image.open(part.image_folder / "000001.png") as image:
        assert image.getpixel((0, 0)) == (0, 0, 255)


def test_texts_as_classes_corners_and_other_columns(tmp_path):
    corners = [[[1.25, 2.0, 11.25, 22.5], [0.0, 0.0, 40.0, 30.0]], []]
    content = rows(corners, [("dog", "cat"), ()], "annotations")
    source = saved(tmp_path, content, features(datasets.Value("string"), "annotations"))
    (part,) = convert_hugging_face(source, tmp_path / "out", "xyxy")
    assert part.annotations_file.stem == "all"
    assert boxes_of(part) == WANTED


def test_a_list_of_objects_is_read_like_an_object_of_lists(tmp_path):
    objects = [[{"bbox": box, "label": label} for box, label in zip(BOXES[0], (1, 0), strict=True)], []]
    item = {"bbox": datasets.List(datasets.Value("float32")), "label": datasets.ClassLabel(names=["cat", "dog"])}
    kinds = datasets.Features({"image": datasets.Image(), "objects": datasets.List(item)})
    (part,) = convert_hugging_face(saved(tmp_path, {"image": rows()["image"], "objects": objects}, kinds), tmp_path)
    assert boxes_of(part) == WANTED


def test_a_folder_of_images_with_metadata_is_read(tmp_path):
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    lines = []
    for number, image in enumerate(rows()["image"]):
        image.save(folder / f"{number}.png")
        objects = {"bbox": BOXES[number], "category": [["dog", "cat"], []][number]}
        lines.append(json.dumps({"file_name": f"{number}.png", "objects": objects}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (part,) = convert_hugging_face(str(tmp_path / "folder"), tmp_path / "out")
    assert boxes_of(part) == WANTED


def test_an_image_without_objects_may_have_none_instead_of_lists(tmp_path):
    content = rows()
    content["objects"][1] = None
    (part,) = convert_hugging_face(saved(tmp_path, content, features(datasets.Value("string"))), tmp_path / "out")
    assert part.num_images == 2
    content["objects"][1] = {"bbox": [], "category": None}
    source = saved(tmp_path / "empty", content, features(datasets.Value("string")))
    assert convert_hugging_face(source, tmp_path / "out")[0].num_images == 2
    content["image"][1] = None
    source = saved(tmp_path / "none", content, features(datasets.Value("string")))
    with pytest.raises(InputError, match="row 1: it has no image"):
        convert_hugging_face(source, tmp_path / "again")


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (rows([[[30.0, 2.0, 35.0, 20.0]], []], [(0,), ()]), "class", "split all, row 0: the box .* give --corners"),
        (rows(classes=((1, 7), ())), "int", None),
        (rows(classes=(("a", ""), ())), "text", "row 0: an object has no class"),
    ],
)
def test_bad_rows_are_refused_with_split_and_number(tmp_path, content, kind, message):
    kinds = {
        "class": datasets.ClassLabel(names=["cat", "dog"]),
        "int": datasets.Value("int64"),
        "text": datasets.Value("string"),
    }
    source = saved(tmp_path, content, features(kinds[kind]))
    if message is None:
        assert convert_hugging_face(source, tmp_path / "out")[0].class_names == ("1", "7")
        return
    with pytest.raises(InputError, match=message):
        convert_hugging_face(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": None}, "row 0: 1 boxes in bbox and 0 classes in category"),
        ({"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["a", "b"]}, "row 0: 1 boxes in bbox and 2 classes in category"),
        ({"bbox": [None], "category": ["a"]}, "row 0: a box is None: four numbers are expected"),
    ],
)
def test_missing_parts_of_objects_are_refused(tmp_path, objects, message):
    item = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "category": datasets.List(datasets.Value("string")),
    }
    kinds = datasets.Features({"image": datasets.Image(), "objects": item})
    source = saved(tmp_path, {"image": rows()["image"][:1], "objects": [objects]}, kinds)
    with pytest.raises(InputError, match=message):
        convert_hugging_face(source, tmp_path / "out")


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_for_all_boxes_of_a_row_is_refused(tmp_path, label):
    kinds = {
        "image": datasets.Image(),
        "bbox": datasets.List(datasets.Value("float32")),
        "category": datasets.Value("int64"),
    }
    content = {"image": rows()["image"][:1], "bbox": [[1.0, 1, 2, 2]], "category": [label]}
    source = saved(tmp_path, content, datasets.Features(kinds))
    with pytest.raises(InputError, match=f"row 0: bbox is .* and category is {label}: a list of boxes and a list of"):
        convert_hugging_face(source, tmp_path / "out")


def test_an_image_with_neither_content_nor_path_is_refused(tmp_path):
    kinds = datasets.Features(
        {
            "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
            "label": datasets.List(datasets.Value("string")),
        }
    )
    content = {"image": [{"bytes": None, "path": None}], "bbox": [[]], "label": [[]]}
    plain = datasets.Dataset.from_dict(content, features=kinds)
    told = plain.cast_column("image", datasets.Image()).features.arrow_schema.metadata
    (tmp_path / "saved").mkdir()
    parquet.write_table(plain.data.table.replace_schema_metadata(told), tmp_path / "saved" / "train.parquet")
    with pytest.raises(InputError, match="row 0: it has no image"):
        convert_hugging_face(str(tmp_path / "saved"), tmp_path / "out")


def test_what_is_no_data_set_of_boxes_is_refused(tmp_path):
    with pytest.raises(InputError, match="`datasets` cannot load it"):
        convert_hugging_face(str(tmp_path / "absent"), tmp_path / "out")
    made = datasets.Dataset.from_dict({"text": ["a"]})
    made.save_to_disk(tmp_path / "texts")
    with pytest.raises(InputError, match="0 columns are images"):
        convert_hugging_face(str(tmp_path / "texts"), tmp_path / "out")


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("is_list_of_objects", [False, True])
def test_a_set_that_was_saved_with_arrays_as_its_format_is_read(tmp_path, kind, is_list_of_objects):
    names = datasets.ClassLabel(names=["cat", "dog", "cow"])
    content, kinds = rows(), features(names)
    if is_list_of_objects:
        own = {"bbox": datasets.List(datasets.Value("float64"), 4), "category": names}
        kinds["objects"] = datasets.List(own)
        content["objects"] = [
            [{"bbox": box, "category": label} for box, label in zip(boxes["bbox"], boxes["category"], strict=True)]
            for boxes in content["objects"]
        ]
    datasets.Dataset.from_dict(content, features=kinds).with_format(kind).save_to_disk(tmp_path / "saved")
    (part,) = convert_hugging_face(str(tmp_path / "saved"), tmp_path / "out")
    assert boxes_of(part) == WANTED


def test_an_image_that_pillow_refuses_is_named(tmp_path):
    content = rows()
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "png")
    content["image"][1] = {"bytes": huge.getvalue(), "path": None}
    with pytest.raises(InputError, match=r"row 1: its image cannot be read: Image size .* exceeds limit"):
        convert_hugging_face(saved(tmp_path, content, features(datasets.Value("int64"))), tmp_path / "out")
