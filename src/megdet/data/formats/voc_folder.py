"""Finds the files of a Pascal VOC data set (XML files, images, splits) in whatever folders a tool chose."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from megdet.data.formats.image_files import KIND_NAMES, SPLIT_NAMES, FilesByName, composed, visible_files
from megdet.data.image import IMAGE_SUFFIXES
from megdet.errors import InputError


class _Found(NamedTuple):
    """Images that may belong to an XML file."""

    paths: Sequence[Path] = ()
    is_near: bool = False
    """beside the file or in the matching folder"""
    is_exact: bool = False
    """they have the name in this case"""


@dataclass(frozen=True)
class VocFolder:
    """The files of a data set."""

    root: Path
    """the folder with `ImageSets`, if there is one; else the folder given"""
    xml_files: tuple[Path, ...]
    """sorted"""
    image_sets: Mapping[str, Path]
    """the lists of `ImageSets/Main` by the name of their split; empty where folders are the splits"""
    images: FilesByName
    """image files by their names, and by their names without the ending"""

    def image_of(self, xml_file: Path, named: str, split: str) -> Path:
        """The image of an XML file whose `filename` is `named`.

        The image with the XML file's name beside the file or in the matching folder, else that of `filename` there;
        then those anywhere else in the same order, without images that have an XML file of their own. Names in another
        case come last.

        Raises:
            InputError: there is no such image, or there are several.
        """
        name = PurePosixPath(PureWindowsPath(named).as_posix()).name  # some tools write a path on their own machine
        same = self._nearest(xml_file, xml_file.stem, name)
        is_sure = same.is_exact and len(same.paths) == 1
        if is_sure and same.is_near:
            return same.paths[0]
        meant = (self._nearest(xml_file, wanted, name) for wanted in dict.fromkeys((name, PurePosixPath(name).stem)))
        other = next((found for found in meant if found.paths), _Found())
        paths = same.paths or other.paths
        own = [path for path in other.paths if not self._has_own_xml(path)]
        if own and other.is_exact and other.is_near and not same.is_near:
            paths = own
        elif same.paths and other.is_exact and not is_sure:
            paths = [*dict.fromkeys([*same.paths, *other.paths])]
        if len(paths) > 1:
            raise InputError(
                f"{xml_file}: its image may be {paths[0]} or {paths[1]}: keep one, or put the right one beside it "
                "under the name of the XML file"
            )
        if paths:
            return paths[0]
        raise InputError(
            f"{self.root}: no image {xml_file.stem}.* for {xml_file.name} of the split {split}, and none called "
            f"{named!r}: put it beside the XML; an XML file that is not an annotation must leave the folder"
        )

    def _nearest(self, xml_file: Path, wanted: str, named: str) -> "_Found":
        """The images of a name at the nearest place that has any; of several the one that is `named`."""
        for is_near, is_exact in itertools.product((True, False), (True, False)):
            called = (self.images.exactly if is_exact else self.images.in_any_case)(wanted)
            found = self._near(xml_file, called) if is_near else self._far(xml_file, called)
            if wanted == xml_file.stem and not (is_near and is_exact):
                found = [path for path in found if not self._has_own_xml(path)]
            for form in (str, composed):
                if len(found) > 1 and len(exact := [path for path in found if form(path.name) == form(named)]) == 1:
                    found = exact
            if found:
                return _Found(found, is_near, is_exact)
        return _Found()

    @cached_property
    def _places_of_xml(self) -> Mapping[str, set[Path | tuple[str, ...]]]:
        """The folders of XML files, and the parts of the data set that these tell, by the files' stems."""
        found: dict[str, set[Path | tuple[str, ...]]] = defaultdict(set)
        for path in self.xml_files:
            found[composed(path.stem)] |= {path.parent, self._part(path)}
        return found

    def _has_own_xml(self, image: Path) -> bool:
        """Whether an image lies beside an XML file that has exactly its name, or in the folder matching it."""
        places = self._places_of_xml.get(composed(image.stem), set())
        return image.parent in places or self._part(image) in places

    def _near(self, xml_file: Path, images: Sequence[Path]) -> list[Path]:
        """The images beside the file, else those in the matching folder."""
        beside = [path for path in images if path.parent == xml_file.parent]
        return beside or [path for path in images if self._part(path) == self._part(xml_file)]

    def _far(self, xml_file: Path, images: Sequence[Path]) -> list[Path]:
        """The images anywhere but in another split."""
        own = self.splits_of(xml_file)
        return [path for path in images if not own or self.splits_of(path) <= own]

    def _part(self, path: Path) -> tuple[str, ...]:
        """The folders in a file's path that tell the part of the data set."""
        return tuple(part for part in self._folders(path) if part not in KIND_NAMES)

    def splits_of(self, path: Path) -> set[str]:
        """The splits named by the folders in a file's path."""
        return {part for part in self._folders(path) if part in SPLIT_NAMES}

    def _folders(self, path: Path) -> tuple[str, ...]:
        return tuple(part.lower() for part in path.relative_to(self.root).parent.parts)


def find_voc(folder: Path) -> VocFolder:
    """The files of the data set in a folder. Raises InputError where there is none, or more than one."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    files = visible_files(folder)
    xml_files = [path for path in files if path.suffix.lower() == ".xml"]
    if not xml_files:
        raise InputError(f"{folder}: no XML file in this folder or below; Pascal VOC has one for each image")
    lists = [path for path in files if path.suffix == ".txt" and path.parts[-3:-1] == ("ImageSets", "Main")]
    roots = sorted({path.parents[2] for path in lists})
    if len(roots) > 1:
        raise InputError(
            f"{folder}: several data sets lie in it, {roots[0]} and {roots[1]} have ImageSets: convert one at a time"
        )
    root = roots[0] if roots else folder
    stray = next((path for path in xml_files if not path.is_relative_to(root)), None)
    if stray is not None:
        raise InputError(f"{stray}: it lies outside of {root}, which has ImageSets: convert {root} alone")
    images = FilesByName()
    for path in files:
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_relative_to(root):
            images.add(path, path.name, path.stem)
    return VocFolder(root, tuple(xml_files), {path.stem: path for path in lists}, images)


def folder_splits(found: VocFolder) -> dict[str, list[Path]]:
    """The XML files of each split by the names of their folders; `all` where no folder is called like a split.

    Raises:
        InputError: only some files are in a split folder, or a file is in two.
    """
    members: dict[str, list[Path]] = defaultdict(list)
    for path in found.xml_files:
        names = found.splits_of(path)
        if len(names) > 1:
            raise InputError(f"{path}: its folders name the splits {' and '.join(sorted(names))}: rename one of them")
        members["".join(names)].append(path)
    if len(members) > 1 and "" in members:
        inside = next(paths[0] for name, paths in members.items() if name)
        raise InputError(
            f"{members[''][0]}: it is not in the folder of a split, while {inside} is: move one of them, or add "
            "ImageSets/Main"
        )
    return {"all": members[""]} if "" in members else {name: members[name] for name in sorted(members)}


def listed_files(found: VocFolder, split: str, lines: Iterable[str]) -> list[Path]:
    """The XML files that the lines of a split name.

    A line is a name, which may have spaces, and then other columns, as -1, 0 or 1 in VOC 2012's lists for one class.
    All lines have as many columns, the fewest with which every line names a file of its own: so a line whose file is
    missing takes no other.

    Raises:
        InputError: a name has no file or several, or a file is named twice.
    """
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in found.xml_files:
        place = path.relative_to(found.root).with_suffix("")
        for name in {path.stem, place.as_posix(), PurePosixPath(*place.parts[1:]).as_posix()}:
            by_name[composed(name)].append(path)

    def files_called(name: str) -> list[Path]:
        name = composed(name)
        has_ending = PurePosixPath(name).suffix.lower() in (*IMAGE_SUFFIXES, ".xml")
        return by_name.get(name) or by_name.get(str(PurePosixPath(name).with_suffix("")) if has_ending else name, [])

    lines = list(lines)
    if not lines:
        raise InputError(f"{found.image_sets[split]}: it names no image: write their names, or delete it")
    widths = range(min((len(line.split()) for line in lines), default=1))
    forms = [[line.rsplit(maxsplit=width)[0] for line in lines] if width else lines for width in widths]
    most = max(forms, key=lambda names: sum(map(bool, map(files_called, {*names}))))  # whose fault is told
    names = next((own for own in forms if all(map(files_called, own)) and len({*own}) == len(own)), most)
    chosen: dict[Path, None] = {}
    for name in names:
        files = files_called(name)
        if not files:
            raise InputError(f"{found.root / 'Annotations' / name}.xml: no such file, but the split {split} names it")
        if len(files) > 1:
            raise InputError(
                f"{found.image_sets[split]}: {name} may be {files[0]} or {files[1]}: write its folder too, or keep one"
            )
        if files[0] in chosen:
            raise InputError(f"{found.image_sets[split]}: {files[0]} is named twice: remove one of the two lines")
        chosen[files[0]] = None
    return list(chosen)
