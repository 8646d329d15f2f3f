"""How much AP each kind of mistake costs, after TIDE (Bolya et al., ECCV 2020), counted by hotcoco.

Every wrong detection and every missed object is of one kind. The cost of a kind is the gain in AP50 if all mistakes of
this kind, and no others, were corrected. The costs do not add up to 100 - AP50: correcting one kind uncovers another.
"""

from dataclasses import dataclass

from megdet.evaluation.counting import Kind, matched
from megdet.evaluation.task import Sides

MEANING = {
    "classification": "overlaps an object of another class by 0.5 or more",
    "localisation": "the right class, but overlaps its object by 0.1 to 0.5 only",
    "both": "overlaps an object of another class by 0.1 to 0.5",
    "duplicate": "the object was found already, with a higher score",
    "background": "overlaps no object by 0.1",
    "missed": "an object that nothing has found, not even with a wrong class or a wrong place",
}
"""The kinds of mistakes and their definitions."""
_TIDE = {
    "classification": "Cls",
    "localisation": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}


@dataclass(frozen=True)
class ErrorKind:
    """One kind of mistake."""

    name: str
    count: int
    """mistakes of this kind, at all scores"""
    cost: float
    """AP50 that would be gained without them, 0..1"""


def error_kinds(sides: Sides, num_classes: int, kind: Kind) -> list[ErrorKind]:
    """The six kinds of TIDE, in the order of `MEANING`."""
    told = matched(sides.truth, sides.found, range(num_classes), kind).tide_errors(pos_thr=0.5, bg_thr=0.1)
    return [ErrorKind(name, int(told["counts"][key]), float(told["delta_ap"][key])) for name, key in _TIDE.items()]
