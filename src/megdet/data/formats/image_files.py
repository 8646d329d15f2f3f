"""The files of a data set in whatever folders a tool chose: images by the names that annotations give, and splits."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from megdet.data.image import IMAGE_SUFFIXES
from megdet.errors import InputError, shown

SPLIT_NAMES = ("train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing")
"""Folders of these names, in any case, are splits."""
KIND_NAMES = ("annotations", "annotation", "xml", "xmls", "labels", "jpegimages", "images", "image", "img", "imgs")
"""Folders of these names tell the kind of their files, not the part of the data set."""

_LONGEST_NAME = 60


class FilesByName:
    """Files by a name of theirs: Unicode's forms of a letter are one, and names in another case come second."""

    def __init__(self) -> None:
        self._exact: dict[str, list[Path]] = defaultdict(list)
        self._in_any_case: dict[str, list[Path]] = defaultdict(list)

    def add(self, path: Path, *names: str) -> None:
        """Add a file under each of these names."""
        for name in {composed(own) for own in names}:
            self._exact[name].append(path)
            self._in_any_case[name.casefold()].append(path)

    def called(self, name: str) -> Sequence[Path]:
        """The files of this name, else those that have it in another case."""
        return self.exactly(name) or self.in_any_case(name)

    def exactly(self, name: str) -> Sequence[Path]:
        """The files of this name."""
        return self._exact.get(composed(name), ())

    def in_any_case(self, name: str) -> Sequence[Path]:
        """The files of this name, and those that have it in another case."""
        return self._in_any_case.get(composed(name).casefold(), ())


class ImageFiles:
    """The images in a folder and below.

    Args:
        root: the folder; hidden files and folders are left out.

    Raises:
        InputError: there is no such folder, or no image in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_name = FilesByName()
        self.paths = [path for path in visible_files(root) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not self.paths:
            endings = ", ".join(IMAGE_SUFFIXES)
            raise InputError(f"{root}: no images in this folder ({endings}): give theirs by --images FOLDER")
        for path in self.paths:
            self._by_name.add(path, path.name, path.stem)

    def find(self, named: str, where: str, beside: Path | None = None) -> Path:
        """The image that an annotation names by a path of any machine, or by a name without its ending.

        Of several images of that name it is the one whose folders agree with the most folders of the path, else the one
        in the folder `beside`. Unicode's forms of a letter are one; without an image of the name, one of that name in
        another case is taken. `where` (file and place) begins the message.

        Raises:
            InputError: there is no such image, or there are several.
        """
        wanted = PurePosixPath(composed(PureWindowsPath(named).as_posix()))
        found = self._by_name.called(wanted.name)
        if not found:
            raise InputError(f"{where}: no image {shown(wanted.name)} in {self.root} or below: put it there")
        own_form = PureWindowsPath(named).name
        found = [path for path in found if own_form in (path.name, path.stem)] or found
        folders = wanted.parent.parts
        best = _most_agreeing(found, folders)
        best = _most_agreeing(best, [part.casefold() for part in folders], in_any_case=True)
        if len(best) > 1:
            best = [path for path in best if path.parent == beside] or best
        if len(best) > 1:
            raise InputError(f"{where}: its image may be {best[0]} or {best[1]}: keep one of them")
        return best[0]


def composed(name: str) -> str:
    """A name in Unicode's form NFC: some systems write an accent as a character of its own."""
    return unicodedata.normalize("NFC", name)


def _most_agreeing(paths: Sequence[Path], folders: Sequence[str], *, in_any_case: bool = False) -> list[Path]:
    """Of these paths those whose last folders agree with the most of `folders`."""

    def agreed(path: Path) -> int:
        own = composed(str(path.parent))
        return _shared_tail(Path(own.casefold() if in_any_case else own).parts, folders)

    most = max(map(agreed, paths))
    return [path for path in paths if agreed(path) == most]


def _shared_tail(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """How many of the last folders are the same."""
    count = 0
    for a, b in zip(reversed(ours), reversed(theirs), strict=False):
        if a != b:
            break
        count += 1
    return count


def visible_files(folder: Path) -> list[Path]:
    """The files in a folder and below, sorted, without hidden ones; links to folders are followed.

    Each folder counts once, at its own place rather than at that of a link. A link to a folder above itself is passed
    over. Raises InputError if there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    files: list[Path] = []
    walked: set[Path] = set()
    tops = [folder]
    while tops:
        links: list[Path] = []
        for place, inside, names in (found for top in tops for found in os.walk(top)):
            inside[:] = [name for name in inside if not name.startswith(".")]
            real = Path(place).resolve()
            if real in walked:
                inside.clear()
                continue
            walked.add(real)
            links += [path for name in inside if (path := Path(place, name)).is_symlink()]
            files += [path for name in names if not name.startswith(".") and (path := Path(place, name)).is_file()]
        tops = [link for link in sorted(links) if not link.parent.resolve().is_relative_to(link.resolve())]
    return sorted(files)


def files_of(source: Path, suffix: str) -> list[Path]:
    """A file itself, or the files with an ending in a folder and below. Raises InputError if there are none."""
    if source.is_file():
        return [source]
    found = [path for path in visible_files(source) if path.suffix.lower() == suffix]
    if not found:
        raise InputError(f"{source}: no {suffix} file in this folder or below")
    return found


def folders_below(path: Path, root: Path) -> tuple[str, ...]:
    """The folders of a file below a root; all of its folders if it is elsewhere."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).parent.parts


def split_of(path: Path, root: Path) -> str:
    """The split that the folders of a file name, or "". Raises InputError if they name two."""
    names = {part for part in folders_below(path, root) if part.lower() in SPLIT_NAMES}
    if len(names) > 1:
        raise InputError(f"{path}: its folders name the splits {' and '.join(sorted(names))}: rename one of them")
    return "".join(names)


def refuse_odd_split(split: str, where: str) -> None:
    """Refuse a name of a split, as a file gives it, that cannot be the name of a file or leads elsewhere."""
    if split != Path(split).name or split.startswith(".") or len(split) > _LONGEST_NAME or not split.isprintable():
        raise InputError(f"{where}: {shown(split)} cannot be the name of a split: rename it")


def refuse_mixed_splits(splits: Iterable[tuple[Path, str]]) -> None:
    """Refuse files of which only some are in a split."""
    inside = outside = None
    for path, split in splits:
        inside, outside = (path, outside) if split else (inside, path)
    if inside and outside:
        raise InputError(f"{outside}: it is not in the folder of a split, while {inside} is: move one of them")
