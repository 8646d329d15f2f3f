"""The validation images that went worst and best, small, with their boxes."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from megdet.data.coco import leaves_folder, outside_fault
from megdet.data.coco_file import load_columns
from megdet.data.image import read_image
from megdet.data.result_rows import Id
from megdet.errors import InputError, printable
from megdet.evaluation.per_image import image_counts
from megdet.recipe import Data
from megdet.studies.comparison.runs import ScoredRun

MOST = 6
"""Pictures of each sort."""
_EDGE, _QUALITY = 480, 80
_LOWEST_SCORE, _MOST_BOXES = 0.05, 100


def pictures_of(
    run: ScoredRun, annotations: Path, folder: Path, threshold: float
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The pictures of the lowest and of the highest F1 of boxes at a threshold, and what is missing of them.

    A picture that cannot be read is left out, and the second result says why.
    """
    counts = image_counts(run.matches("bbox"), threshold)
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
            except InputError as error:
                missing.append(f"The picture {printable(name)} is left out: {error}")
                continue
            found[sort].append(picture | {"f1": float(counts.f1[image])} | _boxes(run, image))
    return found, missing


def _picture(folder: Path, name: str, data: Data) -> dict[str, Any]:
    if leaves_folder(name) and not data.allow_outside_files:
        raise InputError(outside_fault(name))
    pixels = read_image(folder / name, max_pixels=data.max_pixels)
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    image.thumbnail((_EDGE, _EDGE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "jpeg", quality=_QUALITY)
    jpeg = base64.b64encode(content.getvalue()).decode()
    return {"name": printable(name), "width": width, "height": height, "jpeg": jpeg}


def _boxes(run: ScoredRun, image: int) -> dict[str, Any]:
    """Ground truth as x, y, width, height, class; detections too, with score and the object they found or -1."""
    truth, found = run.task.boxes.truth, run.task.boxes.found
    rows = (truth.images == image).nonzero()[0]
    place = {int(row): index for index, row in enumerate(rows)}
    boxes = []
    for label, own in enumerate(run.matches("bbox")):
        is_shown = (own.images == image) & own.is_counted[:, 0] & (own.scores >= _LOWEST_SCORE)
        for row, partner in zip(own.rows[is_shown].tolist(), own.partners[is_shown].tolist(), strict=True):
            where = [round(value, 1) for value in found.boxes[row].tolist()]
            boxes.append([*where, label, float(found.scores[row]), place.get(partner, -1)])
    boxes.sort(key=lambda box: -box[5])
    return {
        "truth": [
            [*(round(value, 1) for value in truth.boxes[row].tolist()), int(truth.classes[row])]
            for row in rows
            if not truth.is_crowd[row]
        ],
        "found": boxes[:_MOST_BOXES],
    }
