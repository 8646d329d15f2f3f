"""`exact: true`: every image of a micro-batch goes forward and backward apart, as a batch of one.

Each image has a copy of the detector over the same memory, with leaves of its own for autograd: so its gradient of a
parameter is known by itself, is added to the sums in fixed point (`distributed/exact_gradients.py`), and freed. What
the images of a group share they exchange in `layers/image_team.py`.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megdet.distributed.exact_gradients import ExactGradients
from megdet.distributed.fixed_point import LOSS_BITS, fixed_numbers
from megdet.distributed.world import World
from megdet.layers.batch_norm import CrossDeviceBatchNorm, step_sums, take_step_sums
from megdet.layers.image_team import ImageTeam, thread_pool
from megdet.model.detector import Detector
from megdet.precision import arithmetic_of_image
from megdet.recipe import Recipe, RecomputePlan
from megdet.structures import Batch


class ImagesApart:
    """The copies of a detector, one for each image of a micro-batch, and what the groups of a step have found.

    Args:
        model: whose parameters they share.
        recipe: of the run.
        gradients: of the model.
    """

    def __init__(self, model: Detector, recipe: Recipe, gradients: ExactGradients) -> None:
        self.model, self.recipe, self.gradients = model, recipe, gradients
        self.at_once = torch.get_num_threads()
        """images that are computed at the same time, each on one thread; it changes no result"""
        self.rows: list[Tensor] = []
        """what the norm layers have added up for each group since the step began"""
        self._copies: list[Detector] = []
        self._pool: ThreadPoolExecutor | None = None

    def losses(self, batch: Batch, plan: RecomputePlan, device: torch.device) -> Tensor:
        """Forward and backward of a micro-batch; returns the sums of what its images report, as `fixed_numbers`."""
        count = len(batch.image_index)
        while len(self._copies) < max(1, count):
            self._copies.append(self._copy())
            self._pool = None
        pool = self._pool = self._pool or thread_pool(len(self._copies))
        at_once = self.at_once if count else 1
        team = ImageTeam(count, self.recipe.images_per_group, at_once)
        works: list[Callable[[], Tensor]] = []
        for place in range(max(1, count)):
            self._copies[place].set_recompute(plan)
            for own, theirs in zip(_norms(self._copies[place]), _norms(self.model), strict=True):
                own.lane = theirs.lane  # which may have changed since the copy was made
            works.append(partial(self._one, self._copies[place], batch[place : place + 1], device))
        found = team.run(pool, works)
        row = take_step_sums(self.model.modules())
        if row is not None:
            self.rows.append(row)
        return torch.stack(found).sum(0)

    def _one(self, model: Detector, image: Batch, device: torch.device) -> Tensor:
        with arithmetic_of_image(self.recipe.precision, device):
            losses = model(without_padding(image))
        # the engine's own threads could wait for each other, and this thread's image would not be known there
        with torch.autograd.set_multithreading_enabled(False):
            torch.stack([losses[name].sum() for name in model.loss_names]).sum().backward()  # type: ignore[no-untyped-call]  # torch's, which has no types
        reported = torch.stack([losses[name].detach().sum().double() for name in model.reported()])
        return fixed_numbers(reported, LOSS_BITS)

    def _copy(self) -> Detector:
        """A detector over the same memory, whose gradients are added to the sums as they are made."""
        places = {parameter: place for place, parameter in enumerate(self.gradients.parameters)}
        leaves = {
            parameter: nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            for parameter in self.model.parameters()
        }
        shared: dict[int, Tensor] = {id(buffer): buffer for buffer in self.model.buffers()}
        shared |= {id(parameter): leaf for parameter, leaf in leaves.items()}
        made = copy.deepcopy(self.model, shared)
        for parameter, place in places.items():
            leaves[parameter].register_post_accumulate_grad_hook(partial(self._add, place))  # type: ignore[no-untyped-call]  # torch's, which has no types
        return made

    def _add(self, place: int, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.gradients.add(place, leaf.grad)
        leaf.grad = None

    def take_rows(self, groups: list[int], world: World) -> Tensor | None:
        """What the norm layers found in all groups of the step, a row a group, in the order of the plan.

        `groups` are those of this rank.
        """
        found, self.rows = self.rows, []
        sums = step_sums(self.model.modules())
        if not sums:
            return None
        width = sum(len(own) for own in sums)
        rows = sums[0].new_zeros(self.recipe.groups_per_step, width)
        if self._is_first_of_lane():
            for group, row in zip(groups, found, strict=True):
                rows[group] += row
        world.all_reduce(rows)
        return rows

    def _is_first_of_lane(self) -> bool:
        """Every rank of a lane has the same rows; only its first gives them."""
        return all(norm.lane.is_first for norm in _norms(self.model))


def _norms(model: Detector) -> list[CrossDeviceBatchNorm]:
    return [own for own in model.modules() if isinstance(own, CrossDeviceBatchNorm)]


def without_padding(image: Batch) -> Batch:
    """One image, or none, without the rows of targets that only other images of its share have."""
    targets = image.targets
    count = int(targets.is_box.sum())
    masks = targets.masks
    if masks is not None:
        masks = replace(masks, frames=masks.frames[:, :count])
    cut = replace(targets, boxes=targets.boxes[:, :count], labels=targets.labels[:, :count], masks=masks)
    return replace(image, targets=cut)
