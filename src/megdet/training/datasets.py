"""The images of a run: what it trains on and what it is evaluated on."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megdet.data.classes import category_ids_for
from megdet.data.coco import CocoDataset, training_set, validation_set
from megdet.data.demo import DEMO_SETS, draw_demo
from megdet.data.plan import TrainingPlan
from megdet.data.shared import once_a_host
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.model.choice import detector_class, mask_use
from megdet.recipe import Recipe

COARSEST_STRIDE = 32
"""The largest stride of a feature map that has a norm layer."""


@dataclass(frozen=True)
class Datasets:
    """The images of a run."""

    train: CocoDataset
    val: CocoDataset


def load_datasets(recipe: Recipe, world: World) -> Datasets:
    """Read both annotation files, by one process a host; draw the demo data set first if the recipe says so."""
    data = recipe.data
    if data.draw_demo:
        root, demo = Path(data.train_annotations).parent.parent, asdict(DEMO_SETS[data.draw_demo])
        world.on_first(lambda: draw_demo(root, **demo))
    with_masks = detector_class(recipe.model).has_masks
    train_set = once_a_host(world, lambda: training_set(data, masks=mask_use(recipe.model)))
    val_set = once_a_host(world, lambda: validation_set(data, with_masks=with_masks))
    category_ids_for(train_set.class_names, val_set)
    if train_set.annotations.is_crowd.all():
        raise InputError(f"{data.train_annotations}: no image has a box, so there is nothing to learn")
    return Datasets(train_set, val_set)


def fingerprint(dataset: CocoDataset) -> str:
    """A hash of the input of plan and targets: the images in their order, their sizes, boxes, masks and weights."""
    table, content = dataset.annotations, hashlib.sha256(usedforsecurity=False)
    content.update(repr((dataset.image_ids, dataset.file_names, dataset.class_names)).encode())
    for column in (dataset.sizes, table.counts, table.boxes, table.labels, table.is_crowd):
        content.update(np.ascontiguousarray(column).data)
    if table.segmentations is not None:
        content.update(table.segmentations.digest.encode())
    if dataset.weights is not None:
        content.update(b"weights")
        content.update(np.ascontiguousarray(dataset.weights).data)
    return content.hexdigest()


def check_statistics(recipe: Recipe, plan: TrainingPlan, dataset: CocoDataset) -> None:
    """Refuse batch statistics of a single value: a BN size of 1 with a feature map of one pixel."""
    norms = [recipe.model.norms.get(name) for name in detector_class(recipe.model).map_norms]
    if recipe.bn_size != 1 or "batch" not in norms:
        return
    index, canvas = plan.smallest_canvas()
    if max(canvas) <= COARSEST_STRIDE:
        raise InputError(
            f"bn_size is 1 and {dataset.file_names[index]} may be resized to a canvas of {canvas[0]} x {canvas[1]} "
            f"pixels, which has one value at stride {COARSEST_STRIDE} and so no variance: raise bn_size or "
            "data.short_edges"
        )
