"""At which size a detector should see the images of a data set, and with which anchors."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megdet.data.stats import Statistics

EDGE_STEP = 32
"""Edges are multiples of this many pixels, like the canvases."""
LARGEST_EDGE = 800
"""The shorter edge of the paper's baseline, in pixels."""
SMALLEST_EDGE = 256
"""The shorter edge in pixels below which little is saved; smaller images keep their size."""
SMALL_OBJECT = 32.0
"""Pixels that a small object should have: COCO calls objects below it small, and finds them least."""
TINY_OBJECT = 12.0
"""Pixels below which an object is hardly found: 3 cells of the finest level."""
SMALL_MARK = 8.0
"""Pixels that a mark which tells two classes apart should have: 2 cells of the finest level."""
BASE_SIZES = (8, 10, 12, 14, 16, 20, 24, 28, 32)
"""Sizes in pixels that the smallest anchor may have, up to the paper's; each level doubles it."""
NUM_LEVELS = 5
FINEST_STRIDE = 4
"""Pixels from one anchor of the finest level to the next; each level doubles it."""
SPREADS = (1.25, 1.5, 1.75, 2.0)
"""How much taller or wider the other two ratios may be than the median."""
POSITIVE_IOU = 0.7
"""IoU from which the RPN takes an anchor for an object (Faster R-CNN, Sec. 3.1.2)."""
_LEAST_SHARE = 0.01
_MOST_BOXES = 20_000
_ALIKE_IOU = 0.03
_FEWEST_ALIKE = 5
_MOST_CANVASES = 12
_FEW_CANVAS_EDGES = 4


@dataclass(frozen=True)
class AnchorAdvice:
    """Anchors for a data set, and how well they fit."""

    sizes: tuple[int, ...]
    ratios: tuple[float, ...]
    """height over width"""
    mean_iou: float
    """mean over the boxes of the IoU with the best anchor (`best_ious`)"""
    positive_share: float
    """part of the boxes with which it is at least POSITIVE_IOU"""


def advised_edge(stats: Statistics, mark: float | None = None) -> int:
    """The shorter edge in pixels to which images should be resized.

    The smallest multiple of `EDGE_STEP` from `SMALLEST_EDGE` on at which the `small_object` has `SMALL_OBJECT` pixels,
    and a mark of `mark` pixels in the files has `SMALL_MARK`. It is at most `LARGEST_EDGE`, and only for a mark larger
    than the median image, whose enlarging adds no detail.
    """
    native = native_edge(stats)
    wanted, limit = float(SMALLEST_EDGE), min(native, LARGEST_EDGE)
    if stats.num_boxes:
        wanted = max(wanted, native * SMALL_OBJECT / small_object(stats))
    if mark is not None:
        wanted, limit = max(wanted, native * SMALL_MARK / mark), LARGEST_EDGE
    if limit < SMALLEST_EDGE:
        return limit
    return min(math.ceil(round(wanted / EDGE_STEP, 6)), limit // EDGE_STEP) * EDGE_STEP


def small_object(stats: Statistics) -> float:
    """The size in pixels of the files that stands for small objects.

    The 10% quantile of all sizes, or the median of a class (with 1% of the boxes at least) that is smaller.
    """
    medians = [
        float(np.median(own))
        for label in range(len(stats.class_counts))
        if len(own := stats.box_sizes[stats.box_classes == label]) >= max(1, _LEAST_SHARE * stats.num_boxes)
    ]
    return min([float(np.quantile(stats.box_sizes, 0.1)), *medians])


def native_edge(stats: Statistics) -> int:
    """The median of the images' shorter edges in pixels of the files."""
    return int(np.median(stats.image_sizes.min(axis=1)))


def advised_long_edge(stats: Statistics, edge: int) -> int:
    """The largest longer edge in pixels: 95% of the images reach the shorter edge, longer ones are shrunk to it."""
    long_over_short = stats.image_sizes.max(axis=1) / stats.image_sizes.min(axis=1)
    return int(np.ceil(round(edge * float(np.quantile(long_over_short, 0.95)), 6)))


def image_scales(stats: Statistics, edge: int, long_edge: int) -> NDArray[np.float64]:
    """(images,): the factor by which each image is resized."""
    short, long = stats.image_sizes.min(axis=1), stats.image_sizes.max(axis=1)
    scales: NDArray[np.float64] = np.minimum(edge / short, long_edge / long)
    return scales


def resized_objects(stats: Statistics, edge: int, long_edge: int) -> NDArray[np.float64]:
    """(boxes,): size (root of the area) of each object in pixels of the resized images."""
    sizes: NDArray[np.float64] = stats.box_sizes * image_scales(stats, edge, long_edge)[stats.box_images]
    return sizes


def advised_anchors(sizes: NDArray[np.float64], aspect_ratios: NDArray[np.float64]) -> AnchorAdvice:
    """Five sizes, each twice the one before, and the ratios that fit the boxes.

    The ratios are the median of height over width, alone where the 10% and 90% quantiles differ by less than 1.5, else
    with two more: the median over and times one of `SPREADS`. Of all `BASE_SIZES` and ratios whose mean IoU with the
    boxes is within 0.03 of the best, those are taken with which most boxes have `POSITIVE_IOU`, so that they train the
    RPN; of equal ones those with the highest mean.

    Args:
        sizes: (boxes,) root of the area in pixels of the resized images.
        aspect_ratios: (boxes,) width over height.
    """
    order = np.argsort(sizes, kind="stable")[:: max(1, len(sizes) // _MOST_BOXES)]
    sizes, tall = sizes[order], 1 / aspect_ratios[order]
    low, middle, high = (float(value) for value in np.quantile(tall, (0.1, 0.5, 0.9)))
    choices: list[tuple[float, ...]]
    if high / low < 1.5:
        choices = [(_rounded(middle),)]
    else:
        choices = [tuple(map(_rounded, (middle / spread, middle, middle * spread))) for spread in SPREADS]
    found = []
    for ratios in choices:
        for base in BASE_SIZES:
            ious = best_ious(sizes, tall, doubled(base), ratios)
            share = float((ious >= POSITIVE_IOU).mean())
            found.append(AnchorAdvice(doubled(base), ratios, float(ious.mean()), share))
    best = max(own.mean_iou for own in found)
    good = [own for own in found if own.mean_iou >= best - _ALIKE_IOU]
    return max(good, key=lambda own: (own.positive_share, own.mean_iou))


def _rounded(ratio: float) -> float:
    """To two decimals, of thin wide boxes to two digits."""
    return round(ratio, 2) if ratio >= 0.1 else float(f"{ratio:.2g}")


def doubled(base: int) -> tuple[int, ...]:
    """A size for each level of the pyramid, each twice the one before."""
    return tuple(base * 2**level for level in range(NUM_LEVELS))


def best_ious(
    sizes: NDArray[np.float64],
    heights_over_widths: NDArray[np.float64],
    anchor_sizes: tuple[int, ...],
    ratios: tuple[float, ...],
) -> NDArray[np.float64]:
    """(boxes,): the IoU with the best anchor whose centre is a quarter of its level's stride away along both axes.

    Anchors stand on a grid: that is the mean distance of a box's centre from the nearest of them. So an anchor of the
    finest level with 10 px has an IoU of 0.68 at most, with any box.
    """
    root = np.sqrt(heights_over_widths)
    width, height = sizes / root, sizes * root
    best = np.zeros(len(sizes))
    for level, size in enumerate(anchor_sizes):
        away = FINEST_STRIDE * 2**level / 4
        for ratio in ratios:
            shared = _shared(width, size / ratio**0.5, away) * _shared(height, size * ratio**0.5, away)
            best = np.maximum(best, shared / (sizes**2 + size**2 - shared))
    return best


def _shared(lengths: NDArray[np.float64], other: float, away: float) -> NDArray[np.float64]:
    """What intervals share with one whose centre is `away` from theirs."""
    shared: NDArray[np.float64] = np.minimum(lengths / 2, away + other / 2) - np.maximum(-lengths / 2, away - other / 2)
    return shared.clip(min=0)


def advised_canvas_edges(stats: Statistics, edge: int, long_edge: int) -> tuple[int, ...]:
    """At most four lengths for the edges of canvases where images have many sizes; empty for few sizes."""
    canvases = -(-_resized_sizes(stats, edge, long_edge) // EDGE_STEP) * EDGE_STEP
    if len(np.unique(canvases, axis=0)) <= _MOST_CANVASES:
        return ()
    levels = np.arange(1, _FEW_CANVAS_EDGES + 1) / _FEW_CANVAS_EDGES
    lengths = np.quantile(canvases, levels, method="higher")
    return tuple(int(length) for length in np.unique(lengths))


def added_padding(stats: Statistics, edge: int, long_edge: int, canvas_edges: tuple[int, ...]) -> float:
    """Pixels of the images' own canvases with these lengths, over those with multiples of 32, minus 1."""
    canvases = -(-_resized_sizes(stats, edge, long_edge) // EDGE_STEP) * EDGE_STEP
    rounded = np.array(canvas_edges)[np.searchsorted(canvas_edges, canvases)]
    return float(rounded.prod(axis=1).sum() / canvases.prod(axis=1).sum() - 1)


def _resized_sizes(stats: Statistics, edge: int, long_edge: int) -> NDArray[np.int64]:
    scales = image_scales(stats, edge, long_edge)
    sizes: NDArray[np.int64] = np.maximum(1, np.rint(stats.image_sizes * scales[:, None])).astype(np.int64)
    return sizes


def classes_alike(stats: Statistics) -> list[tuple[str, str]]:
    """Pairs of classes whose objects neither size nor shape tells apart, those with most boxes first.

    The middle halves (25% to 75% quantile) of their sizes overlap, and those of their aspect ratios. Classes of fewer
    than five boxes are left out.
    """
    names = list(stats.class_counts)
    halves = {}
    for label, name in enumerate(names):
        own = stats.box_classes == label
        if own.sum() >= _FEWEST_ALIKE:
            halves[name] = [np.quantile(values[own], (0.25, 0.75)) for values in (stats.box_sizes, stats.aspect_ratios)]
    pairs = [
        (first, second)
        for place, first in enumerate(names)
        for second in names[place + 1 :]
        if first in halves and second in halves and _overlap(halves[first], halves[second])
    ]
    return sorted(pairs, key=lambda pair: -min(stats.class_counts[name] for name in pair))


def _overlap(a: list[NDArray[np.float64]], b: list[NDArray[np.float64]]) -> bool:
    return all(max(x[0], y[0]) <= min(x[1], y[1]) for x, y in zip(a, b, strict=True))
