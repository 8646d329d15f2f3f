"""What a recipe for a data set should say, and why: a pure function of the statistics of the data set.

The rules are ours, not the paper's, except for those that name it. They start from the packaged recipes that were
trained: bccd (292 photos, 17 epochs of 37 updates), coco-mini (80 photos, 80 epochs) and demo (2,000 drawn pictures,
random weights, 7 epochs).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.architecture_parts import flat_anchor
from megdet.data import sizes_advice as sizes
from megdet.data.stats import Statistics
from megdet.errors import InputError, printable

IMAGES_SEEN, IMAGES_SEEN_FROM_RANDOM, IMAGES_SEEN_OF_A_CLASS = 6_000, 15_000, 50
"""Images, counted with repetitions, that a run sees: from trained weights or random ones, and more for each class."""
FEWEST_EPOCHS, MOST_EPOCHS = 12, 100
FEWEST_UPDATES = 600
"""Updates of a run, below which the mini-batch is 8 images instead of 16."""
LARGEST_BN_SIZE = 32
"""Images of one set of batch statistics: the paper finds no gain beyond (Table 3)."""
_LEAST_BN_SIZE = 8
"""Fewer are not advised where the mini-batch has more."""
SELDOM = 0.1
"""Part of the images below which a class is rare."""
FEW_BOXES = 20
"""Boxes below which a class is hardly learnt."""
_NOTABLE_SHARE = 0.05
_MUCH_SMALLER = 0.9  # of an image's edge; resizing by less loses no mark
_CANONICAL_OF_BASE = 7  # the FPN paper: RoIs of 224 px are pooled from P4, the anchors of P2 have 32 px

_SMALL_PARTS = {
    "model.fpn.channels": 128,
    "model.fpn.norm": "batch",
    "model.rpn.samples": 128,
    "model.rpn.train_proposals_before_nms": 500,
    "model.rpn.train_proposals": 300,
    "model.rpn.test_proposals_before_nms": 500,
    "model.rpn.test_proposals": 300,
    "model.box_head.channels": 512,
    "model.box_head.samples": 128,
}
BACKBONES: dict[str, Mapping[str, Any]] = {
    "mobilenetv2_100": {"model.backbone.last_convolution": True, **_SMALL_PARTS},
    "resnet18": _SMALL_PARTS,
    "resnet50": {},
}
"""The backbones that are advised on, with the other parts that suit each; those of resnet50 are the paper's."""


@dataclass(frozen=True)
class Wishes:
    """What a user has decided; None is left to the advice."""

    short_edge: int | None = None
    """pixels"""
    mark: float | None = None
    """size in pixels of the files of the smallest mark that tells two classes apart"""
    batch_size: int | None = None
    epochs: int | None = None
    backbone: str = "mobilenetv2_100"
    """one of `BACKBONES`"""
    weights: str = ""
    """file of trained weights of the backbone; empty = random weights"""


@dataclass(frozen=True)
class AdvisedValue:
    """A key of a recipe, its value for this data set, and the reason."""

    key: str
    value: Any
    why: str
    is_set: bool = True
    """false for a value that the recipe shows in a comment, because the images do not tell whether it fits"""


@dataclass(frozen=True)
class Advice:
    """The keys of a recipe for a data set, and what is doubtful about it."""

    values: tuple[AdvisedValue, ...]
    """in the order of a recipe"""
    warnings: tuple[str, ...]
    """a sentence each"""

    def __getitem__(self, key: str) -> Any:
        """The value of a key. Raises KeyError."""
        return {own.key: own.value for own in self.values}[key]


def advise(stats: Statistics, wishes: Wishes | None = None) -> Advice:
    """The recipe for a data set. Raises InputError if it has no boxes, or an edge or mini-batch cannot be."""
    wishes = wishes or Wishes()
    if not stats.num_boxes:
        raise InputError("the data set has no box, so there is nothing to advise: add annotations")
    edge = wishes.short_edge or sizes.advised_edge(stats, wishes.mark)
    long_edge = sizes.advised_long_edge(stats, edge)
    objects = sizes.resized_objects(stats, edge, long_edge)
    num_images = stats.num_images - stats.num_empty_images
    values = [
        *_batch_values(stats, wishes, num_images),
        *_image_values(stats, wishes, edge, long_edge),
        *_model_values(stats, wishes, objects),
        *_training_values(stats, wishes, num_images),
    ]
    return Advice(tuple(values), tuple(_warnings(stats, wishes, edge, objects)))


def advised_epochs(stats: Statistics, wishes: Wishes, num_images: int) -> int:
    """Epochs: as many as show the wanted number of images, from 12 to 100."""
    return wishes.epochs or min(max(math.ceil(_images_seen(stats, wishes) / num_images), FEWEST_EPOCHS), MOST_EPOCHS)


def advised_batch(stats: Statistics, wishes: Wishes, num_images: int) -> int:
    """Images of a mini-batch: 16 as in the paper's baseline, 8 in a run of few updates, all of fewer than 8 images."""
    if wishes.batch_size is not None:
        return wishes.batch_size
    updates = advised_epochs(stats, wishes, num_images) * num_images / 16
    return 16 if updates >= FEWEST_UPDATES else min(8, num_images)


def _images_seen(stats: Statistics, wishes: Wishes) -> int:
    start = IMAGES_SEEN if wishes.weights else IMAGES_SEEN_FROM_RANDOM
    return start + IMAGES_SEEN_OF_A_CLASS * len(stats.class_counts)


def _batch_values(stats: Statistics, wishes: Wishes, num_images: int) -> Iterator[AdvisedValue]:
    batch = advised_batch(stats, wishes, num_images)
    if batch > num_images:
        raise InputError(
            f"batch size {batch} is more than the {num_images} images with a box: choose {num_images} or fewer"
        )
    updates = math.ceil(advised_epochs(stats, wishes, num_images) * num_images / batch)
    why = "as asked" if wishes.batch_size else "the paper's baseline" if batch == 16 else "few images: more updates"
    yield AdvisedValue("batch_size", batch, f"images an update, {why}; the run has {updates} updates")
    bn_size = max(size for size in range(1, min(batch, LARGEST_BN_SIZE) + 1) if batch % size == 0)
    if batch > LARGEST_BN_SIZE and bn_size < _LEAST_BN_SIZE:
        raise InputError(
            f"batch size {batch} has no divisor from {_LEAST_BN_SIZE} to {LARGEST_BN_SIZE}, which its BN groups need: "
            f"choose {batch // 8 * 8} or {batch // 8 * 8 + 8}"
        )
    yield AdvisedValue(
        "bn_size",
        bn_size,
        f"images that share batch statistics: the whole mini-batch, or its largest divisor up to {LARGEST_BN_SIZE}, "
        "beyond which the paper finds no gain",
    )


def _image_values(stats: Statistics, wishes: Wishes, edge: int, long_edge: int) -> Iterator[AdvisedValue]:
    native, small = sizes.native_edge(stats), sizes.small_object(stats)
    scale = edge / native
    why = f"a small object has {small:.0f} px in the files and {small * scale:.0f} px here"
    if wishes.short_edge is not None:
        why = f"as asked; {why}"
    elif small * scale < sizes.SMALL_OBJECT:
        why += (
            f", less than the {sizes.SMALL_OBJECT:.0f} wanted: larger would only enlarge the images, or cost too much"
        )
    else:
        why += f"; {sizes.SMALL_OBJECT:.0f} px are wanted"
    if wishes.mark is not None:
        why += (
            f"; a mark of {wishes.mark:g} px has {wishes.mark * scale:.1f} px here, {sizes.SMALL_MARK:.0f} are wanted"
        )
    why += f"; the median image has a short edge of {native} px"
    if pairs := _look_alike(stats, wishes, edge):
        why += (
            f". {' and '.join(pairs[0])} have boxes of one size and shape: if small marks tell them apart, give --mark"
        )
    yield AdvisedValue("data.short_edges", (edge,), why)
    yield AdvisedValue(
        "data.max_long_edge", long_edge, "95% of the images reach the short edge; longer ones are shrunk to this"
    )
    canvas_edges = sizes.advised_canvas_edges(stats, edge, long_edge)
    if canvas_edges:
        more = sizes.added_padding(stats, edge, long_edge, canvas_edges)
        why = f"images have many sizes: these lengths make few canvases, for --compile, and cost {more:.0%} more pixels"
        yield AdvisedValue("data.canvas_edges", canvas_edges, why, is_set=False)
    seldom = _seldom(stats)
    if seldom:
        why = f"classes in less than {SELDOM:.0%} of the images ({_named(seldom)}): set it and they come more often"
        yield AdvisedValue("data.repeat_threshold", SELDOM, why, is_set=False)
    if stats.num_empty_images:
        why = f"{stats.num_empty_images} images have no box: set it if that is because they show no object"
        yield AdvisedValue("data.keep_empty_images", True, why, is_set=False)
    yield AdvisedValue(
        "data.horizontal_flip",
        0.0,
        "half of the images are mirrored: set it if letters, digits, or left and right tell classes apart",
        is_set=False,
    )
    yield AdvisedValue(
        "data.vertical_flip", 0.5, "set it if the images have no up and down, as those of a microscope", is_set=False
    )


def _look_alike(stats: Statistics, wishes: Wishes, edge: int) -> list[tuple[str, str]]:
    """Pairs of classes that only marks may tell apart, where images are shrunk and no size of the marks is given."""
    if wishes.mark is not None or edge >= _MUCH_SMALLER * sizes.native_edge(stats):
        return []
    return [(printable(first), printable(second)) for first, second in sizes.classes_alike(stats)]


def _seldom(stats: Statistics) -> list[str]:
    """The classes that are in less than `SELDOM` of the images with boxes, but in one at least."""
    num_images = stats.num_images - stats.num_empty_images
    found = []
    for label, name in enumerate(stats.class_counts):
        images = len(np.unique(stats.box_images[stats.box_classes == label]))
        if 0 < images < SELDOM * num_images:
            found.append(name)
    return found


def _model_values(stats: Statistics, wishes: Wishes, objects: NDArray[np.float64]) -> Iterator[AdvisedValue]:
    small = wishes.backbone != "resnet50"
    why = "small, for a CPU or few images" if small else "the paper's"
    yield AdvisedValue("model.backbone.name", wishes.backbone, f"{why}; resnet50 for a GPU" if small else why)
    if wishes.weights:
        yield AdvisedValue("model.backbone.weights", wishes.weights, "as asked")
    anchors = sizes.advised_anchors(objects, stats.aspect_ratios)
    low, high = np.quantile(objects, (0.05, 0.95)).round().astype(int).tolist()
    parts = {**BACKBONES[wishes.backbone]}
    most = int(np.quantile(stats.boxes_per_image, 0.99))
    if most > 60:
        parts["model.rpn.test_proposals"] = max(1000, 5 * most)
        parts["model.rpn.train_proposals"] = max(1000, 5 * most)
    if most > 80:
        parts["model.box_head.detections"] = -(-most * 5 // 4 // 50) * 50
    own = {
        "model.anchors.sizes": (anchors.sizes, f"90% of the objects have {low} to {high} px here; mean IoU of the "
                                f"objects with their best anchor {anchors.mean_iou:.2f}, 0.7 or more for "
                                f"{anchors.positive_share:.0%}"),
        "model.anchors.ratios": (anchors.ratios, "height over width: the median of the boxes, and so much taller and "
                                 "wider that most objects fit"
                                 if len(anchors.ratios) > 1 else "height over width: that of nearly all boxes"),
        "model.box_head.canonical_size": (_CANONICAL_OF_BASE * anchors.sizes[0],
                                          "7 times the smallest anchor, as in the FPN paper"),
    }  # fmt: skip
    if flat_anchor([anchors.sizes], anchors.ratios):
        own["model.anchors.whole_pixels"] = False, "so thin anchors would have no area in whole pixels"
    suits = f"suits {wishes.backbone}, as in the packaged recipes"
    crowded = f"1% of the images have more than {most} boxes"
    for key, value in parts.items():
        is_crowded = value != BACKBONES[wishes.backbone].get(key)
        own[key] = value, crowded if is_crowded else suits
    order = ("backbone", "fpn", "anchors", "rpn", "box_head")
    for key, (value, reason) in sorted(own.items(), key=lambda item: order.index(item[0].split(".")[1])):
        yield AdvisedValue(key, value, reason)


def _training_values(stats: Statistics, wishes: Wishes, num_images: int) -> Iterator[AdvisedValue]:
    batch, epochs = advised_batch(stats, wishes, num_images), advised_epochs(stats, wishes, num_images)
    updates = math.ceil(epochs * num_images / batch)
    yield from _rate(wishes, batch)
    yield AdvisedValue("optimizer.clip_norm", 10, "a rare large gradient does not end the run")
    decay = round(min(1 - 12 / max(updates, 24), 0.9998), 4)
    yield AdvisedValue("optimizer.ema_decay", decay, "averages the weights over the last twelfth of the run")
    yield AdvisedValue("schedule.policy", "cosine", "needs no milestones")
    if wishes.epochs:
        why = "as asked"
    else:
        why = f"{_images_seen(stats, wishes):,} images seen, {FEWEST_EPOCHS} to {MOST_EPOCHS} epochs"
        why += "" if wishes.weights else "; random weights need more than twice as many as trained ones"
    yield AdvisedValue("schedule.epochs", epochs, why)
    yield AdvisedValue(
        "schedule.warmup_steps", min(500, max(1, updates // 10)), "a tenth of the run, at most 500 (Sec. 3.2)"
    )
    yield AdvisedValue("schedule.warmup_start", 0.1, "of base_lr: the layers of classes are random")
    yield AdvisedValue("evaluation.every_epochs", max(1, math.ceil(epochs / 3)), "three evaluations a run")


def _rate(wishes: Wishes, batch: int) -> Iterator[AdvisedValue]:
    if wishes.backbone == "resnet50":
        base = 0.02
        yield AdvisedValue(
            "optimizer.base_lr",
            base,
            f"the paper's; the rate of 16 images, so updates of {batch} have {base * batch / 16:g} (linear rule)",
        )
        return
    base = 0.001 if wishes.weights else 0.002
    yield AdvisedValue("optimizer.kind", "adamw", "a small detector learns classes in fewer epochs than with SGD")
    yield AdvisedValue(
        "optimizer.base_lr",
        base,
        f"the rate of 16 images, so updates of {batch} have {base * math.sqrt(batch / 16):.2g} (square root rule)",
    )
    yield AdvisedValue("optimizer.scaling", "sqrt", "an Adam step does not grow with the gradient")
    yield AdvisedValue("optimizer.weight_decay", 0.02, "AdamW takes rate times this off the weights at a step")


def _warnings(stats: Statistics, wishes: Wishes, edge: int, objects: NDArray[np.float64]) -> Iterator[str]:
    tiny = objects < sizes.TINY_OBJECT
    if tiny.mean() > _NOTABLE_SHARE:
        names = list(stats.class_counts)
        share = [float(tiny[stats.box_classes == label].mean()) if count else 0.0
                 for label, count in enumerate(stats.class_counts.values())]  # fmt: skip
        worst = _named([names[label] for label in np.argsort(share, kind="stable")[::-1] if share[label] > 0])
        yield (
            f"{tiny.mean():.0%} of the objects have less than {sizes.TINY_OBJECT:.0f} px at a short edge of {edge} px "
            f"(most of all {worst}) and will hardly be found: give a larger --short-edge, or cut the images into tiles"
        )
    native = sizes.native_edge(stats)
    if pairs := _look_alike(stats, wishes, edge):
        mark = float(np.median(stats.box_sizes)) / 10
        here = mark * edge / native
        if here < sizes.SMALL_MARK:
            yield (
                f"{len(pairs)} pair(s) of classes have boxes of one size and shape ({' and '.join(pairs[0])}). If "
                f"small marks tell them apart: a tenth of an object is {mark:.0f} px in the files and {here:.1f} px at "
                f"a short edge of {edge} px, less than {sizes.SMALL_MARK:.0f}: give --mark with the size of the marks "
                "in the files"
            )
    if not wishes.weights:
        yield "the backbone starts from random weights: on photos, trained ones find far more, give --weights FILE"
    rare = [name for name, count in stats.class_counts.items() if count < FEW_BOXES]
    if rare:
        yield f"{len(rare)} class(es) have fewer than {FEW_BOXES} boxes and will hardly be learnt: {_named(rare)}"


def _named(names: list[str]) -> str:
    """At most three names."""
    shown = ", ".join(printable(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
