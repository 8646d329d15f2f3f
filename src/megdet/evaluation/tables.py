"""An evaluation as tables for the terminal."""

import itertools

from rich.table import Table
from rich.text import Text

from megdet.errors import printable
from megdet.evaluation.coco_numbers import ClassNumbers, CocoNumbers, Evaluation

_MOST_SHOWN, _SHOWN = 100, 20  # up to _MOST_SHOWN classes a table has all, else the first and the worst _SHOWN


def tables(evaluation: Evaluation) -> list[Table]:
    """The tables of boxes, then of masks if there are any: of all classes together, and of each class."""
    found = [numbers_table(evaluation.bbox, "boxes"), per_class_table(evaluation.bbox, "boxes")]
    if evaluation.segm is not None:
        found += [numbers_table(evaluation.segm, "masks"), per_class_table(evaluation.segm, "masks")]
    return found


def numbers_table(numbers: CocoNumbers, of: str) -> Table:
    """The twelve numbers in percent, mmAP and mmAR first; a dash if there is no such object."""
    meaning = {
        "AP": ("mmAP", "IoU 0.50:0.95"),
        "AR100": ("mmAR", "IoU 0.50:0.95, 100 detections an image"),
        "AP50": ("AP50", "IoU 0.50"),
        "AP75": ("AP75", "IoU 0.75"),
        "APs": ("APs", "objects below 32 x 32 pixels"),
        "APm": ("APm", "objects from 32 x 32 to 96 x 96 pixels"),
        "APl": ("APl", "objects above 96 x 96 pixels"),
        "AR1": ("AR1", "1 detection an image"),
        "AR10": ("AR10", "10 detections an image"),
        "ARs": ("ARs", "objects below 32 x 32 pixels"),
        "ARm": ("ARm", "objects from 32 x 32 to 96 x 96 pixels"),
        "ARl": ("ARl", "objects above 96 x 96 pixels"),
    }
    table = Table(title=f"COCO numbers, {of} (percent)", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("of", style="dim")
    for key, (name, what) in meaning.items():
        table.add_row(name, _percent(getattr(numbers, key)), what, style="bold" if name.startswith("mm") else None)
        if name == "mmAR":
            table.add_section()
    return table


def per_class_table(numbers: CocoNumbers, of: str) -> Table:
    """The classes' numbers in percent, in the order of their category ids; a dash for a class without boxes.

    If there are many classes, the table has the first twenty and the twenty of lowest mmAP that have boxes.
    """
    chosen = _shown_classes(numbers.per_class)
    title = f"Classes, {of} (percent)"
    if len(chosen) < len(numbers.per_class):
        of_all = f"{len(numbers.per_class)} classes"
        title = f"The first {_SHOWN} of {of_all} and the worst {_SHOWN}, {of} (percent), all in the JSON"
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for heading in ("objects", "mmAP", "mmAR", "AP50", "AP75"):
        table.add_column(heading, justify="right")
    for position, name in enumerate(chosen):
        of_class = numbers.per_class[name]
        shown = [_percent(value) for value in (of_class.AP, of_class.AR100, of_class.AP50, of_class.AP75)]
        if position == _SHOWN and len(chosen) < len(numbers.per_class):
            table.add_section()
        # Text, because rich reads [brackets] in a string as markup
        table.add_row(Text(printable(name)), str(of_class.num_boxes), *shown)
    return table


def _shown_classes(per_class: dict[str, ClassNumbers]) -> list[str]:
    if len(per_class) <= _MOST_SHOWN:
        return list(per_class)
    worst = sorted((name for name in per_class if per_class[name].num_boxes), key=lambda name: per_class[name].AP)
    return [*itertools.islice(per_class, _SHOWN), *worst[:_SHOWN]]


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"
