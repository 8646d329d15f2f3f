"""`megdet plan`: measures, or takes given numbers, then plans and lists its assumptions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from megdet.distributed.layout import recipe_layout
from megdet.errors import InputError
from megdet.planning.inputs import (
    Given,
    known_noise_scale,
    linked,
    measure_recipe,
    measured_earlier,
    planner_of_measurement,
    planner_of_numbers,
)
from megdet.planning.layouts import BatchSize, PlannedLayout, compares_gradients
from megdet.planning.measurement import Measurement
from megdet.planning.measuring import Measuring, measure_link, say_nothing
from megdet.recipe import Recipe, RecomputePlan
from megdet.run_length import total_steps
from megdet.runtime import device_kind


@dataclass(frozen=True)
class Limits:
    """The devices, memory and time that the user has."""

    devices: int
    memory: float | None = None
    """bytes of a device"""
    hours: float | None = None
    """hours of the whole run"""
    lane_width: int | None = None
    max_images_per_device: int | None = None
    price: float | None = None
    """money for an hour of one device, in any currency"""


@dataclass(frozen=True)
class Plan:
    """The answer."""

    recipe: Recipe
    limits: Limits
    steps: int
    """steps of the whole run"""
    layouts: list[PlannedLayout]
    """layouts on the given devices: those that fit first, then by time"""
    chosen: PlannedLayout
    """the choice of training without options"""
    best: PlannedLayout | None
    """the fastest that fits"""
    devices_that_fit: dict[RecomputePlan, int | None]
    """the smallest number, if a memory is given and the recipe's own layout does not fit"""
    devices_for_hours: PlannedLayout | None
    """the fewest devices that finish within the hours"""
    cheapest_for_hours: PlannedLayout | None
    """the fewest device hours within the hours, if a price is given too"""
    fastest: PlannedLayout | None
    """the fastest layout on any number of devices, if no number finishes within the hours"""
    noise_scale: float | None
    batch_sizes: list[BatchSize]
    measurement: Measurement | None
    assumptions: list[str]

    def cost_of(self, planned: PlannedLayout) -> float | None:
        """What the whole run costs with this layout, in the currency of the price; None without a price."""
        return None if self.limits.price is None else planned.device_hours * self.limits.price

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes, seconds, hours and money are plain numbers."""
        names = ("chosen", "best", "devices_for_hours", "cheapest_for_hours", "fastest")
        found = {name: getattr(self, name) for name in names}
        return {
            "batch_size": self.recipe.batch_size,
            "bn_size": self.recipe.bn_size,
            "devices": self.limits.devices,
            "memory_bytes": self.limits.memory,
            "hours_asked": self.limits.hours,
            "price": self.limits.price,
            "steps": self.steps,
            **{name: None if layout is None else self._described(layout) for name, layout in found.items()},
            "layouts": [self._described(layout) for layout in self.layouts],
            "devices_that_fit": self.devices_that_fit,
            "noise_scale": self.noise_scale,
            "batch_sizes": [asdict(size) for size in self.batch_sizes],
            "assumptions": self.assumptions,
            "measurement": None if self.measurement is None else asdict(self.measurement),
        }

    def _described(self, planned: PlannedLayout) -> dict[str, Any]:
        return planned.as_dict() | {"cost": self.cost_of(planned)}


def make_plan(
    recipe: Recipe,
    limits: Limits,
    given: Given | None = None,
    measuring: Measuring | None = None,
    progress: Callable[[str], None] = say_nothing,
) -> Plan:
    """Measure what is not given, and plan.

    Raises InputError before anything is measured for an impossible layout, data that cannot be read, and given numbers
    that do not belong to the recipe; for --memory if the memory of a step is not known; and as `measure` does.
    """
    given, measuring = given or Given(), measuring or Measuring()
    layout = recipe_layout(recipe, limits.devices, limits.lane_width, limits.max_images_per_device)
    assumptions: list[str] = []
    noise_scale = known_noise_scale(recipe, given, assumptions)
    # whether the plan needs the connection of devices
    several = limits.devices > 1 or limits.hours is not None or noise_scale is not None
    measurement = None
    if given.measured is not None:
        measurement = measured_earlier(recipe, given.measured)
    elif given.seconds_per_image is None:
        measurement = measure_recipe(recipe, layout, measuring, assumptions, progress)
    is_link_known = None not in (given.latency, given.bandwidth)
    if several and not is_link_known and measurement and measurement.device == "cpu" and measurement.latency is None:
        latency, bandwidth = measure_link(progress)
        measurement = replace(measurement, latency=latency, bandwidth=bandwidth)
    fabric, how_linked = linked(measurement, given)
    if measurement is not None:
        planner = planner_of_measurement(recipe, measurement, measuring, fabric, assumptions)
    else:
        kind = measuring.device or device_kind("")  # numbers of a GPU may be given on a machine without one
        planner = planner_of_numbers(recipe, given, kind, fabric)
        assumptions.append("seconds of an image as given; reading images and evaluating are not in it")
    planner = replace(
        planner,
        memory=limits.memory,
        lane_width=limits.lane_width,
        max_images_per_device=limits.max_images_per_device,
    )
    if limits.memory is not None and any(cost.fixed_bytes is None for cost in planner.costs.values()):
        raise InputError("--memory: how much memory a step takes is not known: give --gib-per-image and --fixed-gib")
    chosen = planner.chosen_by_training(limits.devices)
    if several:
        assumptions.append(how_linked)
    if limits.price is not None:
        assumptions.append("the cost is that of the devices while they train and evaluate, at the given price")
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
        None if limits.hours is None or limits.price is None else planner.cheapest_for(limits.hours),
        planner.fastest() if limits.hours is not None and found is None else None,
        noise_scale,
        [] if noise_scale is None else planner.batch_sizes(limits.devices, noise_scale),
        measurement,
        assumptions,
    )
