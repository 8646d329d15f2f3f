"""What the detections of a run say of it, as the page shows them: classes, thresholds, mistakes."""

from dataclasses import asdict
from typing import Any

import numpy as np

from megdet.errors import printable
from megdet.evaluation.confusion import confusion_matrix
from megdet.evaluation.counting import Kind
from megdet.evaluation.error_kinds import MEANING, error_kinds
from megdet.evaluation.resampling import average_precisions, draw_images, interval, mean_ap
from megdet.evaluation.thresholds import Curve, Point, curve
from megdet.studies.comparison.runs import ScoredRun

SURE = 0.9
"""The precision of the second threshold that is advised."""
_FEW_CLASSES, _POINTS, _FEWER_POINTS = 20, 120, 40
_SIZES = {"small": ("s", 0.0, 32.0**2), "medium": ("m", 32.0**2, 96.0**2), "large": ("l", 96.0**2, np.inf)}


def analysis_of(run: ScoredRun, kind: Kind, resamples: int) -> dict[str, Any]:
    """The numbers of all classes and of each, curves, sizes, the confusion matrix and the kinds of mistakes."""
    numbers = run.evaluation.bbox if kind == "bbox" else run.evaluation.segm
    assert numbers is not None, "the kind is one of the run's"
    matches, sides = run.matches(kind), run.sides(kind)
    together = curve(matches)
    per_class = [
        asdict(numbers.per_class[name]) | {"name": printable(name)} | _thresholds(curve([own]), len(matches))
        for name, own in zip(run.task.class_names, matches, strict=True)
    ]
    best = together.best_f1()
    threshold = 0.5 if best is None else best.threshold
    matrix = confusion_matrix(sides, matches, threshold)
    draws = draw_images(len(run.task.image_ids), resamples)
    areas = sides.truth.areas[~sides.truth.is_crowd]
    return {
        "numbers": {key: value for key, value in numbers.as_dict().items() if key != "per_class"},
        "over_images": interval(mean_ap(average_precisions(matches, draws)), around=numbers.AP),
        "all": {"name": "all classes"} | _thresholds(together, 1),
        "classes": per_class,
        "threshold": threshold,
        "confusion": [[*map(int, place), int(matrix[place])] for place in zip(*matrix.nonzero(), strict=True)],
        "sizes": [
            {
                "name": name,
                "AP": getattr(numbers, f"AP{key}"),
                "AR": getattr(numbers, f"AR{key}"),
                "objects": int(((areas >= low) & (areas < high)).sum()),
            }
            for name, (key, low, high) in _SIZES.items()
        ],
        "errors": [asdict(own) | {"meaning": MEANING[own.name]} for own in error_kinds(sides, len(matches), kind)],
    }


def _thresholds(own: Curve, num_classes: int) -> dict[str, Any]:
    """The points of a curve, threshold, right, shown, and the two advised thresholds."""
    places = own.spread(_POINTS if num_classes <= _FEW_CLASSES else _FEWER_POINTS)
    points = zip(*(values[places].tolist() for values in (own.thresholds, own.right, own.shown)), strict=True)
    return {
        "objects": own.objects,
        "points": [list(point) for point in points],
        "best": _told(own.best_f1()),
        "sure": _told(own.at_precision(SURE)),
    }


def _told(point: Point | None) -> dict[str, float] | None:
    return None if point is None else asdict(point)
