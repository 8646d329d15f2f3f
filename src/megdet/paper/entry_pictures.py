"""The pictures of the entry: its rows as dots, a dot a seed, and detections in the manner of Figure 5."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megdet.data.coco import CocoDataset
from megdet.data.image import read_image
from megdet.drawing import contact_sheet, draw_detections
from megdet.files import write_picture
from megdet.paper.entry_report import EntryRow
from megdet.paper.figures import COLOURS
from megdet.plotting import panels, save_figure

SHOWN, COLUMNS, SHOWN_SCORE = 12, 4, 0.5
"""Images of Figure 5, images a row, and the least score of a detection that is drawn."""


def plot_entry(rows: Sequence[EntryRow], path: Path) -> None:
    """The mmAP of every row: a dot a seed, a bar at their mean; the baseline's mean as a line down the picture.

    Raises InputError if the picture cannot be written.
    """
    figure, (axes,) = panels(1, (6.4, 1.2 + 0.3 * len(rows)))
    for place, row in enumerate(rows):
        values = [score.mmap for score in row.scores]
        if values:
            axes.plot(values, [place] * len(values), "o", color=COLOURS[0], markersize=4, alpha=0.7)
            axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=COLOURS[1], linewidth=2)
    if rows and rows[0].scores:
        mean = float(np.mean([score.mmap for score in rows[0].scores]))
        axes.axvline(mean, color="0.45", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.set(xlabel="mmAP (%), drawn shapes; a dot a seed, a bar at their mean", ylim=(len(rows) - 0.4, -0.6))
    save_figure(figure, path, 160)


def draw_figure5(dataset: CocoDataset, results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Some images of a data set with the detections (COCO's result format) of at least SHOWN_SCORE.

    The images are taken at equal distances from the data set, not chosen by their detections. Raises InputError if an
    image cannot be read or the picture cannot be written.
    """
    pictures = []
    for index in np.linspace(0, len(dataset) - 1, min(SHOWN, len(dataset))).round().astype(int).tolist():
        own = [
            result
            for result in results
            if result["image_id"] == dataset.image_ids[index] and result["score"] >= SHOWN_SCORE
        ]
        corners = [(x, y, x + width, y + height) for x, y, width, height in (result["bbox"] for result in own)]
        classes = [dataset.category_ids.index(result["category_id"]) for result in own]
        pictures.append(
            draw_detections(
                read_image(dataset.image_path(index)),
                np.array(corners, dtype=np.float64).reshape(-1, 4),
                [dataset.class_names[label] for label in classes],
                np.array([result["score"] for result in own], dtype=np.float64),
                classes,
            )
        )
    write_picture(path, lambda file: contact_sheet(pictures, COLUMNS).save(file, "png"))
