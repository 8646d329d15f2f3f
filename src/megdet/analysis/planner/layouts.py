"""Layouts of a recipe on some devices: memory, time of a step and of the run, communication, and batch sizes that pay.

Pure arithmetic from the costs of `step_cost`; nothing is run here.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from megdet.analysis.planner.step_cost import Link, StepCost
from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.layout import Layout, recipe_layout
from megdet.errors import InputError
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.model.detector import Detector
from megdet.recipe import Recipe, RecomputePlan
from megdet.recipe_check import check_recipe
from megdet.run_length import decay_of, total_steps

GPU_LINK = Link(
    2.7e-6,
    50e9,
    "ConnectX-7 of 400 Gb/s by NVIDIA's data sheet; a hop of a ring over the network by src/graph/tuning.cc of NCCL",
)
"""What is taken for GPUs where nothing else is given: one network adapter a GPU, as in a DGX H100."""
_AS_GOOD = 1.02
"""A layout that is at most so much slower than the fastest is as good: measuring does not tell them apart."""
_DOUBLINGS = range(-3, 5)


@dataclass(frozen=True)
class Model:
    """What of a detector travels between devices in a step."""

    gradient_bytes: int
    bucket_bytes: tuple[int, ...]
    norm_channels: tuple[int, ...]
    """of every layer of cross-device batch norm"""
    number_bytes: int
    """of a statistic: 4, or 8 in float64"""

    @classmethod
    def of(cls, detector: Detector, buckets: GradientBuckets) -> "Model":
        """Count them."""
        sizes = tuple(sum(p.numel() * p.element_size() for p in bucket) for bucket in buckets.buckets)
        channels = tuple(m.channels for m in detector.modules() if isinstance(m, CrossDeviceBatchNorm))
        return cls(sum(sizes), sizes, channels, 8 if detector.recipe.precision == "float64" else 4)


@dataclass(frozen=True)
class Traffic:
    """What a device sends in a step, and how long it takes where nothing else is done meanwhile."""

    gradient_bytes: float
    norm_bytes: float
    seconds: float


def ring_all_reduce(num_bytes: float, ranks: int, link: Link) -> tuple[float, float]:
    """Bytes that each rank sends to sum a tensor around a ring, and seconds: 2 (W - 1) hops of a W-th of it each."""
    hops = 2 * (ranks - 1)
    sent = hops * num_bytes / ranks
    return sent, hops * link.latency + sent / link.bandwidth


def ring_all_gather(num_bytes: float, ranks: int, link: Link) -> tuple[float, float]:
    """Bytes that each rank sends to hand its tensor to all others around a ring, and seconds: W - 1 hops."""
    sent = (ranks - 1) * num_bytes
    return sent, (ranks - 1) * link.latency + sent / link.bandwidth


def traffic_of(layout: Layout, model: Model, link: Link, device: str) -> Traffic:
    """The communication of a step (Algorithm 1 in its merged form: one collective forward and one backward a layer).

    Gradients are summed over all ranks, the statistics of a group over its lane: count, mean and squares are gathered
    forward, two sums are added up backward (gathered on a CPU), for each micro-batch; once a step the running
    statistics are folded over all ranks. Nothing overlaps with computing here, though a step sends its gradients while
    the last backward goes on: the seconds are the most that it can cost.
    """
    gradients = [ring_all_reduce(float(size), layout.world_size, link) for size in model.bucket_bytes]
    norms = []
    for channels in model.norm_channels:
        size, width = float(model.number_bytes * channels), layout.lane_width
        add_up = ring_all_gather if device == "cpu" else ring_all_reduce
        once = ring_all_gather(2 * size + model.number_bytes, width, link), add_up(2 * size, width, link)
        norms += [(layout.rounds * sent, layout.rounds * seconds) for sent, seconds in once]
    if model.norm_channels:
        folded = 2.0 * model.number_bytes * sum(model.norm_channels)
        norms.append(ring_all_reduce(folded, layout.world_size, link))
    return Traffic(
        math.fsum(sent for sent, _ in gradients),
        math.fsum(sent for sent, _ in norms),
        math.fsum(seconds for _, seconds in (*gradients, *norms)),
    )


@dataclass(frozen=True)
class PlannedLayout:
    """One way to spread a mini-batch, and what it should cost."""

    recompute: RecomputePlan
    layout: Layout
    bytes: float | None
    """the most that a device (on a CPU: a process) needs; None where it is not known"""
    fits: bool | None
    """within the memory of a device; None where that was not said"""
    compute_seconds: float
    """of a step"""
    traffic: Traffic
    load_seconds: float
    """to read a step's images of the busiest rank in its loading processes"""
    seconds: float
    """of a step"""
    training_hours: float
    evaluation_hours: float

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.training_hours + self.evaluation_hours


@dataclass(frozen=True)
class BatchSize:
    """What another mini-batch would need for the same loss, against the recipe's (McCandlish et al., 2018)."""

    batch_size: int
    steps: float
    """times the steps of the recipe"""
    examples: float
    """times its examples, and with them the work"""
    hours: float | None
    """of the training on the same devices; None where they cannot carry it as it is forced, or no layout fits"""
    devices_in_step: int
    """devices in proportion to the batch"""
    hours_in_step: float | None
    """of the training on these; None also where the proportion is no whole number of devices"""
    pays: bool
    """whether it is at most the noise scale: up to there twice the least work is done at most"""


@dataclass(frozen=True)
class Planner:
    """Everything that a plan is made from."""

    recipe: Recipe
    costs: Mapping[RecomputePlan, StepCost]
    model: Model
    link: Link
    device: str
    """cpu or cuda: how batch norm talks"""
    num_images: int
    num_val_images: int = 0
    load_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    workers: int = 1
    """loading processes a rank; 0 = the training process loads between its steps"""
    memory: float | None = None
    """bytes of a device"""
    lane_width: int | None = None
    max_images_per_device: int | None = None

    def layouts(self, devices: int, recipe: Recipe | None = None) -> list[PlannedLayout]:
        """Every lane width and recompute plan on so many devices, those that fit first, the fastest first.

        Raises InputError for a layout that cannot be.
        """
        recipe = recipe or self.recipe
        spreads = list(self._spreads(recipe, devices))
        found = [self._planned(recipe, layout, plan) for plan in self.costs for layout in spreads]
        # of equal ones that with the narrowest lanes, as training chooses it
        return sorted(found, key=lambda p: (p.fits is False, p.seconds, p.layout.lane_width))

    def chosen_by_training(self, devices: int) -> PlannedLayout:
        """What `megdet train` does with the recipe as it is."""
        layout = recipe_layout(self.recipe, devices, self.lane_width, self.max_images_per_device)
        return self._planned(self.recipe, layout, self.recipe.recompute)

    def best(self, devices: int, recipe: Recipe | None = None) -> PlannedLayout | None:
        """The fastest layout that fits, or what training chooses where that is as good; None where none fits."""
        fitting = [p for p in self.layouts(devices, recipe) if p.fits is not False]
        if not fitting:
            return None
        limit = _AS_GOOD * fitting[0].seconds
        chosen = recipe_layout(recipe or self.recipe, devices, self.lane_width, self.max_images_per_device)
        own = [p for p in fitting if p.layout == chosen and p.recompute == self.recipe.recompute and p.seconds <= limit]
        return (own or fitting)[0]

    def devices_that_fit(self, plan: RecomputePlan) -> int | None:
        """The smallest number of devices, in lanes of any width, that holds a recompute plan; None where none does."""
        return next((n for n in self._counts() if any(p.fits for p in self.layouts(n) if p.recompute == plan)), None)

    def devices_for(self, hours: float) -> PlannedLayout | None:
        """The layout of the smallest number of devices whose whole run fits the hours; None where none does."""
        plans = (self.best(count) for count in self._counts())
        return next((plan for plan in plans if plan is not None and plan.hours <= hours), None)

    def fastest(self) -> PlannedLayout | None:
        """The layout of any number of devices whose run is the shortest; None where none fits."""
        plans = [plan for count in self._counts() if (plan := self.best(count)) is not None]
        return min(plans, key=lambda plan: plan.hours, default=None)

    def batch_sizes(self, devices: int, noise_scale: float) -> list[BatchSize]:
        """The recipe's mini-batch halved and doubled, as far as the check of recipes and the images allow.

        S(B) = S_min (1 + B_noise / B) steps and E(B) = E_min (1 + B / B_noise) examples reach the same loss, at a rate
        that is tuned for B (McCandlish et al., 2018, Sec. 2.3 and 2.4).

        Args:
            devices: of the plan.
            noise_scale: B_noise in images.
        """
        wanted = [self.recipe.batch_size * 2.0**power for power in _DOUBLINGS]
        sizes = [int(size) for size in wanted if size.is_integer() and size <= self.num_images]
        return [self._batch_size(size, devices, noise_scale) for size in sizes if self._may_train(size)]

    def _may_train(self, size: int) -> bool:
        """Whether the recipe with so many images a step is one that training takes."""
        try:
            check_recipe(replace(self.recipe, batch_size=size), "the planned recipe")
        except InputError:  # not whole groups, or an odd number of them where AGVM compares halves
            return False
        return True

    def _batch_size(self, size: int, devices: int, noise_scale: float) -> BatchSize:
        own = self.recipe.batch_size
        steps = (1 + noise_scale / size) / (1 + noise_scale / own)
        in_step = devices * size / own
        return BatchSize(
            size,
            steps,
            (1 + size / noise_scale) / (1 + own / noise_scale),
            self._training_hours(size, devices, steps),
            int(in_step),
            self._training_hours(size, int(in_step), steps) if in_step == int(in_step) else None,
            size <= noise_scale,
        )

    def _training_hours(self, size: int, devices: int, steps: float) -> float | None:
        recipe = replace(self.recipe, batch_size=size)
        best = self.best(devices, recipe) if self._can_spread(recipe, devices) else None
        return None if best is None else steps * total_steps(self.recipe, self.num_images) * best.seconds / 3600

    def _counts(self) -> Iterator[int]:
        """Numbers of devices that may be used, with what is forced."""
        return (n for n in range(1, self.recipe.batch_size + 1) if self._can_spread(self.recipe, n))

    def _can_spread(self, recipe: Recipe, devices: int) -> bool:
        """Whether there is a layout on so many devices, with what is forced."""
        try:
            recipe_layout(recipe, devices, self.lane_width, self.max_images_per_device)
        except InputError:
            return False
        return True

    def _spreads(self, recipe: Recipe, devices: int) -> Iterator[Layout]:
        chosen = recipe_layout(recipe, devices, self.lane_width, self.max_images_per_device)
        widths = range(1, min(devices, recipe.images_per_group) + 1) if self.lane_width is None else [self.lane_width]
        yield chosen
        for width in widths:
            if devices % width == 0 and width != chosen.lane_width:
                layout = recipe_layout(recipe, devices, width)
                if self.max_images_per_device is None or layout.largest_share <= self.max_images_per_device:
                    yield layout

    @cached_property
    def _steps(self) -> int:
        return total_steps(self.recipe, self.num_images)

    def _planned(self, recipe: Recipe, layout: Layout, plan: RecomputePlan) -> PlannedLayout:
        cost = self.costs[plan]
        needed = cost.bytes(layout.largest_share, layout.rounds)
        if needed is not None and layout.world_size > 1:
            needed += max(self.model.bucket_bytes)  # a bucket is filled from gradients that are still there
        if needed is not None and compares_gradients(recipe):
            needed += self.model.gradient_bytes
        compute = cost.seconds(layout.largest_share, layout.rounds)
        traffic = traffic_of(layout, self.model, self.link, self.device)
        load = layout.busiest_images * self.load_seconds / max(1, self.workers)
        busy = compute + traffic.seconds
        seconds = max(busy, load) if self.workers else busy + load
        every = recipe.evaluation.every_epochs
        evaluations = math.ceil(decay_of(recipe.schedule).epochs / every - 1e-9) if every else 1
        return PlannedLayout(
            plan,
            layout,
            needed,
            None if self.memory is None or needed is None else needed <= self.memory,
            compute,
            traffic,
            load,
            seconds,
            self._steps * seconds / 3600,
            evaluations * self.num_val_images * self.evaluation_seconds / layout.world_size / 3600,
        )


def compares_gradients(recipe: Recipe) -> bool:
    """Whether some steps hold one more copy of the gradient, which was not measured, while they compute.

    That is the half which is set aside, on a rank of the second half alone too, where it is a sum without terms; or
    the gradient that is kept for the next step, where a mini-batch is one group.
    """
    return recipe.optimizer.agvm or recipe.noise_interval > 0


def sizes_to_measure(layout: Layout) -> list[int]:
    """Micro-batches worth measuring for a layout: its own or 8 images if that is fewer, half of it, and 1."""
    largest = min(8, layout.largest_share)
    return sorted({1, -(-largest // 2), max(2, largest)})
