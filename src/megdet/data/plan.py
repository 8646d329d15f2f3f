"""The plan: which images make up every step, in which groups, on which canvas, with which augmentation.

It is a pure function of (recipe, image sizes, step): no rank, no state, no random generator that goes on. A rank reads
its slice of the plan, a resume is a position in it, and another number of devices is another slicing of it.

The order is an endless stream of permutations, one an epoch, cut into mini-batches of B: nobody is dropped, and epoch e
ends at step ceil(e n / B). Within each window of `plan_window` mini-batches the images are sorted by aspect ratio and
cut into groups, and the groups are shuffled over the window's mini-batches. The last window ends with the run, so every
image is seen in every complete epoch, also in the last. With `data.repeat_threshold` or `data.image_weights` an epoch
is as long, but some images come in it several times, each time with randomness of its own, and others may be left out
of it (see `sampling`).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from megdet.data.augment.mosaic import tiles_of
from megdet.data.augment.partners import paste_of
from megdet.data.augment.windows import window_of
from megdet.data.draws import generator, unit_interval
from megdet.data.planned import Crop, PlannedGroup, PlannedImage
from megdet.data.sampling.epochs import EpochOrders
from megdet.errors import InputError
from megdet.ops.integer_hash import hash_integers
from megdet.recipe import Data, Recipe, ResizeKind
from megdet.run_length import total_steps

_WINDOW, _IMAGE, _HORIZONTAL, _VERTICAL, _CROP_TOP, _CROP_LEFT = range(2, 8)
"""Purposes of random numbers, so that no two share a stream; the others are in `sampling`, `unreadable`,
`transforms` and `augment`."""


MOST_LOOKED_AT = 100_000
"""Images of a run, counted with repetitions, whose canvases are drawn to find the largest."""


class _DrawnGroup(NamedTuple):
    """What is drawn for a group: which images, each in which epoch, and the scale of all."""

    indices: NDArray[np.int64]
    epochs: NDArray[np.int64]
    copies: NDArray[np.int64]
    """how often each image has come in its epoch before; 0 unless images are repeated"""
    short_edge: int
    factor: float


class Canvases(NamedTuple):
    """The canvases of an epoch."""

    counts: Counter[tuple[int, int]]
    """groups on each canvas"""
    padding: float
    """part of the canvas pixels that is padding"""


class TrainingPlan:
    """The groups of every step.

    Args:
        sizes: height, width of each image in pixels.
        recipe: the recipe.
        frequencies: (images,) how often each comes, compared with the others, if the recipe has a
            `data.repeat_threshold` or `data.image_weights` (see `sampling.frequencies`).

    Raises:
        InputError: the data set is smaller than one mini-batch.
    """

    def __init__(
        self,
        sizes: Int64[np.ndarray, "images 2"],
        recipe: Recipe,
        frequencies: NDArray[np.float64] | None = None,
    ) -> None:
        if (frequencies is not None) != bool(recipe.data.repeat_threshold or recipe.data.image_weights):
            raise ValueError("a recipe with data.repeat_threshold or image_weights, and no other, needs frequencies")
        if len(sizes) < recipe.batch_size:
            raise InputError(
                f"{recipe.data.train_annotations}: {len(sizes)} images to train on are not enough for one mini-batch "
                f"of {recipe.batch_size}: lower batch_size or add images"
            )
        self.sizes, self.recipe, self._frequencies = sizes, recipe, frequencies
        self._groups = lru_cache(maxsize=2)(self._make_groups)
        self._drawn = lru_cache(maxsize=2)(self._draw_groups)
        self._epochs = EpochOrders(len(sizes), recipe.seed, frequencies)

    def __reduce__(self) -> tuple[type["TrainingPlan"], tuple[Any, Recipe, Any]]:
        # the caches hold functions, which cannot be pickled; a loading process makes its own
        return TrainingPlan, (self.sizes, self.recipe, self._frequencies)

    @property
    def num_images(self) -> int:
        """Images of the data set."""
        return len(self.sizes)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.recipe, self.num_images)

    def smallest_canvas(self) -> tuple[int, tuple[int, int]]:
        """The image with the fewest pixels at the smallest scale of the recipe, and its canvas."""
        data = self.recipe.data
        edge, factor = min(data.short_edges), min(data.scale_jitter)
        canvases = [self._canvas_at(own, edge, factor) for own in self.sizes[:, None]]
        index = min(range(len(canvases)), key=lambda i: canvases[i][0] * canvases[i][1])
        return index, canvases[index]

    def largest_canvas(self) -> tuple[int, int]:
        """The canvas with the most pixels of the run; of a long one, of its first epoch or `MOST_LOOKED_AT` images."""
        images = max(self.num_images, MOST_LOOKED_AT)
        steps = min(self.total_steps, -(-images // self.recipe.batch_size))
        bound, largest = self.canvas_bound(), (0, 0)
        for window, own in map(self._place_of, range(steps)):
            for drawn in self._drawn(window)[own]:  # `groups` would draw each image, which takes seconds
                canvas = self._canvas_at(self.sizes[drawn.indices], drawn.short_edge, drawn.factor)
                largest = max(largest, canvas, key=math.prod)
            if largest == bound:
                break
        return largest

    def canvas_bound(self) -> tuple[int, int]:
        """The height and the width that no canvas of the run exceeds."""
        data = self.recipe.data
        return self._canvas_at(np.unique(self.sizes, axis=0), max(data.short_edges), data.scale_jitter[1])

    def _canvas_at(self, sizes: NDArray[np.int64], edge: int, factor: float) -> tuple[int, int]:
        """The canvas of images of these heights and widths at one scale."""
        data = self.recipe.data
        whole = (training_size(height, width, edge, factor, data) for height, width in sizes.tolist())
        return _canvas([_cut(size, data) for size in whole], data)

    def canvases(self) -> Canvases:
        """How often each canvas occurs in the first epoch, and what its padding costs."""
        groups = [group for step in range(self.epoch_end(1)) for group in self.groups(step)]
        counts = Counter(group.canvas for group in groups)
        pixels = sum(height * width * len(group.images) for group in groups for height, width in [group.canvas])
        inside = sum(image.size[0] * image.size[1] for group in groups for image in group.images)
        return Canvases(counts, 1 - inside / pixels)

    def epoch_end(self, epochs: int | float) -> int:
        """The number of steps after which so many epochs are done."""
        return math.ceil(epochs * self.num_images / self.recipe.batch_size - 1e-9)

    def epochs_done(self, step: int) -> float:
        """Epochs that the first `step` steps make."""
        return step * self.recipe.batch_size / self.num_images

    def groups(self, step: int) -> Sequence[PlannedGroup]:
        """The groups of step 0, 1, ... in their order.

        The plan goes on after the run's end, in windows counted from there, for callers that make more steps.
        """
        window, own = self._place_of(step)
        return self._groups(window)[own]

    def _place_of(self, step: int) -> tuple[range, slice]:
        """The steps of the window that this step is in, and its groups among those of the window."""
        window, per_step = self._window_of(step), self.recipe.groups_per_step
        first = (step - window.start) * per_step
        return window, slice(first, first + per_step)

    def _window_of(self, step: int) -> range:
        """The steps of the window that this step is in."""
        length, end = self.recipe.plan_window, self.total_steps
        if step < end:
            first = step // length * length
            return range(first, min(first + length, end))
        first = end + (step - end) // length * length
        return range(first, first + length)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The image indices of epoch 0, 1, ... in the order in which they are drawn."""
        return self._epochs.places(epoch)[0]

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """All image indices, once each, in an order of epoch 0, 1, ...; the order, unless images are repeated."""
        return self._epochs.permutation(epoch)

    def order_of(self, step: int) -> NDArray[np.int64]:
        """The places in the data set of the images of step 0, 1, ..., in the order of its groups, which cost more."""
        window = self._window_of(step)
        indices = np.concatenate([drawn.indices for drawn in self._drawn(window)])
        first = (step - window.start) * self.recipe.batch_size
        return indices[first : first + self.recipe.batch_size]

    def _make_groups(self, window: range) -> list[PlannedGroup]:
        groups = []
        for indices, epochs, copies, short_edge, factor in self._drawn(window):
            own = zip(indices.tolist(), epochs.tolist(), copies.tolist(), strict=True)
            images = tuple(self._image(*one, short_edge, factor) for one in own)
            groups.append(PlannedGroup(_canvas([image.size for image in images], self.recipe.data), images))
        return groups

    def _draw_groups(self, window: range) -> list[_DrawnGroup]:
        recipe, n = self.recipe, self.num_images
        positions = np.arange(window.start * recipe.batch_size, window.stop * recipe.batch_size)
        epochs, places = positions // n, positions % n
        indices, copies = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            for all_places, own in zip((indices, copies), self._epochs.places(int(epoch)), strict=True):
                all_places[mine] = own[places[mine]]
        by_aspect = np.argsort(self._aspects[indices], kind="stable")
        random = generator(recipe.seed, _WINDOW, -(-window.start // recipe.plan_window))
        groups = []
        for start in range(0, len(positions), recipe.images_per_group):
            chosen = by_aspect[start : start + recipe.images_per_group]
            drawn = indices[chosen], epochs[chosen], copies[chosen]
            groups.append(_DrawnGroup(*drawn, *_draw_scale(recipe.data, random)))
        return [groups[i] for i in random.permutation(len(groups))]

    @cached_property
    def _aspects(self) -> NDArray[np.float64]:
        aspects: NDArray[np.float64] = self.sizes[:, 1] / self.sizes[:, 0]
        return aspects

    def _image(self, index: int, epoch: int, copy: int, short_edge: int, factor: float) -> PlannedImage:
        seed, data = hash_integers(self.recipe.seed, _IMAGE, epoch, index, *([copy] if copy else [])), self.recipe.data
        image = self._prepared(index, epoch, seed, short_edge, factor)
        if not data.mosaic and not data.copy_paste:
            return image

        def prepared(other: int, own_seed: int) -> PlannedImage:
            return self._prepared(other, epoch, own_seed, short_edge, factor)

        partners = self.order(epoch), prepared, data
        return replace(image, tiles=tiles_of(image, *partners), paste=paste_of(image, *partners))

    def _prepared(self, index: int, epoch: int, seed: int, short_edge: int, factor: float) -> PlannedImage:
        data = self.recipe.data
        height, width = self.sizes[index].tolist()
        whole = training_size(height, width, short_edge, factor, data)
        size = _cut(whole, data)
        top, left = (
            math.floor(unit_interval(seed, purpose) * (length - cut + 1))
            for purpose, length, cut in zip((_CROP_TOP, _CROP_LEFT), whole, size, strict=True)
        )
        return PlannedImage(
            index,
            epoch,
            seed,
            size,
            unit_interval(seed, _HORIZONTAL) < data.horizontal_flip,
            unit_interval(seed, _VERTICAL) < data.vertical_flip,
            data.resize,
            Crop(whole, (top, left), data.crop_least_area) if size != whole else None,
            window_of(seed, (height, width), data) if data.crop_probability else None,
        )


def evaluation_plan(sizes: Int64[np.ndarray, "images 2"], recipe: Recipe) -> list[PlannedGroup]:
    """The groups of an evaluation: every image once at each scale; a group has one canvas and goes to one rank.

    The groups of one batch of images at all scales follow each other, in the order of the scales; their images share a
    canvas at every scale. Detections of an image do not depend on the other images, so `detect` finds the same in its
    file alone.
    """
    data, most, scales = recipe.data, recipe.evaluation.batch_size, evaluation_scales(recipe)
    alike: dict[tuple[tuple[int, int], ...], list[tuple[PlannedImage, ...]]] = {}
    for index, (height, width) in enumerate(sizes.tolist()):
        own = [evaluation_size(height, width, data, edge) for edge in scales]
        planned = tuple(PlannedImage(index, 0, 0, size, resize=data.resize) for size in own)
        alike.setdefault(tuple(canvas_of(size, data) for size in own), []).append(planned)
    return [
        PlannedGroup(canvas, tuple(image[scale] for image in images[start : start + most]))
        for canvases, images in sorted(alike.items())
        for start in range(0, len(images), most)
        for scale, canvas in enumerate(canvases)
    ]


def evaluation_scales(recipe: Recipe) -> tuple[int, ...]:
    """The lengths in pixels of the shorter edge at which an image is evaluated."""
    return recipe.evaluation.scales or recipe.data.short_edges[-1:]


def evaluation_size(height: int, width: int, data: Data, short_edge: int | None = None) -> tuple[int, int]:
    """Height and width in pixels to which an image is resized for evaluation.

    For a `short_edge` other than the recipe's, the limit of the longer edge is scaled with it, so that an image has the
    same shape at every scale.
    """
    edge = data.short_edges[-1]
    short_edge = short_edge or edge
    return resized(height, width, short_edge, data.max_long_edge * short_edge / edge, data.resize)


def training_size(height: int, width: int, short_edge: int, factor: float, data: Data) -> tuple[int, int]:
    """Height and width in pixels to which an image is resized for training, before a crop.

    `short_edge` and `factor` are drawn for its group; if the recipe has a crop, the image fits into it at factor 1.
    """
    if not data.crop:
        return resized(height, width, short_edge * factor, data.max_long_edge * factor, data.resize)
    scale = min(data.crop[0] / height, data.crop[1] / width)
    return resized(height, width, scale * factor * min(height, width), math.inf, data.resize)


def _cut(size: tuple[int, int], data: Data) -> tuple[int, int]:
    """Height and width that a crop leaves of an image of this height and width."""
    if not data.crop:
        return size
    return min(size[0], data.crop[0]), min(size[1], data.crop[1])


def resized(
    height: int, width: int, short_edge: int | float, max_long_edge: int | float, kind: ResizeKind = "antialias"
) -> tuple[int, int]:
    """Height and width with the shorter edge at `short_edge`, unless the longer one would exceed its maximum.

    Rounded to the nearest pixel; for `kind` torchvision rounded down, so that 799.9999 becomes 799.
    """
    scale = min(short_edge / min(height, width), max_long_edge / max(height, width))
    whole = math.floor if kind == "torchvision" else round
    return max(1, whole(height * scale)), max(1, whole(width * scale))


def _draw_scale(data: Data, random: np.random.Generator) -> tuple[int, float]:
    short_edge = data.short_edges[int(random.integers(len(data.short_edges)))]
    low, high = data.scale_jitter
    if data.scale_law == "factor":
        return short_edge, float(random.uniform(low, high))
    return short_edge, float(np.exp(random.uniform(np.log(low), np.log(high))))


def _canvas(sizes: Sequence[tuple[int, int]], data: Data) -> tuple[int, int]:
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    return canvas_of((height, width), data)


def canvas_of(size: tuple[int, int], data: Data) -> tuple[int, int]:
    """The canvas of images of at most this height and width: each edge rounded up as the recipe says."""
    height, width = (_rounded(length, data) for length in size)
    return height, width


def _rounded(length: int, data: Data) -> int:
    multiple = data.canvas_multiple
    return next((edge for edge in data.canvas_edges if edge >= length), -(-length // multiple) * multiple)
