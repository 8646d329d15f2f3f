"""Layouts of a recipe on some devices: memory, time of a step and of the run, communication, and batch sizes that pay.

Pure arithmetic from the costs of a step.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from megdet.distributed.layout import Layout, possible_layouts, recipe_layout
from megdet.errors import InputError
from megdet.planning.batches import BatchWorth
from megdet.planning.network import Fabric
from megdet.planning.step import Exchange, StepCost, StepTime, step_bytes, step_time
from megdet.recipe import Recipe, RecomputePlan
from megdet.recipe_check import check_recipe
from megdet.run_length import decay_of, total_steps

_AS_GOOD = 1.02
"""A layout slower than the fastest by at most this factor counts as good: measurements cannot tell them apart."""
_DOUBLINGS = range(-3, 5)


@dataclass(frozen=True)
class PlannedLayout:
    """One way to spread a mini-batch, and its predicted cost."""

    recompute: RecomputePlan
    layout: Layout
    bytes: float | None
    """largest memory of a device (on a CPU: a process); None if it is not known"""
    fits: bool | None
    """whether it is within the memory of a device; None if that is not known"""
    step: StepTime
    load_seconds: float
    """seconds to read the busiest rank's images of a step in its loading processes"""
    gradient_bytes_sent: float
    """bytes that a device sends in a step"""
    norm_bytes_sent: float
    training_hours: float
    evaluation_hours: float

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return self.training_hours + self.evaluation_hours

    @property
    def device_hours(self) -> float:
        """Hours of the whole run, times its devices: what is paid for."""
        return self.hours * self.layout.world_size

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes, seconds and hours are plain numbers."""
        layout, step, own = self.layout, self.step, asdict(self)
        del own["layout"], own["step"]
        return own | {
            "devices": layout.world_size,
            "micro_batch": layout.largest_share,
            "lanes": layout.num_lanes,
            "lane_width": layout.lane_width,
            "rounds": layout.rounds,
            "idle": layout.idle,
            "seconds": step.total,
            "compute_seconds": step.compute,
            "communication_seconds": step.communication,
            "hours": self.hours,
            "device_hours": self.device_hours,
        }


@dataclass(frozen=True)
class BatchSize:
    """The cost of the same loss with another mini-batch, relative to the recipe's (McCandlish et al., 2018)."""

    batch_size: int
    steps: float
    """steps as a multiple of the recipe's"""
    examples: float
    """images seen, and so the work, as a multiple of the recipe's"""
    hours: float | None
    """hours of the training on the same devices; None if no layout fits, or the forced one does not"""
    devices_in_step: int
    """devices in proportion to the batch"""
    hours_in_step: float | None
    """hours of the training on `devices_in_step`; None also if the proportion is not a whole number of devices"""
    pays: bool
    """whether the batch is at most the noise scale: then the work is at most twice the least"""


@dataclass(frozen=True)
class Planner:
    """The inputs of a plan, and the predictions from them."""

    recipe: Recipe
    costs: Mapping[RecomputePlan, StepCost]
    exchange: Exchange
    fabric: Fabric
    num_images: int
    num_val_images: int = 0
    evaluation_seconds: float = 0.0
    memory: float | None = None
    """bytes of a device"""
    lane_width: int | None = None
    max_images_per_device: int | None = None

    def layouts(self, devices: int, recipe: Recipe | None = None) -> list[PlannedLayout]:
        """Every lane width and recompute plan on so many devices, those that fit first, the fastest first.

        Raises InputError for an impossible layout.
        """
        recipe = recipe or self.recipe
        chosen, *others = possible_layouts(
            recipe.groups_per_step, recipe.images_per_group, devices, self.lane_width, self.max_images_per_device
        )
        spreads = [chosen, *(other for other in others if other.lane_width <= other.group_size)]
        found = [self._planned(recipe, layout, plan) for plan in self.costs for layout in spreads]
        # among equals the narrowest lanes, as training chooses
        return sorted(found, key=lambda p: (p.fits is False, p.step.total, p.layout.lane_width))

    def chosen_by_training(self, devices: int) -> PlannedLayout:
        """The layout that `megdet train` chooses for the recipe as it is."""
        layout = recipe_layout(self.recipe, devices, self.lane_width, self.max_images_per_device)
        return self._planned(self.recipe, layout, self.recipe.recompute)

    def best(self, devices: int, recipe: Recipe | None = None) -> PlannedLayout | None:
        """The fastest layout that fits, or training's own choice if that is as good; None if none fits."""
        fitting = [p for p in self.layouts(devices, recipe) if p.fits is not False]
        if not fitting:
            return None
        limit = _AS_GOOD * fitting[0].step.total
        chosen = recipe_layout(recipe or self.recipe, devices, self.lane_width, self.max_images_per_device)
        own = [
            p for p in fitting if p.layout == chosen and p.recompute == self.recipe.recompute and p.step.total <= limit
        ]
        return (own or fitting)[0]

    def devices_that_fit(self, plan: RecomputePlan) -> int | None:
        """The smallest number of devices on which a recompute plan fits, with any lanes; None if there is none."""
        return next((n for n in self._counts() if any(p.fits for p in self.layouts(n) if p.recompute == plan)), None)

    def devices_for(self, hours: float) -> PlannedLayout | None:
        """The layout on the fewest devices that finish the run within the hours; None if there is none."""
        plans = (self.best(count) for count in self._counts())
        return next((plan for plan in plans if plan is not None and plan.hours <= hours), None)

    def cheapest_for(self, hours: float) -> PlannedLayout | None:
        """The layout with the fewest device hours, on any number of devices, that finishes the run within the hours."""
        plans = [plan for count in self._counts() if (plan := self.best(count)) is not None and plan.hours <= hours]
        return min(plans, key=lambda plan: plan.device_hours, default=None)

    def fastest(self) -> PlannedLayout | None:
        """The layout with the shortest run, on any number of devices; None if none fits."""
        plans = [plan for count in self._counts() if (plan := self.best(count)) is not None]
        return min(plans, key=lambda plan: plan.hours, default=None)

    def batch_sizes(self, devices: int, noise_scale: float) -> list[BatchSize]:
        """The recipe's mini-batch halved and doubled, as far as the recipe check and the number of images allow.

        Args:
            devices: devices of the plan.
            noise_scale: in images.
        """
        wanted = [self.recipe.batch_size * 2.0**power for power in _DOUBLINGS]
        sizes = [int(size) for size in wanted if size.is_integer() and size <= self.num_images]
        return [self._batch_size(size, devices, noise_scale) for size in sizes if self._may_train(size)]

    def _may_train(self, size: int) -> bool:
        """Whether training accepts the recipe with so many images a step."""
        try:
            check_recipe(replace(self.recipe, batch_size=size), "the planned recipe")
        except InputError:  # not whole groups, or an odd number of them where AGVM compares halves
            return False
        return True

    def _batch_size(self, size: int, devices: int, noise_scale: float) -> BatchSize:
        own, other = (BatchWorth(images, noise_scale) for images in (self.recipe.batch_size, size))
        steps = other.steps / own.steps
        in_step = devices * size / own.batch_size
        return BatchSize(
            size,
            steps,
            other.examples / own.examples,
            self._training_hours(size, devices, steps),
            int(in_step),
            self._training_hours(size, int(in_step), steps) if in_step == int(in_step) else None,
            other.pays,
        )

    def _training_hours(self, size: int, devices: int, steps: float) -> float | None:
        recipe = replace(self.recipe, batch_size=size)
        best = self.best(devices, recipe) if self._can_spread(recipe, devices) else None
        return None if best is None else steps * total_steps(self.recipe, self.num_images) * best.step.total / 3600

    def _counts(self) -> Iterator[int]:
        """Numbers of devices that have a layout, with the forced values."""
        return (n for n in range(1, self.recipe.batch_size + 1) if self._can_spread(self.recipe, n))

    def _can_spread(self, recipe: Recipe, devices: int) -> bool:
        """Whether so many devices have a layout, with the forced values."""
        try:
            recipe_layout(recipe, devices, self.lane_width, self.max_images_per_device)
        except InputError:
            return False
        return True

    @cached_property
    def _steps(self) -> int:
        return total_steps(self.recipe, self.num_images)

    def _planned(self, recipe: Recipe, layout: Layout, plan: RecomputePlan) -> PlannedLayout:
        cost = self.costs[plan]
        needed = step_bytes(cost, layout, self.exchange, gradient_copies=int(compares_gradients(recipe)))
        step = step_time(cost, layout, self.exchange, self.fabric)
        every = recipe.evaluation.every_epochs
        evaluations = math.ceil(decay_of(recipe.schedule).epochs / every - 1e-9) if every else 1
        return PlannedLayout(
            plan,
            layout,
            needed,
            None if self.memory is None or needed is None else needed <= self.memory,
            step,
            layout.busiest_images * cost.load_seconds,
            math.fsum(message.sent for message in self.exchange.gradients(layout)),
            math.fsum(message.sent for message in self.exchange.norms(layout)),
            self._steps * step.total / 3600,
            evaluations * self.num_val_images * self.evaluation_seconds / layout.world_size / 3600,
        )


def compares_gradients(recipe: Recipe) -> bool:
    """Whether some steps hold one more copy of the gradient, which was not measured.

    It is the gradient of the first half, which every rank sets aside, even with groups of the second half only. If a
    mini-batch is one group, it is the gradient kept for the next step.
    """
    return recipe.optimizer.agvm or recipe.noise_interval > 0
