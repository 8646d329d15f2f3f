"""Parts of COCO instances files: split, sampled, merged. Rows keep all their keys, also those unknown here."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.data.coco import write_coco
from megdet.data.coco_file import load_columns
from megdet.data.coco_rows import refusal
from megdet.errors import InputError, nearest, shown
from megdet.files import read_json
from megdet.ops.integer_hash import hash_integers

_SPLIT, _SAMPLE = 1, 2
"""Purposes of random numbers."""


@dataclass(frozen=True)
class CocoDocument:
    """The rows of a valid COCO instances file."""

    path: Path
    head: Mapping[str, Any]
    """`info` and `licenses`, where the file has them"""
    images: Sequence[Mapping[str, Any]]
    annotations: Sequence[Mapping[str, Any]]
    categories: Sequence[Mapping[str, Any]]

    def part(self, image_ids: set[int | str]) -> "CocoDocument":
        """The same file with some of its images."""
        return CocoDocument(
            self.path,
            self.head,
            [row for row in self.images if row["id"] in image_ids],
            [row for row in self.annotations if row["image_id"] in image_ids],
            self.categories,
        )

    def write(self, path: Path) -> None:
        """Write it as a COCO file. Raises InputError if that exists, or cannot be written."""
        if path.exists():
            raise InputError(f"{path} exists: choose another name, or delete it")
        rows = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        write_coco(path, **{key: [dict(row) for row in own] for key, own in rows.items()}, head=self.head)


def read_document(path: Path) -> CocoDocument:
    """The rows of a COCO file. Raises InputError if `megdet data check` would find a fatal fault in the file itself."""
    load_columns(path, with_masks=False)  # refuses ids that are unknown or given twice, and values of another type
    content = read_json(path)
    head = {key: content[key] for key in ("info", "licenses") if key in content}
    return CocoDocument(path, head, content["images"], content["annotations"], content["categories"])


def split_document(
    document: CocoDocument, parts: Mapping[str, float], *, group: str = "", seed: int = 0
) -> dict[str, CocoDocument]:
    """Split the images into parts, so that every class and the images without boxes are dealt in these proportions.

    Iterative stratification (Sechidis et al., 2011): of the classes with boxes left to deal, the one with the fewest is
    dealt first; each image with it goes to the part that lacks most of this class, then to the one that lacks most
    images. Ties are broken by a hash of the seed and the image's place, so the result depends on nothing else.

    Args:
        document: what to split.
        parts: name and weight of each part; weights need not add up to 1.
        group: a regular expression; images whose file names give the same text (its first group in parentheses, else
            what it matches) stay together. Empty: every image is dealt by itself.
        seed: another seed gives another split.

    Raises:
        InputError: a part would be empty, or a file name does not match `group`.
    """
    members = _groups(document, group)
    counts = _counts(document, members)
    priority = np.array([hash_integers(seed, _SPLIT, number) for number in range(len(members))])
    weights = np.array(list(parts.values()), np.float64)
    chosen = deal(counts, weights / weights.sum(), priority)
    found = {}
    for number, name in enumerate(parts):
        ids = {document.images[place]["id"] for own in np.flatnonzero(chosen == number) for place in members[own]}
        if not ids:
            what = "groups" if group else "images"
            raise InputError(
                f"{document.path}: {len(members)} {what} are too few for {len(parts)} parts: {name} is empty"
            )
        found[name] = document.part(ids)
    return found


def deal(counts: NDArray[np.int64], weights: NDArray[np.float64], priority: NDArray[np.int64]) -> NDArray[np.int64]:
    """The part of each group, by iterative stratification.

    Args:
        counts: (groups, 1 + classes) images and boxes of each class.
        weights: (parts,) that add up to 1.
        priority: (groups,) groups with lower numbers are dealt first.
    """
    wanted = weights[:, None] * counts.sum(axis=0)
    part = np.full(len(counts), -1)
    left = counts.astype(np.int64).sum(axis=0)
    order = np.argsort(priority, kind="stable")
    while (part < 0).any():
        classes = np.flatnonzero(left[1:] > 0) + 1
        column = int(classes[np.argmin(left[classes])]) if len(classes) else 0
        own = order[(part[order] < 0) & (counts[order, column] > 0)]
        for group in own[np.argsort(-counts[own, column], kind="stable")].tolist():
            lack = wanted[:, column]
            best = np.flatnonzero(lack == lack.max())
            part[group] = best[np.argmax(wanted[best, 0])]
            wanted[part[group]] -= counts[group]
            left -= counts[group]
    return part


def sample_document(
    document: CocoDocument, num_images: int | None, *, class_names: Sequence[str] = (), seed: int = 0
) -> CocoDocument:
    """Some images, drawn by hash of the seed and the image's place; those of a smaller sample are in a larger one.

    Args:
        document: what to draw from.
        num_images: how many; None: all.
        class_names: keep these classes and their boxes only, and draw from the images that have one; empty: all.
        seed: another seed draws others.

    Raises:
        InputError: a class is unknown, or there are not so many images.
    """
    if class_names:
        document = _with_classes(document, class_names)
    if num_images is not None and num_images > len(document.images):
        raise InputError(f"{document.path}: {num_images} images were asked for, it has {len(document.images)}")
    hashes = [hash_integers(seed, _SAMPLE, place) for place in range(len(document.images))]
    places = np.argsort(np.array(hashes, np.int64), kind="stable")[:num_images]
    return document.part({document.images[place]["id"] for place in places.tolist()})


def _groups(document: CocoDocument, pattern: str) -> list[list[int]]:
    """The places of the images of each group."""
    if not pattern:
        return [[place] for place in range(len(document.images))]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{shown(pattern)} is no regular expression: {error}") from None
    members: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(document.images):
        found = expression.search(row["file_name"])
        if found is None:
            raise InputError(f"{document.path}: {shown(row['file_name'])} does not match {shown(pattern)}")
        members[found[1] or "" if expression.groups else found[0]].append(place)
    return list(members.values())


def _counts(document: CocoDocument, members: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """(groups, 1 + classes): images, and boxes of each class."""
    owner = {document.images[place]["id"]: group for group, own in enumerate(members) for place in own}
    columns = {row["id"]: number for number, row in enumerate(document.categories, start=1)}
    counts = np.zeros((len(members), 1 + len(columns)), np.int64)
    counts[:, 0] = [len(own) for own in members]
    for row in document.annotations:
        counts[owner[row["image_id"]], columns[row["category_id"]]] += 1
    return counts


def _with_classes(document: CocoDocument, class_names: Sequence[str]) -> CocoDocument:
    known = [row["name"] for row in document.categories]
    for name in class_names:
        if name not in known:
            raise InputError(f"{document.path}: no class {shown(name)}{nearest(name, known)}")
    categories = [row for row in document.categories if row["name"] in class_names]
    ids = {row["id"] for row in categories}
    annotations = [row for row in document.annotations if row["category_id"] in ids]
    with_one = {row["image_id"] for row in annotations}
    images = [row for row in document.images if row["id"] in with_one]
    return CocoDocument(document.path, document.head, images, annotations, categories)


def merge_documents(documents: Sequence[CocoDocument], folders: Sequence[Path], common: Path) -> CocoDocument:
    """One file of several; classes are matched by name, ids are given anew.

    A file that one document names twice stays two images, as training and `megdet data check`, which warns, take it.

    Args:
        documents: what to merge.
        folders: the image folder of each.
        common: a folder above all of these, to which the file names of the result are relative.

    Raises:
        InputError: an image is in two of them or leads out of its folder, or a file has two classes of one name.
    """
    ordered = [sorted(document.categories, key=lambda row: row["id"]) for document in documents]
    names = list(dict.fromkeys(row["name"] for own in ordered for row in own))
    top = _plain(common)
    first: dict[Path, int] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    categories: dict[str, dict[str, Any]] = {}
    for number, (document, folder) in enumerate(zip(documents, folders, strict=True)):
        own_names = {row["id"]: row["name"] for row in document.categories}
        if len(set(own_names.values())) < len(own_names):
            raise InputError(f"{document.path}: two classes have one name, so classes cannot be matched by name")
        for row in document.categories:
            categories.setdefault(row["name"], {**row, "id": names.index(row["name"]) + 1})
        new_ids = {}
        for row in document.images:
            path, real = _places(document, row, folder)
            if (before := first.setdefault(real, number)) != number:
                raise InputError(f"{document.path}: {path} is in {documents[before].path} too: remove it from one")
            new_ids[row["id"]] = len(images) + 1
            images.append({**row, "id": len(images) + 1, "file_name": path.relative_to(top).as_posix()})
        for row in document.annotations:
            new = {"id": len(annotations) + 1, "image_id": new_ids[row["image_id"]]}
            annotations.append({**row, **new, "category_id": names.index(own_names[row["category_id"]]) + 1})
    return CocoDocument(documents[0].path, {}, images, annotations, [categories[name] for name in names])


def _plain(path: Path) -> Path:
    """The absolute path without `..`; links stay."""
    return Path(os.path.normpath(path.absolute()))


def _places(document: CocoDocument, row: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """The absolute path of an image without `..`, and with links followed.

    Raises InputError for a name that leads elsewhere or that no file has.
    """
    name: str = row["file_name"]
    path = _plain(folder / name)
    try:
        real = (folder / name).resolve()
        is_inside = path.is_relative_to(_plain(folder)) and path.resolve() == real  # .. behind a link
    except (OSError, ValueError, RuntimeError):  # a null character, a link to itself
        raise refusal(document.path, f"no file in {folder} can be called {shown(name)}", row["id"]) from None
    if not is_inside:
        mend = "give a folder above all of its images, and file names relative to that"
        raise refusal(document.path, f"file_name {shown(name)} leads out of {folder}: {mend}", row["id"])
    return path, real
