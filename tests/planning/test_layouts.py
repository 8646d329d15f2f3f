"""Plans by hand arithmetic from costs that are given; nothing is run."""

from dataclasses import replace
from typing import Any

import pytest

from factories import TINY
from megdet.distributed.layout import Layout
from megdet.errors import InputError
from megdet.planning.layouts import Planner
from megdet.planning.measuring import sizes_to_measure
from megdet.planning.network import flat_fabric
from megdet.planning.step import Exchange, StepCost
from megdet.recipe import Evaluation, Optimizer, Schedule

SILENT = Exchange((), ())
"""Nothing to send."""
SENT = Exchange((200, 100), ())
RECIPE = replace(
    TINY,
    batch_size=16,
    bn_size=4,
    schedule=Schedule(policy="step", epochs=2.0),
    evaluation=Evaluation(every_epochs=1),
)
AGVM = Optimizer(agvm=True)
COSTS = {"none": StepCost(0.0, 0.0, 1.0, 100.0, 10.0, 50.0), "block": StepCost(0.0, 0.0, 1.5, 100.0, 10.0, 20.0)}


def make(**changes: object) -> Planner:
    planner = Planner(RECIPE, COSTS, SILENT, flat_fabric(0.0, 1e9), num_images=160)  # type: ignore[arg-type]  # a stand-in for steps
    return replace(planner, **changes)  # type: ignore[arg-type]


def test_every_lane_width_and_recompute_plan_is_planned_the_fastest_first() -> None:
    plans = make().layouts(2)
    found = [(p.recompute, p.layout.lane_width, p.layout.largest_share, p.layout.rounds, p.step.total) for p in plans]
    assert found == [("none", 1, 4, 2, 8.0), ("none", 2, 2, 4, 8.0), ("block", 1, 4, 2, 12.0), ("block", 2, 2, 4, 12.0)]
    # weights and activations, and gradients that wait
    assert [p.bytes for p in plans] == [100 + 10 + 200, 100 + 10 + 100, 100 + 10 + 80, 100 + 10 + 40]
    # 2 epochs of 160 images, 16 a step
    assert [p.training_hours for p in plans][:2] == [pytest.approx(20 * 8.0 / 3600)] * 2
    assert all(p.fits is None for p in plans)


def test_several_devices_need_room_for_a_bucket() -> None:
    assert make(exchange=SENT).layouts(1)[0].bytes == 100 + 10 + 4 * 50
    assert make(exchange=SENT).layouts(2)[0].bytes == 100 + 10 + 4 * 50 + 200


@pytest.mark.parametrize(
    "changes", [{"noise_interval": 50}, {"optimizer": AGVM}, {"noise_interval": 50, "optimizer": AGVM}]
)
def test_comparing_gradients_needs_room_for_one_more(changes: dict[str, Any]) -> None:
    recipe = replace(RECIPE, **changes)
    # rounds of four images: two halves on one device; on two; a device a group, of which two wait with an empty half
    for devices, rounds in ((1, 4), (2, 2), (4, 1)):
        chosen = make(exchange=SENT, recipe=recipe).chosen_by_training(devices)
        assert chosen.layout.rounds == rounds
        assert chosen.bytes == 100 + 10 * (rounds > 1) + 4 * 50 + 200 * (devices > 1) + 300
    assert make(exchange=SENT, recipe=recipe, memory=609.0).chosen_by_training(1).fits is False
    assert make(exchange=SENT, recipe=recipe, memory=610.0).chosen_by_training(1).fits is True


def test_a_mini_batch_of_one_group_keeps_the_gradient_of_the_step_before() -> None:
    one_group = replace(RECIPE, bn_size=16, noise_interval=50)
    assert make(exchange=Exchange((300,), ()), recipe=one_group).chosen_by_training(1).bytes == 100 + 16 * 50 + 300


def test_a_forced_lane_width_and_a_largest_share_hold() -> None:
    assert {p.layout.lane_width for p in make(lane_width=2).layouts(4)} == {2}
    assert {p.layout.largest_share for p in make(max_images_per_device=2).layouts(4)} == {2, 1}
    with pytest.raises(InputError, match="at least 4 devices"):
        make(max_images_per_device=1).layouts(2)


def test_what_does_not_fit_comes_last_and_the_fewest_devices_that_hold_it_are_named() -> None:
    planner = make(memory=165.0)
    assert not planner.chosen_by_training(1).fits
    plans = planner.layouts(2)
    # 310, 210, 190 and 150 bytes: block with a lane of two alone fits
    assert [(p.recompute, p.layout.lane_width, p.fits) for p in plans][:2] == [("block", 2, True), ("none", 1, False)]
    best = planner.best(2)
    assert best is not None
    assert (best.recompute, best.layout.lane_width) == ("block", 2)
    # none: one image of a group of four (160) takes a lane of four
    assert planner.devices_that_fit("none") == 4
    assert planner.devices_that_fit("block") == 2
    assert make(memory=105.0).devices_that_fit("none") is None
    assert make(memory=105.0).best(2) is None


def test_the_layout_of_training_is_best_where_another_is_hardly_faster() -> None:
    # a lane of two sends more, but that takes no time; the costs are equal, so training's own choice stays
    best = make().best(4)
    assert best == make().chosen_by_training(4)
    costs = {"none": COSTS["none"], "block": replace(COSTS["none"], image_seconds=0.99)}
    assert make(costs=costs).best(4) == make(costs=costs).chosen_by_training(4)
    costs["block"] = replace(costs["block"], image_seconds=0.9)
    best = make(costs=costs).best(4)
    assert best is not None
    assert best.recompute == "block"


def test_the_fewest_devices_within_the_hours_are_found() -> None:
    # on one device a step takes 16 s, the run 320 s; on 3 devices the busiest has 8 images, like on 2
    planner = make()
    found = [planner.devices_for(seconds / 3600) for seconds in (320.1, 319.9, 160.1, 159.9, 19.9)]
    assert [None if p is None else p.layout.world_size for p in found] == [1, 2, 2, 4, None]
    fastest = planner.fastest()
    assert fastest is not None
    assert fastest.hours == pytest.approx(20 / 3600)
    assert fastest.layout.world_size == 16


def test_a_layout_names_what_its_busiest_device_reads_and_sends() -> None:
    costs = {"none": replace(COSTS["none"], load_seconds=3.0)}
    found = make(costs=costs, exchange=Exchange((800,), (10,))).layouts(2)[0]
    assert found.load_seconds == 8 * 3.0  # half of the 16 images
    assert found.step.total == found.step.compute + found.step.communication + found.step.input == 24.0
    assert found.gradient_bytes_sent == 800.0  # 2 (W - 1) / W
    assert found.norm_bytes_sent == 80.0  # lanes of one: the fold alone


@pytest.mark.parametrize(("every", "evaluations"), [(1, 2), (2, 1), (3, 1), (0, 1)])
def test_evaluations_count_and_the_last_one_is_always_made(every: int, evaluations: int) -> None:
    recipe = replace(RECIPE, evaluation=Evaluation(every_epochs=every))
    plan = make(recipe=recipe, num_val_images=30, evaluation_seconds=2.0).layouts(2)[0]
    assert plan.evaluation_hours == pytest.approx(evaluations * 30 * 2 / 2 / 3600)
    assert plan.hours == plan.training_hours + plan.evaluation_hours


def test_batch_sizes_follow_the_law_of_the_noise_scale() -> None:
    sizes = {size.batch_size: size for size in make().batch_sizes(4, noise_scale=32.0)}
    assert list(sizes) == [4, 8, 16, 32, 64, 128]  # groups of four; more than the 160 images make no step
    assert sizes[16].steps == sizes[16].examples == 1
    # steps 1 + 32/B against 1 + 32/16 = 3, examples 1 + B/32 against 1.5
    assert sizes[64].steps == pytest.approx(1.5 / 3)
    assert sizes[64].examples == pytest.approx(3 / 1.5)
    assert [size.batch_size for size in sizes.values() if size.pays] == [4, 8, 16, 32]
    for size in sizes.values():
        assert size.examples == pytest.approx(size.steps * size.batch_size / 16)
    # 20 steps of 16 images, each image a second, on four devices: the work doubles with the examples
    assert sizes[16].hours == pytest.approx(20 * 4 / 3600)
    assert sizes[64].hours == pytest.approx(2 * 20 * 4 / 3600)
    assert sizes[64].devices_in_step == 16
    assert sizes[64].hours_in_step == pytest.approx(0.5 * 20 * 4 / 3600)
    assert sizes[4].devices_in_step == 1
    assert make().batch_sizes(16, 32.0)[0].hours is None  # 16 devices for 4 images


@pytest.mark.parametrize("forced", [{"lane_width": 4}, {"max_images_per_device": 1}])
def test_a_batch_size_that_devices_in_proportion_cannot_carry_as_forced_has_no_hours_there(
    forced: dict[str, int],
) -> None:
    # groups of four: a lane of four, or one image a device, takes four devices
    sizes = {size.batch_size: size for size in make(**forced).batch_sizes(4, noise_scale=32.0)}
    assert [size for size, own in sizes.items() if own.hours_in_step is None] == [4, 8]
    assert [sizes[size].devices_in_step for size in (4, 8, 16, 32)] == [1, 2, 4, 8]
    assert sizes[16].hours_in_step == sizes[16].hours == pytest.approx(20 * 4 / 3600)
    assert sizes[4].hours == pytest.approx(sizes[4].steps * 20 * 1 / 3600)  # the four devices of the plan can


def test_batch_sizes_that_the_check_of_recipes_refuses_are_left_out() -> None:
    # AGVM compares two halves of the groups, and 24 images are an odd number of groups of 8 already
    agvm = replace(RECIPE, batch_size=48, bn_size=8, optimizer=AGVM)
    assert [size.batch_size for size in make(recipe=agvm).batch_sizes(1, 32.0)] == [48, 96]
    plain = replace(agvm, optimizer=RECIPE.optimizer)
    assert [size.batch_size for size in make(recipe=plain).batch_sizes(1, 32.0)] == [24, 48, 96]
    of_four = make(recipe=replace(RECIPE, optimizer=AGVM)).batch_sizes(1, 32.0)
    assert [size.batch_size for size in of_four] == [8, 16, 32, 64, 128]


@pytest.mark.parametrize(("share", "sizes"), [(1, [1, 2]), (2, [1, 2]), (4, [1, 2, 4]), (32, [1, 4, 8])])
def test_the_sizes_to_measure_reach_up_to_the_layouts_own(share: int, sizes: list[int]) -> None:
    assert sizes_to_measure(Layout(1, share, 1, 1)) == sizes
