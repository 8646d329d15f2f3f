"""Data sets of the Hugging Face library `datasets`: a column with the image, and one with boxes and classes."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from megdet.data.formats.converted import Converted, is_coordinate
from megdet.data.formats.image_files import ImageFiles, refuse_odd_split
from megdet.data.formats.labelled import LabelledImage, LabelledObject, write_labelled
from megdet.data.image import image_size
from megdet.errors import InputError, shown
from megdet.files import cannot_write, make_folder

BoxForm = Literal["xywh", "xyxy"]
_OBJECTS = ("objects", "annotations", "labels")
_BOXES = ("bbox", "bboxes", "boxes", "box")
_CLASSES = ("category", "categories", "label", "labels", "class", "classes", "category_id", "id")
_TOLERANCE = 2.0
"""Pixels by which a box may leave its image before it is taken for one of the other form."""


def convert_hugging_face(source: str, out: Path, form: BoxForm = "xywh") -> list[Converted]:
    """Write the images into `out/images`, and `out/annotations/<split>.json` for each split.

    Args:
        source: a folder written by `save_to_disk` or one of parquet files or of images with a `metadata.jsonl`, or a
            name on the hub, which is downloaded.
        out: the folder to write to.
        form: what the four numbers of a box are, in pixels: corner and size (as COCO), or two corners.

    Raises:
        InputError: the library is not installed, the data set cannot be loaded, a column is missing, or a box is not of
            that form; the message names the split and the row.
    """
    labelled: list[LabelledImage] = []
    names: dict[str, None] = {}
    for split, rows in _splits(source).items():
        refuse_odd_split(split, source)
        image_column = _image_column(rows.features, f"{source}, split {split}")
        boxes = _Boxes(rows.features, form, f"{source}, split {split}")
        names |= dict.fromkeys(boxes.class_names)
        for number, row in enumerate(rows):
            where = f"{source}, split {split}, row {number}"
            path = _write_image(row[image_column], make_folder(out / "images" / split) / f"{number:06d}", where)
            height, width = image_size(path)
            labelled.append(LabelledImage(path, list(boxes.of(row, (width, height), where)), where, split))
    if not labelled:
        raise InputError(f"{source}: no image in this data set")
    names |= dict.fromkeys(sorted({own.name for image in labelled for own in image.objects}))
    return write_labelled(labelled, ImageFiles(out / "images"), out, list(names))


class _Boxes:
    """Where the boxes and classes of a row are."""

    def __init__(self, features: Mapping[str, Any], form: BoxForm, where: str) -> None:
        self.form = form
        self.column = next((name for name in _OBJECTS if name in features and _fields(features[name])), "")
        fields = _fields(features[self.column]) if self.column else features
        self.boxes = _first(_BOXES, fields, "boxes", where)
        self.classes = _first(_CLASSES, fields, "classes", where)
        own = fields[self.classes]
        own = getattr(own, "feature", own[0] if isinstance(own, list) else own)
        self.class_names: list[str] = list(getattr(own, "names", None) or ())

    def of(self, row: Mapping[str, Any], size: tuple[int, int], where: str) -> Iterator[LabelledObject]:
        """The objects of a row, whose image has this width and height."""
        content = row[self.column] if self.column else row
        if isinstance(content, list):  # a list of objects instead of an object of lists
            content = {key: [(own or {}).get(key) for own in content] for key in (self.boxes, self.classes)}
        own = (None if content is None else content[key] for key in (self.boxes, self.classes))
        boxes, labels = ([] if column is None else column for column in own)
        if not _is_list(boxes) or not _is_list(labels):
            raise InputError(
                f"{where}: {self.boxes} is {shown(boxes)} and {self.classes} is {shown(labels)}: a list of boxes and a "
                "list of their classes are expected"
            )
        if len(boxes) != len(labels):
            raise InputError(
                f"{where}: {len(boxes)} boxes in {self.boxes} and {len(labels)} classes in {self.classes}: give each "
                "box one class"
            )
        for box, label in zip(boxes, labels, strict=True):
            if not _is_list(box) or len(box) != 4 or not all(map(is_coordinate, box)):
                raise InputError(f"{where}: a box is {shown(box)}: four numbers are expected")
            x, y, a, b = box
            w, h = (a, b) if self.form == "xywh" else (a - x, b - y)
            if w < 0 or h < 0 or x + w > size[0] + _TOLERANCE or y + h > size[1] + _TOLERANCE:
                other = "two corners: give --corners" if self.form == "xywh" else "corner and size: leave out --corners"
                raise InputError(
                    f"{where}: the box {shown(box)} does not fit {size[0]} x {size[1]} pixels; it may be {other}"
                )
            yield LabelledObject(self._name(label, where), (x, y, w, h))

    def _name(self, label: Any, where: str) -> str:
        if self.class_names and isinstance(label, int):
            if not 0 <= label < len(self.class_names):
                raise InputError(f"{where}: class {label} is not one of the {len(self.class_names)} names")
            return self.class_names[label]
        if label is None or str(label) == "":
            raise InputError(f"{where}: an object has no class")
        return str(label)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _splits(source: str) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError:
        raise InputError("this needs the library `datasets`: pip install 'megdet[datasets]'") from None
    try:
        if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(source)
        else:
            found = datasets.load_dataset(source)
    except Exception as error:  # the library raises many kinds, for files, addresses and formats
        raise InputError(
            f"{source}: `datasets` cannot load it: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    splits = dict(found) if isinstance(found, dict) else {"all": found}
    for split, rows in splits.items():
        splits[split] = rows.with_format(None)  # Python's numbers and lists, not arrays of numpy or torch
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):  # the bytes as they are, not decoded
                splits[split] = splits[split].cast_column(name, datasets.Image(decode=False))
    return splits


def _image_column(features: Mapping[str, Any], where: str) -> str:
    found = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if len(found) != 1:
        raise InputError(f"{where}: {len(found)} columns are images, one is needed; there are {', '.join(features)}")
    return found[0]


def _fields(feature: Any) -> Mapping[str, Any]:
    """The fields of a column of objects: of an object of lists, or of a list of objects."""
    own = feature[0] if isinstance(feature, list) and feature else feature
    own = own if isinstance(own, Mapping) else getattr(own, "feature", own)
    return own if isinstance(own, Mapping) else {}


def _first(names: tuple[str, ...], fields: Mapping[str, Any], what: str, where: str) -> str:
    found = next((name for name in names if name in fields), None)
    if found is None:
        raise InputError(
            f"{where}: no column of {what}: expected `objects` with {' or '.join(names)}, there are {', '.join(fields)}"
        )
    return found


def _write_image(image: Mapping[str, Any] | None, stem: Path, where: str) -> Path:
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise InputError(f"{where}: it has no image")
    try:
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        kind = (Image.open(io.BytesIO(content)).format or "").lower()
    except Exception as error:  # Pillow raises many kinds for odd or huge files
        raise InputError(f"{where}: its image cannot be read: {error}") from error
    path = stem.with_suffix(".jpg" if kind in ("jpeg", "mpo") else f".{kind}")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path
