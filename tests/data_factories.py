"""Small data sets on disk, made by the tests themselves."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as masks

from factories import SHARED_DATA
from megdet.structures import Batch

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


def triangle(x: float, y: float, width: float, height: float) -> list[float]:
    """The polygon of a triangle that fills half of a box."""
    return [x, y, x + width, y, x, y + height]


def with_masks(document: dict[str, Any]) -> dict[str, Any]:
    """The same document with a triangle in each box, and runs of pixels in each crowd."""
    size_of = {image["id"]: [image["height"], image["width"]] for image in document["images"]}
    for row in document["annotations"]:
        height, width = size_of[row["image_id"]]
        runs = {"size": [height, width], "counts": [height, height, height * width - 2 * height]}
        row["segmentation"] = runs if row.get("iscrowd") else [triangle(*row["bbox"])]
    return document


def unpacked_masks(batch: Batch) -> list[NDArray[np.bool_]]:
    """The masks of each image of a batch on the whole canvas: (max_boxes, height, width), read bit by bit."""
    assert batch.targets.masks is not None
    packed, found = batch.targets.masks, []
    for bits, frames in zip(packed.bits.numpy(), packed.frames.tolist(), strict=True):
        flat, own = np.unpackbits(bits), np.zeros((len(frames), *batch.pixels.shape[2:]), np.bool_)
        for row, (first, x, y, width, height) in enumerate(frames):
            own[row, y : y + height, x : x + width] = flat[first : first + width * height].reshape(height, width)
        found.append(own)
    return found


def coco_mask(segmentation: Any, original: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
    """What the COCO API makes of polygons that are scaled from one height and width to another, or of an RLE."""
    scale = [size[1] / original[1], size[0] / original[0]]
    if isinstance(segmentation, list):
        rounded = [np.array(polygon, np.float32).reshape(-1, 2).astype(float) for polygon in segmentation]
        found = masks.merge(masks.frPyObjects([(polygon * scale).ravel().tolist() for polygon in rounded], *size))
    else:
        is_text = isinstance(segmentation["counts"], str)
        found = segmentation if is_text else masks.frPyObjects(segmentation, *segmentation["size"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # of pycocotools
        return masks.decode(found)
