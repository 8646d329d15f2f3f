"""Pascal VOC: one XML file an image."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megdet.data.formats.converted import Converted, annotation_row, number_of, numbered_lines, write_converted
from megdet.data.formats.labelled import checked_size
from megdet.data.formats.voc_folder import VocFolder, find_voc, folder_splits, listed_files
from megdet.data.formats.xml_file import parse_xml
from megdet.errors import InputError


def convert_voc(
    folder: Path,
    out: Path,
    splits: Sequence[str] | None = None,
    *,
    zero_based: bool = False,
    difficult_as_crowd: bool = False,
) -> list[Converted]:
    """Write `out/annotations/<split>.json` for each split of a Pascal VOC data set; the images stay where they are.

    VOC counts pixels from 1 and includes the last, so (xmin, ymin, xmax, ymax) becomes the box (xmin - 1, ymin - 1,
    xmax, ymax): a whole image is 1 .. width in the XML and 0 .. width here. A box whose corners are one pixel is then
    1 x 1, which `megdet data check` reports. Category ids count from 1 in the order of the sorted names of all
    splits; image ids count from 1 in the order of all XML files: both mean the same in every split.

    Args:
        folder: searched with its subfolders for XML files, their images (see `VocFolder.image_of`) and
            `ImageSets/Main/*.txt`.
        out: the folder to write to.
        splits: names of files in `ImageSets/Main`; by default those of train, val, trainval and test that exist, else
            all. Without `ImageSets`, splits are folders (`SPLIT_NAMES`), or there is one split `all`.
        zero_based: coordinates count from 0 and are edges, as some tools write them: they are not changed.
        difficult_as_crowd: objects marked difficult become crowds, which are no targets and cost nothing in
            evaluation. Otherwise they are plain objects. The key `difficult` is kept either way.

    Raises:
        InputError: a file or folder is missing, malformed or ambiguous, or an image has another size than its XML file
            says; the message names it.
    """
    found = find_voc(folder)
    members = _voc_splits(found, splits)
    parsed = {path: _read_voc_file(path) for path in found.xml_files}
    image_ids = {path: number for number, path in enumerate(parsed, start=1)}
    class_names = sorted({row["name"] for rows, _, _ in parsed.values() for row in rows})
    category_ids = {name: number for number, name in enumerate(class_names, start=1)}
    image_files = {path: found.image_of(path, parsed[path][2], split) for split in members for path in members[split]}
    _refuse_two_of_one_image(image_files)
    sizes = {path: checked_size(image, parsed[path][1], str(path)) for path, image in image_files.items()}
    image_folder = Path(os.path.commonpath([path.parent for path in image_files.values()] or [found.root]))

    converted = []
    for split, files in members.items():
        images, annotations = [], []
        for path in files:
            rows, (height, width) = parsed[path][0], sizes[path]
            file_name = image_files[path].relative_to(image_folder).as_posix()
            images.append({"id": image_ids[path], "file_name": file_name, "width": width, "height": height})
            for row in rows:
                x1, y1, x2, y2 = row["corners"]
                if not zero_based:
                    x1, y1 = x1 - 1, y1 - 1
                annotation = annotation_row(image_ids[path], category_ids[row["name"]], x1, y1, x2 - x1, y2 - y1)
                annotation["iscrowd"] = int(difficult_as_crowd and row["difficult"])
                annotations.append({**annotation, "difficult": int(row["difficult"])})
        converted.append(
            write_converted(out / "annotations" / f"{split}.json", image_folder, images, annotations, class_names)
        )
    return converted


def _voc_splits(found: VocFolder, splits: Sequence[str] | None) -> dict[str, list[Path]]:
    """The XML files of each split asked for, or of all splits."""
    listed: Mapping[str, object] = found.image_sets or folder_splits(found)
    is_asked = splits is not None
    if splits is None:
        usual = [name for name in ("train", "val", "trainval", "test") if name in listed]
        splits = usual if usual and found.image_sets else list(listed)
    for split in splits:
        if split not in listed:
            where = f"{found.root / 'ImageSets' / 'Main' / split}.txt" if found.image_sets else f"{found.root}: {split}"
            raise InputError(f"{where}: no such split; there are {', '.join(listed) or 'none'}")
    if not found.image_sets:
        return {split: folder_splits(found)[split] for split in splits}
    lines = {split: [line.strip() for _, line in numbered_lines(found.image_sets[split])] for split in splits}
    if not is_asked and any(lines.values()):
        lines = {split: own for split, own in lines.items() if own}  # tools write a list of no image too
    return {split: listed_files(found, split, own) for split, own in lines.items()}


def _refuse_two_of_one_image(image_files: Mapping[Path, Path]) -> None:
    owner: dict[Path, Path] = {}
    for xml_file, image in image_files.items():
        if owner.setdefault(image, xml_file) != xml_file:
            raise InputError(f"{owner[image]} and {xml_file} are both of {image}: remove one of them")


def _read_voc_file(path: Path) -> tuple[list[dict[str, Any]], tuple[int, int] | None, str]:
    """The objects of a file, the height and width of its image, None if one is missing or 0, and the image's name."""
    root = parse_xml(path)
    rows = []
    for number, element in enumerate(root.iter("object"), start=1):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise InputError(f"{path}: object {number} has no name")
        corners = [number_of(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        if not all(math.isfinite(value) for value in corners):
            raise InputError(f"{path}: object {number} ({name}) needs a bndbox of four numbers xmin, ymin, xmax, ymax")
        if corners[2] < corners[0] or corners[3] < corners[1]:
            raise InputError(f"{path}: object {number} ({name}): its second corner lies before the first: {corners}")
        rows.append({"name": name, "corners": corners, "difficult": element.findtext("difficult", "0").strip() == "1"})
    sides = [number_of(root.findtext(f"size/{key}")) for key in ("height", "width")]
    size = (int(sides[0]), int(sides[1])) if all(side >= 1 for side in sides) else None
    return rows, size, (root.findtext("filename") or "").strip() or path.stem
