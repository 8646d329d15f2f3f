"""Writes figures and pictures as whole files; a symbolic link of the same name is replaced, not followed."""

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megdet.errors import InputError
from megdet.files import write_picture


def panels(columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `size` in inches, and its panels side by side, each with a grid and without upper and right frame.

    `options` are those of `Figure.subplots`.
    """
    figure = Figure(figsize=size, layout="constrained")
    made = list(figure.subplots(1, columns, squeeze=False, **options)[0])
    for axes in made:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, made


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure, in the format of the file name's suffix.

    Raises InputError for another suffix, and if the file cannot be written.
    """

    def save(file: io.BytesIO) -> None:
        try:
            figure.savefig(file, format=path.suffix[1:], dpi=dpi)
        except ValueError:
            raise InputError(f"{path}: no such kind of picture: name it .png, .pdf or .svg") from None

    write_picture(path, save)
