"""What evaluate and detect print and write, for runs and exported files alike."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megdet.cli.options import CONSOLE
from megdet.data.far.folder import FarFile, FarFolder, ImageFile, ImageFolder, name_of
from megdet.data.image import IMAGE_SUFFIXES
from megdet.detections import Detections
from megdet.errors import InputError, printable
from megdet.evaluation.coco_numbers import Evaluation
from megdet.evaluation.tables import tables
from megdet.files import LARGEST_JSON, parse_json, read_bytes, write_picture, write_result

_MARK = ("Software", "MegDet detect")
"""The text chunk of a PNG that tells a picture drawn here, which may be replaced, from somebody else's"""


def draw_files(
    files: Sequence[ImageFile],
    detect: Callable[[ImageFile], Detections],
    out: Path,
    score: float,
    tell: Callable[[Mapping[str, Any]], None],
    *,
    is_own: bool,
) -> None:
    """Draw the detections of at least `score` on every picture, and write all of them into one JSON.

    The `image_id` of its rows is the name of the picture's file; where several pictures share it, their paths (with
    `/`) or addresses as given. A file that is given twice is one picture. `tell` gets what was written and found.
    Files that cannot be read are skipped; InputError at the end names them.
    Raises InputError before it begins if a picture would replace one that was given, or if `out` has an evaluation in
    it or, unless it `is_own`, a file that would be replaced and that this function did not write.
    """
    files = [*dict.fromkeys(files)]
    pictures = _free_names(out, files)
    _refuse_to_replace(files, pictures, out, is_own=is_own)
    image_ids = _image_ids(files)
    mark = PngInfo()
    mark.add_text(*_MARK)
    found: list[tuple[Path, list[dict[str, Any]]]] = []
    unreadable: list[str] = []
    for file, picture in zip(files, pictures, strict=True):
        try:
            detections = detect(file)
        except InputError as error:  # go on with the other pictures
            unreadable.append(str(error))
            continue
        write_picture(picture, partial(detections.draw(score).save, format="png", pnginfo=mark))
        drawn = len(detections.above(score))
        CONSOLE.print(f"{printable(str(picture))}: {drawn} of {len(detections)} detections drawn")
        rows = zip(detections.to_coco(image_ids[file]), detections.names, strict=True)
        found.append((picture, [{**row, "category": name} for row, name in rows]))
    unread = f"{len(unreadable)} of {len(files)} images could not be read: {'; '.join(unreadable)}"
    if not found:  # an empty file would replace that of an earlier call
        raise InputError(unread)
    write_result(out / "detections.json", [result for _, results in found for result in results])
    CONSOLE.print(f"{out / 'detections.json'}")
    images = [{"picture": str(picture), "detections": results} for picture, results in found]
    tell({"file": str(out / "detections.json"), "images": images})
    if unreadable:
        raise InputError(unread)


def image_files(paths: Sequence[ImageFolder]) -> list[ImageFile]:
    """The files named, and those of the folders named, which may be addresses. Raises InputError."""
    files: list[ImageFile] = []
    for path in paths:
        if not isinstance(path, Path):
            files += _far_files(path)
        elif path.is_dir():
            inside = sorted(filter(_is_image, path.iterdir()))
            if not inside:
                below = next((file.parent for file in sorted(path.glob("*/*")) if _is_image(file)), None)
                hint = f"; name a folder that has some, such as {below}" if below is not None else ""
                raise InputError(f"{path}: no image in this folder{hint}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    return files


def _refuse_to_replace(files: Sequence[ImageFile], pictures: Sequence[Path], out: Path, *, is_own: bool) -> None:
    """Refuse a folder where a picture that was given, a file of somebody else or an evaluation would be replaced."""
    mend = f"name another folder, such as {out / 'detected'}"
    if (out / "evaluation.json").is_file():
        raise InputError(f"--out {out}: its detections.json belongs to the evaluation there: {mend}")
    if not is_own and os.path.lexists(out / "detections.json") and not _is_list_of_detect(out / "detections.json"):
        raise InputError(f"--out {out}: {out / 'detections.json'} would be replaced, which is not of detect: {mend}")
    given = {file.resolve() for file in files if isinstance(file, Path)}
    for picture in filter(os.path.lexists, pictures):
        if picture.resolve() in given:
            raise InputError(f"--out {out}: the picture {picture} was given and would be replaced: {mend}")
        if not is_own and not _is_drawn(picture):
            raise InputError(f"--out {out}: {picture} would be replaced, which detect did not draw: {mend}")


def _is_drawn(picture: Path) -> bool:
    """Whether `draw_files` wrote this file."""
    name, value = _MARK
    try:
        with Image.open(picture, formats=["PNG"]) as image:
            return image.info.get(name) == value
    except Exception:  # no picture, a link to nothing, one far larger than any drawn here: Pillow raises many kinds
        return False


def _is_list_of_detect(file: Path) -> bool:
    """Whether `draw_files` may have written this file: its rows tell the picture's name and the class's."""
    try:
        rows = parse_json(read_bytes(file, LARGEST_JSON), str(file))
    except InputError:
        return False
    return isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("image_id"), str) and "category" in row for row in rows
    )


def _image_ids(files: Sequence[ImageFile]) -> dict[ImageFile, str]:
    """The `image_id` of each file: its name, or the whole path or address where files elsewhere have that name."""
    counts = Counter(name_of(file).name for file in set(files))  # a file that is named twice is one image
    shared = {name for name, count in counts.items() if count > 1}
    return {file: _whole_name(file) if (name := name_of(file).name) in shared else name for file in files}


def _whole_name(file: ImageFile) -> str:
    return file.as_posix() if isinstance(file, Path) else str(file)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _far_files(place: FarFolder) -> list[FarFile]:
    """The image at an address, or those of the folder at it."""
    if (file := place.as_file()).file_name.lower().endswith(IMAGE_SUFFIXES):
        return [file]
    from megdet.data.far.listing import files_of  # here, because it imports fsspec

    inside = [name for name in files_of(place) if "/" not in name and name.lower().endswith(IMAGE_SUFFIXES)]
    if not inside:
        raise InputError(f"{place}: no image in this folder")
    return [place / name for name in inside]


def _free_names(out: Path, files: Sequence[ImageFile]) -> list[Path]:
    """A name of its own for each file's picture: files in other folders or with other suffixes may share theirs."""
    taken: dict[Path, None] = {}
    for file in map(name_of, files):
        names = itertools.chain((file.stem, file.name, f"{file.parent.name}_{file.name}"), itertools.count(2))
        paths = (out / (f"{file.stem}_{name}.png" if isinstance(name, int) else f"{name}.png") for name in names)
        taken[next(path for path in paths if path not in taken)] = None
    return [*taken]


def print_evaluation(
    numbers: Evaluation, evaluation: Path, detections: Path, tell: Callable[[Mapping[str, Any]], None]
) -> None:
    """The tables of an evaluation and the files that it is in; `tell` gets all of it."""
    print_numbers(numbers)
    CONSOLE.print(f"numbers     {evaluation}\ndetections  {detections}")
    tell({"numbers": str(evaluation), "detections": str(detections), "evaluation": numbers.as_dict()})


def print_numbers(numbers: Evaluation) -> None:
    """The tables of an evaluation."""
    for table in tables(numbers):
        CONSOLE.print(table)
