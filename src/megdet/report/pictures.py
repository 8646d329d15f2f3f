"""The validation images that went worst and best, small, with their boxes or masks."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megdet.data.coco import name_fault
from megdet.data.coco_file import load_columns
from megdet.data.far.folder import ImageFolder
from megdet.data.image import read_image
from megdet.data.result_rows import Id
from megdet.data.rle import Rle, decode_mask, encode_mask
from megdet.errors import InputError, printable
from megdet.evaluation.counting import Kind
from megdet.evaluation.per_image import image_counts
from megdet.recipe import Data
from megdet.studies.comparison.runs import ScoredRun

MOST = 6
"""Pictures of each sort."""
_EDGE, _QUALITY = 480, 80
_LOWEST_SCORE, _MOST_BOXES = 0.05, 100


def pictures_of(
    run: ScoredRun, kind: Kind, annotations: Path, folder: ImageFolder, threshold: float
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The pictures of the lowest and of the highest F1 of boxes or masks at a threshold, and what is missing of them.

    A picture that cannot be read is left out, and the second result says why.
    """
    counts = image_counts(run.matches(kind), threshold)
    columns = load_columns(annotations)
    names: dict[Id, str] = dict(zip(columns.image_ids, columns.file_names, strict=True))
    worst = counts.worst(MOST)
    chosen = {"worst": worst, "best": [image for image in counts.best(MOST + len(worst)) if image not in worst][:MOST]}
    found: dict[str, list[dict[str, Any]]] = {}
    missing = []
    for sort, images in chosen.items():
        found[sort] = []
        for image in images:
            name = names[run.task.image_ids[image]]
            try:
                picture = _picture(folder, name, run.recipe.data)
                picture |= _objects(run, kind, image, picture)
            except InputError as error:
                missing.append(f"The picture {printable(name)} is left out: {error}")
                continue
            found[sort].append(picture | {"f1": float(counts.f1[image])})
    return found, missing


def _picture(folder: ImageFolder, name: str, data: Data) -> dict[str, Any]:
    if fault := name_fault(name, folder, allow_outside=data.allow_outside_files):
        raise InputError(fault)
    pixels = read_image(folder / name, max_pixels=data.max_pixels)
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    image.thumbnail((_EDGE, _EDGE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "jpeg", quality=_QUALITY)
    jpeg = base64.b64encode(content.getvalue()).decode()
    return {"name": printable(name), "width": width, "height": height, "small": image.size, "jpeg": jpeg}


def _objects(run: ScoredRun, kind: Kind, image: int, picture: dict[str, Any]) -> dict[str, Any]:
    """Ground truth as x, y, width, height, class, mask; detections as x, y, width, height, class, score, the object
    that they found or -1, mask. Masks are texts of runs at the size of the small picture, "" where boxes are shown."""
    truth, found, sides = run.task.boxes.truth, run.task.boxes.found, run.sides(kind)
    objects = ((truth.images == image) & ~truth.is_crowd).nonzero()[0].tolist()
    place = {row: index for index, row in enumerate(objects)}
    shown: list[tuple[int, int, int]] = []
    for label, own in enumerate(run.matches(kind)):
        is_shown = (own.images == image) & own.is_counted[:, 0] & (own.scores >= _LOWEST_SCORE)
        pairs = zip(own.rows[is_shown].tolist(), own.partners[is_shown].tolist(), strict=True)
        shown += [(row, label, place.get(partner, -1)) for row, partner in pairs]
    shown = sorted(shown, key=lambda own: -found.scores[own[0]])[:_MOST_BOXES]

    def mask(masks: list[Rle] | None, row: int) -> str:
        return "" if masks is None else _small_mask(masks[row], picture)

    return {
        "truth": [
            [*_rounded(truth.boxes[row]), int(truth.classes[row]), mask(sides.truth.masks, row)] for row in objects
        ],
        "found": [
            [*_rounded(found.boxes[row]), label, float(found.scores[row]), partner, mask(sides.found.masks, row)]
            for row, label, partner in shown
        ],
    }


def _rounded(box: np.ndarray) -> list[float]:
    return [round(edge, 1) for edge in box.tolist()]


def _small_mask(mask: Rle, picture: dict[str, Any]) -> str:
    """The runs of a mask at the size of the small picture, as the compressed text of COCO."""
    if tuple(mask["size"]) != (picture["height"], picture["width"]):
        raise InputError(
            f"its masks are of {mask['size'][0]} x {mask['size'][1]} pixels, the file has {picture['height']} x "
            f"{picture['width']}"
        )
    width, height = picture["small"]
    grey = Image.fromarray(decode_mask(mask).astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX)
    counts = encode_mask(np.asarray(grey) >= 128, 0, 0, (height, width))["counts"]
    return counts if isinstance(counts, str) else counts.decode()
