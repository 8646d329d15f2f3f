"""AP on other images of the same kind: images are drawn again, and the matched detections counted again.

A data set is a sample. The bootstrap (Efron 1979) estimates AP on other samples: draw as many images as there are, with
replacement, and count. Two detectors are compared on the same draws, because an image that is hard for one is hard for
the other.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from megdet.evaluation.matches import OVERLAPS, ClassMatches

RECALLS = np.linspace(0.0, 1.0, 101)
"""The recalls at which COCO reads the precision."""
_TOGETHER = 1 << 23  # numbers in one array, to limit memory

Resampled = Float[np.ndarray, "resamples classes ious"]


def draw_images(num_images: int, resamples: int, seed: int = 0) -> Int[np.ndarray, "resamples images"]:
    """How often each image is in each resample; a resample has as many images as the data set."""
    drawn = np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), resamples)
    return drawn.astype(np.int32)


def average_precisions(classes: Sequence[ClassMatches], weights: Int[np.ndarray, "resamples images"]) -> Resampled:
    """AP of every class at the ten IoUs if each image counts `weights` times; NaN if a class has no object.

    It equals COCO's AP on a data set in which each image is repeated so often, where no two images have detections of
    one score: copies of a detection are counted next to each other, by COCO after those of the other images.
    """
    found = np.full((len(weights), len(classes), len(OVERLAPS)), np.nan)
    for label, own in enumerate(classes):
        rows = max(1, _TOGETHER // max(1, len(own.images)))
        for start in range(0, len(weights), rows):
            found[start : start + rows, label] = _of_class(own, weights[start : start + rows])
    return found


def mean_ap(found: Resampled) -> Float[np.ndarray, " resamples"]:
    """The mean over IoUs and the classes that have objects (mmAP); NaN if no class has."""
    has_objects = ~np.isnan(found)
    total = np.where(has_objects, found, 0.0).sum(axis=(1, 2))
    return np.where(has_objects.any(axis=(1, 2)), total / np.maximum(has_objects.sum(axis=(1, 2)), 1), np.nan)


def interval(
    values: Float[np.ndarray, " resamples"], level: float = 0.95, around: float | None = None
) -> tuple[float, float]:
    """The lowest and highest value of the middle `level` of the resamples; NaN if there is none.

    With `around`, the AP of the data set itself, they are moved so that this is their mean: a resample repeats images,
    which lifts AP a little.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return np.nan, np.nan
    if around is not None:
        known = known - known.mean() + around
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _of_class(own: ClassMatches, weights: Int[np.ndarray, "resamples images"]) -> Float[np.ndarray, "resamples ious"]:
    objects = weights @ own.objects
    drawn = weights[:, own.images]
    all_seen = drawn.cumsum(axis=1, dtype=np.int32)
    found = np.zeros((len(weights), len(OVERLAPS)))
    for place in range(len(OVERLAPS)):
        is_counted, right = own.is_counted[:, place], np.flatnonzero(own.is_right[:, place])
        seen = all_seen if is_counted.all() else (drawn * is_counted).cumsum(axis=1, dtype=np.int32)
        hits = drawn[:, right].cumsum(axis=1, dtype=np.int32)
        precision = hits / np.maximum(seen[:, right], 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(RECALLS, hits / np.maximum(objects, 1)[:, None], side="right")
        found[:, place] = (precision * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)
    found[objects == 0] = np.nan
    return found
