"""Weights of images: a table that says how often each image comes, compared with the others.

The table is a CSV file whose first line names the columns `file_name` and `weight`; other columns are ignored. File
names are those of the annotations file. A weight of 0 leaves an image out of the training set, so its file is not even
opened. Weights are relative: twice all of them is the same.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megdet.data.csv_lines import csv_lines
from megdet.errors import InputError, nearest, shown
from megdet.files import is_file

_COLUMNS = ("file_name", "weight")
_MOST = 1e6
"""The largest weight, so that sums are finite and exact enough."""


def read_image_weights(table: Path, annotations_file: Path, file_names: Sequence[str]) -> NDArray[np.float64]:
    """(images,): the weight of each image of an annotations file, in its order; NaN for one without a line.

    Raises:
        InputError: the table cannot be read or lacks a column, a weight is no number from 0 to 1e6, an image has two
            lines, or a line is of no image of the annotations file.
    """
    if not is_file(table):
        raise InputError(f"{table}: no such file; data.image_weights names it: check the path, or leave the key empty")
    lines = csv_lines(table)
    header = [word.strip().lower() for word in lines[0][1]] if lines else []
    for column in _COLUMNS:
        if header.count(column) != 1:
            raise InputError(f"{table}: its first line needs one column {column}; write: file_name,weight")
    name_at, weight_at = (header.index(column) for column in _COLUMNS)
    found: dict[str, float] = {}
    known = set(file_names)
    for line, words in lines[1:]:
        where = f"{table}:{line}"
        if len(words) <= max(name_at, weight_at):
            raise InputError(f"{where}: {len(words)} fields, fewer than the first line has")
        name, weight = words[name_at], _weight(words[weight_at])
        name = name if name in known else name.strip()
        if name not in known:
            hint = nearest(name, file_names) if len(known) < 10_000 else ""
            raise InputError(f"{where}: {annotations_file} has no image with file_name {shown(name)}{hint}")
        if name in found:
            raise InputError(f"{where}: a second weight of {shown(name)}: leave one of its lines")
        if not 0 <= weight <= _MOST:
            raise InputError(f"{where}: the weight of {shown(name)} is {shown(words[weight_at])}: give 0 to {_MOST:g}")
        found[name] = weight
    return np.array([found.get(name, math.nan) for name in file_names])


def images_with_weight(
    table: Path,
    annotations_file: Path,
    file_names: Sequence[str],
    weights: NDArray[np.float64],
    used: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Those of the images at the places `used` that have a weight above 0. Raises InputError if one has no weight."""
    missing = used[np.isnan(weights[used])]
    if len(missing):
        name = shown(file_names[missing[0]])
        more = f", nor of {len(missing) - 1} others" if len(missing) > 1 else ""
        raise InputError(f"{table}: no weight of {name} in {annotations_file}{more}: give every image a line")
    kept = used[weights[used] > 0]
    if len(used) and not len(kept):
        raise InputError(f"{table}: every weight is 0, so no image is left to train on: give some a weight above 0")
    return kept


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
