"""`megdet plan`: measures or takes what is given, plans, and says what it assumed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from megdet.analysis.planner.inputs import (
    Given,
    Measuring,
    known_noise_scale,
    measure_recipe,
    planner_of_measurement,
    planner_of_numbers,
    read_measurement,
    with_link,
)
from megdet.analysis.planner.layouts import BatchSize, PlannedLayout, compares_gradients
from megdet.analysis.planner.measuring import say_nothing
from megdet.analysis.planner.step_cost import Measurement
from megdet.distributed.layout import recipe_layout
from megdet.errors import InputError
from megdet.recipe import Recipe, RecomputePlan
from megdet.run_length import total_steps


@dataclass(frozen=True)
class Limits:
    """What the user has."""

    devices: int
    memory: float | None = None
    """bytes of a device"""
    hours: float | None = None
    """of the whole run"""
    lane_width: int | None = None
    max_images_per_device: int | None = None


@dataclass(frozen=True)
class Plan:
    """The answer."""

    recipe: Recipe
    limits: Limits
    steps: int
    """of the whole run"""
    layouts: list[PlannedLayout]
    """on the asked devices, those that fit first, the fastest first"""
    chosen: PlannedLayout
    """what training does without being told"""
    best: PlannedLayout | None
    """the fastest that fits"""
    devices_that_fit: dict[RecomputePlan, int | None]
    """the smallest number, where a memory was said and the recipe's own layout does not fit"""
    devices_for_hours: PlannedLayout | None
    fastest: PlannedLayout | None
    """on any number of devices, where no number fits the hours"""
    noise_scale: float | None
    batch_sizes: list[BatchSize]
    measurement: Measurement | None
    assumptions: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes, seconds and hours are plain numbers."""
        best, limits = self.best, self.limits
        return {
            "batch_size": self.recipe.batch_size,
            "bn_size": self.recipe.bn_size,
            "devices": limits.devices,
            "memory_bytes": limits.memory,
            "hours_asked": limits.hours,
            "steps": self.steps,
            "chosen": layout_as_dict(self.chosen),
            "best": None if best is None else layout_as_dict(best),
            "layouts": [layout_as_dict(layout) for layout in self.layouts],
            "devices_that_fit": self.devices_that_fit,
            "devices_for_hours": None if self.devices_for_hours is None else layout_as_dict(self.devices_for_hours),
            "fastest": None if self.fastest is None else layout_as_dict(self.fastest),
            "noise_scale": self.noise_scale,
            "batch_sizes": [asdict(size) for size in self.batch_sizes],
            "assumptions": self.assumptions,
            "measurement": None if self.measurement is None else self.measurement.as_dict(),
        }


def layout_as_dict(planned: PlannedLayout) -> dict[str, Any]:
    """One layout for JSON."""
    layout = planned.layout
    return {
        "devices": layout.world_size,
        "micro_batch": layout.largest_share,
        "lanes": layout.num_lanes,
        "lane_width": layout.lane_width,
        "rounds": layout.rounds,
        "idle": layout.idle,
        "recompute": planned.recompute,
        "bytes": planned.bytes,
        "fits": planned.fits,
        "seconds": planned.seconds,
        "compute_seconds": planned.compute_seconds,
        "communication_seconds": planned.traffic.seconds,
        "load_seconds": planned.load_seconds,
        "gradient_bytes_sent": planned.traffic.gradient_bytes,
        "norm_bytes_sent": planned.traffic.norm_bytes,
        "training_hours": planned.training_hours,
        "evaluation_hours": planned.evaluation_hours,
        "hours": planned.hours,
    }


def make_plan(
    recipe: Recipe,
    limits: Limits,
    given: Given | None = None,
    measuring: Measuring | None = None,
    progress: Callable[[str], None] = say_nothing,
) -> Plan:
    """Measure what is not given and plan.

    Raises InputError for a layout that cannot be, data that cannot be read, given numbers that do not belong to the
    recipe, all before anything is measured; where --memory is asked and memory is not known; and like `measure`.
    """
    given, measuring = given or Given(), measuring or Measuring()
    layout = recipe_layout(recipe, limits.devices, limits.lane_width, limits.max_images_per_device)
    assumptions: list[str] = []
    noise_scale = known_noise_scale(recipe, given, assumptions)
    # whether more than one device comes into it
    several = limits.devices > 1 or limits.hours is not None or noise_scale is not None
    if given.seconds_per_image is not None:
        planner, measurement = planner_of_numbers(recipe, given, measuring.device), None
        assumptions.append("seconds of an image as given; reading images and evaluating are not in it")
    else:
        measurement = (
            measure_recipe(recipe, layout, measuring, assumptions, progress)
            if given.measured is None
            else read_measurement(recipe, given.measured)
        )
        if several:
            measurement = with_link(measurement, given, progress)
        planner = planner_of_measurement(recipe, measurement, given, measuring.plans, assumptions)
    planner = replace(
        planner,
        workers=measuring.workers,
        memory=limits.memory,
        lane_width=limits.lane_width,
        max_images_per_device=limits.max_images_per_device,
    )
    if limits.memory is not None and any(cost.fixed_bytes is None for cost in planner.costs.values()):
        raise InputError("--memory: how much memory a step takes is not known: give --gib-per-image and --fixed-gib")
    chosen = planner.chosen_by_training(limits.devices)
    if several:
        rate = f"{planner.link.bandwidth / 1e9:.3g} GB/s and {planner.link.latency * 1e6:.3g} us a hop"
        assumptions.append(f"devices are linked by {rate} ({planner.link.source}), and sending overlaps with nothing")
    if compares_gradients(recipe):
        assumptions.append("a step that compares gradients (agvm, noise_interval) takes as long as any other")
    found = None if limits.hours is None else planner.devices_for(limits.hours)
    return Plan(
        recipe,
        limits,
        total_steps(recipe, planner.num_images),
        planner.layouts(limits.devices),
        chosen,
        planner.best(limits.devices),
        {} if chosen.fits is not False else {plan: planner.devices_that_fit(plan) for plan in planner.costs},
        found,
        planner.fastest() if limits.hours is not None and found is None else None,
        noise_scale,
        [] if noise_scale is None else planner.batch_sizes(limits.devices, noise_scale),
        measurement,
        assumptions,
    )
