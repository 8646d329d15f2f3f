"""COCO data sets: what a detector is trained and scored on.

`load_coco` refuses invalid files (`megdet data check` lists all their faults). Two faults, which the original COCO
files have, it repairs: boxes are clipped to the image, and boxes without area are dropped and counted.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.architecture import MaskUse
from megdet.data.annotations import AnnotationTable
from megdet.data.coco_file import CocoColumns, load_columns
from megdet.data.coco_rows import refusal
from megdet.data.far.folder import UNKNOWN, ImageFile, ImageFolder, Stamp, file_in, folder_of
from megdet.data.headers import Lost, read_stamped_headers
from megdet.data.image import MAX_PIXELS, Header, pixels_fault
from megdet.data.sampling.image_weights import images_with_weight, read_image_weights
from megdet.data.segmentations import Segmentations, far_fault, rle_size_fault
from megdet.data.unreadable import most_replaced
from megdet.errors import InputError, shown
from megdet.files import replace_file
from megdet.recipe import Data

EDGE_TOLERANCE = 1.0
"""pixels by which a box may leave its image: labelling tools draw up to one pixel outside"""

_UNREAD = 1 << 20
"""Height and width assumed for an image whose size is unknown: large enough to clip no box."""


@dataclass(frozen=True)
class CocoDataset:
    """The images of one COCO instances file, in its order."""

    annotations_file: Path
    image_folder: ImageFolder
    class_names: tuple[str, ...]
    """in the order of the category ids"""
    category_ids: tuple[int, ...]
    """ascending; there may be gaps"""
    image_ids: tuple[int | str, ...]
    file_names: tuple[str, ...]
    """relative to `image_folder`"""
    sizes: NDArray[np.int64]
    """(images, 2): height, width in pixels as displayed (EXIF applied), from the files' headers"""
    annotations: AnnotationTable
    """one an image"""
    num_dropped: int = 0
    """boxes left out because they have no area inside their image"""
    weights: NDArray[np.float64] | None = None
    """(images,): how often each comes, compared with the others, above 0; None: all alike"""
    num_weightless: int = 0
    """images left out because their weight is 0"""
    masks_serve_pasting: bool = False
    """whether segmentations were read for `data.copy_paste` only and the detector does not learn from them"""
    stamps: NDArray[np.int64] | None = None
    """(images, 2): the columns of `Stamp` of far images; None if they are on this machine's disks"""

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def has_mask_targets(self) -> bool:
        """Whether the targets of its images have masks."""
        return self.annotations.segmentations is not None and not self.masks_serve_pasting

    def image_path(self, index: int) -> ImageFile:
        """The file of the image at a position of this data set."""
        stamp = UNKNOWN if self.stamps is None else Stamp(*self.stamps[index].tolist())
        return file_in(self.image_folder, self.file_names[index], stamp)


def training_set(data: Data, *, masks: MaskUse) -> CocoDataset:
    """The images that a recipe trains on. Raises InputError, for missing masks (of crowds too) if `masks` is all."""
    dataset = load_coco(
        Path(data.train_annotations),
        folder_of(data.train_images, data),
        keep_empty=data.keep_empty_images,
        max_pixels=data.max_pixels,
        allow_outside_files=data.allow_outside_files,
        with_masks=masks != "none" or data.copy_paste > 0,
        most_lost=data.most_replaced if data.unreadable == "replace" else None,
        image_weights=Path(data.image_weights) if data.image_weights else None,
    )
    if masks == "all":
        _refuse_missing_masks(dataset)
    return replace(dataset, masks_serve_pasting=masks == "none")


def validation_set(data: Data, *, with_masks: bool) -> CocoDataset:
    """The images that a recipe evaluates on. Raises InputError, for missing masks (of crowds too) if `with_masks`."""
    dataset = load_coco(
        Path(data.val_annotations),
        folder_of(data.val_images, data),
        keep_empty=True,
        max_pixels=data.max_pixels,
        allow_outside_files=data.allow_outside_files,
        with_masks=with_masks,
    )
    _refuse_missing_masks(dataset)
    return dataset


def load_coco(
    annotations_file: Path,
    image_folder: ImageFolder,
    *,
    keep_empty: bool,
    max_pixels: int = MAX_PIXELS,
    allow_outside_files: bool = False,
    with_masks: bool = False,
    most_lost: float | None = None,
    image_weights: Path | None = None,
) -> CocoDataset:
    """Read a COCO instances file and the sizes of its images; both are cached in the user's cache folder.

    Args:
        annotations_file: the JSON file.
        image_folder: where its images are, a folder or an address (`folder_of`).
        keep_empty: also keep images without a target (no box at all, only crowds, or no box with area).
        max_pixels: the largest height x width of an image.
        allow_outside_files: take a `file_name` that is absolute or has `..` in it.
        with_masks: read the segmentations too; an object may still have none.
        most_lost: part of the images whose files may be missing or damaged; None = no image. A lost image has the size
            that was last read from its file, or the size in the annotations file.
        image_weights: a table of the weights of images (see `sampling.image_weights`); images of weight 0 are left out.

    Raises:
        InputError: a file or a key is missing, an id is duplicate or unknown, a box is not four finite numbers or has a
            negative size, an image has another size than the file says, is too large or outside its folder, a
            segmentation is invalid (`with_masks`), a weight is invalid or missing, or no image is left.
    """
    columns = load_columns(annotations_file, with_masks=with_masks)
    fail = partial(refusal, annotations_file)
    num_images = len(columns.image_ids)
    for image_id, name in zip(columns.image_ids, columns.file_names, strict=True):
        if fault := name_fault(name, image_folder, allow_outside=allow_outside_files):
            raise fail(fault, image_id)

    needed = np.arange(num_images)
    if not keep_empty:
        width_height = columns.boxes[:, 2:] - columns.boxes[:, :2]
        is_target = ~columns.is_crowd & (width_height > 0).all(axis=1)
        needed = np.flatnonzero(np.bincount(columns.image_index[is_target], minlength=num_images))
    weights, num_used = None, len(needed)
    if image_weights is not None:
        weights = read_image_weights(image_weights, annotations_file, columns.file_names)
        needed = images_with_weight(image_weights, annotations_file, columns.file_names, weights, needed)
    num_weightless = num_used - len(needed)
    names = [columns.file_names[index] for index in needed.tolist()]
    lost = None if most_lost is None else Lost(columns.declared_sizes[needed], most_replaced(most_lost, len(needed)))
    headers, stamps = read_stamped_headers(annotations_file, image_folder, names, lost)
    _check_sizes(columns, needed, headers, max_pixels, fail)

    sizes = np.full((num_images, 2), _UNREAD, np.int64)
    sizes[needed] = headers[:, :2]
    all_stamps = np.full((num_images, 2), UNKNOWN, np.int64)
    all_stamps[needed] = stamps
    if columns.segmentations is not None:
        _check_segmentations(columns, columns.segmentations, sizes, fail)
    boxes = np.clip(columns.boxes, 0, np.tile(sizes[columns.image_index][:, ::-1], 2)).astype(np.float32)
    has_area = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    if not keep_empty:
        is_target = has_area & ~columns.is_crowd
        needed = needed[np.bincount(columns.image_index[is_target], minlength=num_images)[needed] > 0]
    if not len(needed):
        raise InputError(f"{annotations_file}: no image {'' if keep_empty else 'with a box '}is in this file")
    return CocoDataset(
        annotations_file=annotations_file,
        image_folder=image_folder,
        class_names=columns.class_names,
        category_ids=columns.category_ids,
        image_ids=tuple(columns.image_ids[index] for index in needed.tolist()),
        file_names=tuple(columns.file_names[index] for index in needed.tolist()),
        sizes=sizes[needed],
        annotations=_deal_out(columns, boxes, has_area, needed),
        num_dropped=int((~has_area).sum()),
        weights=None if weights is None else weights[needed],
        num_weightless=num_weightless,
        stamps=None if isinstance(image_folder, Path) else all_stamps[needed],
    )


def leaves_folder(name: str) -> bool:
    """Whether a `file_name` may lead out of the image folder."""
    if not (name.startswith("/") or ".." in name or os.name == "nt"):  # a PurePath takes a hundred times as long
        return False
    path = PurePath(name)
    return bool(path.anchor) or ".." in path.parts


def name_fault(name: str, folder: ImageFolder, *, allow_outside: bool) -> str:
    """Why a `file_name` is not read from a folder; empty if it is. Out of a far folder no name may lead."""
    if not leaves_folder(name):
        return ""
    if not isinstance(folder, Path):
        return f"file_name {shown(name)} leads out of the image folder, which is an address: change the file_name"
    if allow_outside:
        return ""
    return f"file_name {shown(name)} leads out of the image folder: set data.allow_outside_files true if that is meant"


def size_fault(declared: tuple[float, float], header: Header) -> str:
    """How the height and width in the annotations (NaN if missing) contradict an image's header; empty if they do not.

    The size before EXIF rotation is accepted too (the boxes may still show a fault).
    """
    height, width = (own if own == own else seen for own, seen in zip(declared, header, strict=False))
    if (height, width) == header[:2] or (header.is_swapped and (width, height) == header[:2]):
        return ""
    return f"the file is {header.width} x {header.height} pixels, the annotations say {width:.12g} x {height:.12g}"


def is_sized_before_exif(declared: tuple[float, float], header: Header) -> bool:
    """Whether the annotations give an image's size before its EXIF rotation; its boxes may be unrotated too."""
    return header.is_swapped and declared[1] == header.height != header.width


def write_coco(
    path: Path,
    *,
    images: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    head: Mapping[str, Any] | None = None,
) -> None:
    """Write a COCO instances file as a whole and make its folder; the same input gives the same bytes.

    `head` has what stands before the rows, such as `info` and `licenses`.

    Raises:
        InputError: the file cannot be written.
    """
    document = {"info": {}, **(head or {}), "images": images, "annotations": annotations, "categories": categories}
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def _check_sizes(
    columns: CocoColumns,
    images: NDArray[np.int64],
    headers: NDArray[np.int64],
    max_pixels: int,
    fail: Callable[..., InputError],
) -> None:
    """Refuse images that are too large or whose headers contradict the file; all images at once."""
    height, width, is_swapped = headers.T
    too_large = np.flatnonzero(height * width > max_pixels)
    if len(too_large):
        index = too_large[0]
        raise fail(pixels_fault(int(height[index]), int(width[index]), max_pixels), columns.image_ids[images[index]])
    declared = columns.declared_sizes[images]
    declared = np.where(np.isnan(declared), headers[:, :2], declared)
    fits = (declared == headers[:, :2]).all(axis=1)
    is_turned = (is_swapped > 0) & (declared[:, ::-1] == headers[:, :2]).all(axis=1)
    if not (fits | is_turned).all():
        index = np.flatnonzero(~(fits | is_turned))[0]
        header = Header(int(height[index]), int(width[index]), bool(is_swapped[index]))
        raise fail(size_fault(tuple(declared[index].tolist()), header), columns.image_ids[images[index]])
    limits = np.full((len(columns.image_ids), 2), np.inf)
    limits[images[is_turned & ~fits]] = headers[is_turned & ~fits, 1::-1] + EDGE_TOLERANCE
    beyond = np.flatnonzero((columns.boxes[:, 2:] > limits[columns.image_index]).any(axis=1))
    if len(beyond):
        raise fail(
            "the boxes were drawn before the EXIF rotation of the image, turn them or the image",
            columns.image_ids[columns.image_index[beyond[0]]],
        )


def _check_segmentations(
    columns: CocoColumns, found: Segmentations, sizes: NDArray[np.int64], fail: Callable[..., InputError]
) -> None:
    """Refuse RLEs of another size than their image and polygons far outside it; images that were not read pass."""
    size = sizes[columns.image_index]
    is_read = size[:, 0] != _UNREAD
    edges = np.tile(size[:, ::-1], 2) * [-1, -1, 2, 2]
    is_far = (found.bounds[:, :2] < edges[:, :2]).any(axis=1) | (found.bounds[:, 2:] > edges[:, 2:]).any(axis=1)
    is_other = (found.rle_sizes != size).any(axis=1) & (found.rle_sizes > 0).any(axis=1)
    for place in np.flatnonzero(is_read & (is_far | is_other))[:1].tolist():
        height, width = size[place].tolist()
        fault = far_fault(found.bounds[place].tolist(), (height, width))
        if is_other[place]:
            fault = rle_size_fault(tuple(found.rle_sizes[place].tolist()), (height, width))
        image_id, (own_id,) = columns.image_ids[columns.image_index[place]], columns.annotation_ids[[place]].tolist()
        raise fail(fault, image_id, own_id, verb="data check --masks")


def _refuse_missing_masks(dataset: CocoDataset) -> None:
    """Refuse a data set in which an object has no mask."""
    table = dataset.annotations
    if table.segmentations is None or table.places is None:
        return
    missing = np.flatnonzero(table.segmentations.is_missing[table.places])
    if len(missing):
        image = int(np.searchsorted(table.counts.cumsum(), missing[0], side="right"))
        fault = (
            f"it has no segmentation, like {len(missing)} of {len(table.places)} objects in use, and the detector has "
            "masks: give every object a polygon or an RLE, or take a detector without masks"
        )
        image_id, (own_id,) = dataset.image_ids[image], table.annotation_ids[missing[:1]].tolist()
        raise refusal(dataset.annotations_file, fault, image_id, own_id, verb="data check --masks")


def _deal_out(
    columns: CocoColumns, boxes: NDArray[np.float32], is_used: NDArray[np.bool_], images: NDArray[np.int64]
) -> AnnotationTable:
    """The annotations in use of the given images, in the order of the images and, within one, of the file."""
    place = np.full(len(columns.image_ids), -1)
    place[images] = np.arange(len(images))
    rows = np.flatnonzero(is_used & (place[columns.image_index] >= 0))
    rows = rows[np.argsort(place[columns.image_index[rows]], kind="stable")]
    areas = np.where(np.isnan(columns.areas), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), columns.areas)
    return AnnotationTable(
        np.bincount(place[columns.image_index[rows]], minlength=len(images)),
        boxes[rows],
        columns.labels[rows],
        columns.is_crowd[rows],
        areas[rows].astype(np.float32),
        columns.annotation_ids[rows],
        columns.segmentations,
        None if columns.segmentations is None else rows,
    )
