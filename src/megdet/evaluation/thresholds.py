"""Precision, recall and F1 at every score threshold, at IoU 0.5, to choose a threshold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from megdet.evaluation.matches import ClassMatches


@dataclass(frozen=True)
class Point:
    """The numbers of a threshold: detections of at least this score are shown."""

    threshold: float
    precision: float
    """fraction of the shown detections that are right"""
    recall: float
    """fraction of the objects that are found"""
    f1: float
    """harmonic mean of precision and recall"""


@dataclass(frozen=True)
class Curve:
    """All thresholds at which the numbers change, the highest first."""

    thresholds: Float[np.ndarray, " points"]
    right: Int64[np.ndarray, " points"]
    """number of objects found by detections of at least this score"""
    shown: Int64[np.ndarray, " points"]
    """number of detections of at least this score, without those on crowds"""
    objects: int

    @property
    def precision(self) -> Float[np.ndarray, " points"]:
        """The fraction of the shown detections that are right."""
        part: Float[np.ndarray, " points"] = self.right / self.shown.clip(1)
        return part

    @property
    def recall(self) -> Float[np.ndarray, " points"]:
        """The fraction of the objects that are found; 0 if there is no object."""
        return self.right / max(self.objects, 1)

    @property
    def f1(self) -> Float[np.ndarray, " points"]:
        """2 x right / (shown + objects), the harmonic mean of precision and recall."""
        mean: Float[np.ndarray, " points"] = 2 * self.right / (self.shown + self.objects).clip(1)
        return mean

    def point(self, index: int) -> Point:
        """The numbers of one threshold."""
        numbers = (self.thresholds, self.precision, self.recall, self.f1)
        return Point(*(float(values[index]) for values in numbers))

    def best_f1(self) -> Point | None:
        """The threshold of the highest F1, the highest among equals; None if no detection is right."""
        return self.point(int(self.f1.argmax())) if self.right.any() else None

    def at_precision(self, least: float) -> Point | None:
        """The lowest threshold whose precision is at least `least`, which finds most objects; None if there is none."""
        reached = np.flatnonzero((self.precision >= least) & (self.right > 0))
        return self.point(int(reached[-1])) if len(reached) else None

    def spread(self, most: int) -> Int64[np.ndarray, " points"]:
        """About `most` points for drawing, even in recall and in threshold, with the ends and the best points."""
        if len(self.thresholds) <= most:
            return np.arange(len(self.thresholds))
        kept = {0, len(self.thresholds) - 1, int(self.f1.argmax())}
        precise = np.flatnonzero((self.precision >= 0.9) & (self.right > 0))
        kept |= {int(precise[-1])} if len(precise) else set()
        for values, low, high in ((self.recall, 0.0, float(self.recall[-1])), (-self.thresholds, -1.0, 0.0)):
            wanted = np.linspace(low, high, most // 2)
            kept |= {*np.searchsorted(values, wanted).clip(0, len(values) - 1).tolist()}
        return np.array(sorted(kept), np.int64)


def curve(classes: Sequence[ClassMatches]) -> Curve:
    """The curve of one class, or of several together; every detection and object counts equally."""
    scores = np.concatenate([own.scores[own.is_counted[:, 0]] for own in classes])
    is_right = np.concatenate([own.is_right[own.is_counted[:, 0], 0] for own in classes])
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], is_right[order].cumsum()
    last = np.flatnonzero(np.diff(scores, append=-np.inf))  # equal scores are shown together
    return Curve(scores[last], right[last], last + 1, int(sum(own.objects.sum() for own in classes)))
