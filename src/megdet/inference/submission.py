"""Writes and checks submissions to the COCO server: a zip with one JSON of detections.

The rules are those of cocodataset.org (results format, and upload): `[type]_[testset]_[alg]_results` is the name of the
zip and of the JSON at its top; ids of COCO; at most 100 detections an image, since others would not count. Detections
of masks have no bbox: the COCO API would take the sizes of the objects from it.
"""

import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import msgspec

from megdet.data.image_info import ImageInfo
from megdet.data.result_rows import Detection
from megdet.data.segmentations import rle_size_fault, segmentation_fault
from megdet.errors import InputError, shown
from megdet.files import cannot_write, make_folder, replace_file

MOST_DETECTIONS = 100
"""An image."""
COCO_CATEGORIES = frozenset({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
"""The ids of COCO's 80 classes."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_TIME = (1980, 1, 1, 0, 0, 0)  # the same detections give the same bytes

Kind = Literal["bbox", "segm"]


def check_submission(rows: Sequence[Detection], info: ImageInfo, kind: Kind, place: str) -> None:
    """Raise InputError for rows that the server would refuse or count wrong.

    Rows were already checked for finite numbers and sizes that are not negative when they were read.
    """
    if not rows:
        raise InputError(f"{place}: there is no detection in it")
    counts = Counter(row.image_id for row in rows)
    for index, row in enumerate(rows):
        where = f"{place}: [{index}] of image {shown(row.image_id)}"
        if row.image_id not in info.file_names or isinstance(row.image_id, float):
            raise InputError(f"{where}: there is no such image in {info.file}: is it the same test set?")
        if row.category_id not in COCO_CATEGORIES or isinstance(row.category_id, float):
            raise InputError(
                f"{where}: category_id {shown(row.category_id)} is not one of COCO's 80, which lie from 1 to 90"
            )
        if kind == "bbox" and row.bbox is None:
            raise InputError(f"{where}: it has no bbox: give it one, or submit masks with --kind segm")
        if kind == "segm":
            _check_mask(row, info, where)
    image_id, most = counts.most_common(1)[0]
    if most > MOST_DETECTIONS:
        raise InputError(
            f"{place}: image {shown(image_id)} has {most} detections, the server takes the best {MOST_DETECTIONS} of "
            f"an image: set evaluation.merged_detections, or `detections` of the head, to {MOST_DETECTIONS}"
        )


def submission_name(algorithm: str, test_set: str) -> str:
    """The name of both files, without its ending. Raises InputError for a word that the server could not read back."""
    for option, word in (("--alg", algorithm), ("--test-set", test_set)):
        if not _NAME.fullmatch(word):
            raise InputError(f"{option} {shown(word)}: take letters, digits, '-', '+' and '.'; '_' separates the words")
    return f"detections_{test_set}_{algorithm}_results"


def write_submission(folder: Path, rows: Sequence[Detection], kind: Kind, algorithm: str, test_set: str) -> Path:
    """Write the zip of detections that were checked; returns its path. Raises InputError if it cannot be written."""
    name = submission_name(algorithm, test_set)
    content = msgspec.json.encode([_entry(row, kind) for row in rows])
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo(f"{name}.json", _TIME)
        entry.compress_type = zipfile.ZIP_DEFLATED
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, content)
    path = make_folder(folder) / f"{name}.zip"
    try:
        replace_file(path, packed.getvalue())
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def _entry(row: Detection, kind: Kind) -> dict[str, Any]:
    what = {"bbox": row.bbox} if kind == "bbox" else {"segmentation": row.segmentation}
    return {"image_id": row.image_id, "category_id": row.category_id, **what, "score": row.score}


def _check_mask(row: Detection, info: ImageInfo, where: str) -> None:
    mask = row.segmentation
    if mask is None:
        raise InputError(f"{where}: it has no segmentation: take a detector with masks, or submit boxes: --kind bbox")
    fault = segmentation_fault({"size": list(mask.size), "counts": mask.counts})
    if not fault and isinstance(mask.counts, list):
        fault = "the server takes counts as compressed text, not as a list"
    size = info.sizes[row.image_id]  # type: ignore[index]  # no float, that was checked
    if not fault and size is not None:
        fault = rle_size_fault(mask.size, (int(size[0]), int(size[1])))
    if fault:
        raise InputError(f"{where}: {fault}")
