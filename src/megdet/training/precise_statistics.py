"""Batch-norm statistics estimated again from the training images, with the final weights.

The running statistics of a short run are averages over weights that have changed since, so its evaluation is worse than
its weights. The remedy is precise BN (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021): statistics of the
final weights over many images. Differs from theirs: the variance is the plain mean of the groups' variances, as in the
running statistics of a training.
"""

from collections.abc import Callable
from typing import Any

import torch

from megdet.data.coco import CocoDataset, training_set
from megdet.data.loader import training_batches
from megdet.data.plan import TrainingPlan
from megdet.data.sampling.frequencies import training_plan
from megdet.data.shared import once_a_host
from megdet.distributed.lane import make_lane
from megdet.distributed.layout import Layout, recipe_layout
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.inference.trained import TrainedDetector, load_detector, read_recipe
from megdet.layers.batch_norm import has_statistics, set_statistics
from megdet.memory import is_out_of_memory
from megdet.model.choice import mask_use
from megdet.model.detector import Detector
from megdet.precision import arithmetic
from megdet.run_folder.folder import RunFolder
from megdet.training.run import RunOptions

Progress = Callable[[int, int], None]
"""Called with the mini-batches done, and how many there are."""


def load_precise_detector(
    folder: RunFolder,
    world: World,
    num_images: int,
    options: RunOptions,
    overrides: dict[str, Any] | None = None,
    progress: Progress | None = None,
    *,
    step: int | None = None,
) -> TrainedDetector:
    """The detector of a run with statistics of at least `num_images` images of its training plan.

    It is that of the newest checkpoint, or of a step's. The images are those of the plan's first whole mini-batches, in
    the run's own groups. Every rank calls it; the result does not depend on the number of ranks. The run folder does
    not change. Raises InputError if the recipe has no statistics to estimate, if the training data are missing or have
    other classes, and for an impossible layout.
    """
    recipe = world.on_first(lambda: read_recipe(folder, overrides))
    if num_images < 1:
        raise InputError(f"--precise-bn {num_images}: it takes at least 1 image")
    if not recipe.bn_size:
        raise InputError(
            f"{folder.path}: --precise-bn has no statistics to estimate: bn_size is 0, so they are fixed; leave it out"
        )
    layout = recipe_layout(recipe, world.size, options.lane_width, options.max_images_per_device)
    data = recipe.data
    dataset = once_a_host(world, lambda: training_set(data, masks=mask_use(recipe.model)))
    plan = training_plan(dataset, recipe)
    trained = load_detector(folder, world.device, overrides, make_lane(world, layout), step=step, world=world)
    if dataset.class_names != trained.class_names:
        raise InputError(f"{data.train_annotations}: its classes are not those that the run was trained on")
    if not has_statistics(trained.model):
        raise InputError(
            f"{folder.path}: --precise-bn has no statistics to estimate: every batch norm is frozen; leave it out"
        )
    num_steps = -(-num_images // recipe.batch_size)
    try:
        estimate_statistics(
            trained.model, dataset, plan, layout, world, num_steps, workers=options.workers, progress=progress
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"--precise-bn: {layout.largest_share} images do not fit {world.device}: use more devices or "
            "--max-images-per-device"
        ) from None
    return trained


@torch.no_grad()
def estimate_statistics(
    model: Detector,
    dataset: CocoDataset,
    plan: TrainingPlan,
    layout: Layout,
    world: World,
    num_steps: int,
    *,
    workers: int,
    progress: Progress | None = None,
) -> None:
    """Replace a model's running statistics by the plain mean over the groups of the plan's first steps.

    Each group gives its mean and its unbiased variance, as in training. Leaves the model in evaluation mode.
    """
    batches = training_batches(dataset, plan, layout, world.rank, (0, num_steps), workers=workers, device=world.device)
    per_step = len(layout.groups_of(world.rank))
    model.train()
    for number, batch in enumerate(batches, 1):
        with arithmetic(plan.recipe.precision, world.device):
            model(batch)
        if progress is not None and number % per_step == 0:
            progress(number // per_step, num_steps)
    set_statistics(model.modules(), num_steps * layout.num_groups, world)
    model.eval()
