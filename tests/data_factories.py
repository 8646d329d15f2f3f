"""Small data sets on disk, made by the tests themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from factories import SHARED_DATA

needs_shared_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason="the real data sets are not beside the repository (../shared/data)"
)


def save_image(path: Path, width: int, height: int, orientation: int = 1) -> Path:
    """A gray image; width and height are those of the stored picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.new("RGB", (width, height), "gray").save(path, exif=exif)
    return path


def image_row(image_id: Any, file_name: str, width: int = 40, height: int = 30) -> dict[str, Any]:
    return {"id": image_id, "file_name": file_name, "width": width, "height": height}


def box_row(number: Any, image_id: Any, category_id: Any, bbox: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def two_images() -> dict[str, Any]:
    """Two images of 40 x 30, three boxes, two categories with a gap; all sound."""
    return {
        "images": [image_row(7, "a.jpg"), image_row(3, "b.jpg")],
        "annotations": [
            box_row(11, 3, 9, [1, 2, 10, 20]),
            box_row(12, 7, 4, [5, 5, 8, 8], area=50.0, iscrowd=0),
            box_row(13, 3, 4, [0, 0, 40, 30], iscrowd=1),
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
    }


def write_set(folder: Path, document: Any) -> tuple[Path, Path]:
    """The annotations file and the image folder, with an image for every usable row."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for row in document["images"]:
        if not (images / row["file_name"]).exists():
            save_image(images / row["file_name"], row.get("width", 40), row.get("height", 30))
    file = folder / "instances.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    return file, images
