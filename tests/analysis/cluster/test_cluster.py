"""The parts of a simulated step: the detector's work, the slowest image, the sum of it all."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megdet.analysis.cluster.detector import image_work, num_gradients, resnet50
from megdet.analysis.cluster.images import canvas_distribution, mean_pixels, slowest_of
from megdet.analysis.cluster.machines import MACHINES, TITAN_XP, machine_of
from megdet.analysis.cluster.network import all_gather_seconds, all_reduce_seconds
from megdet.analysis.cluster.step import (
    Job,
    bucket_seconds,
    efficiency,
    fold_seconds,
    image_seconds,
    memory_bytes,
    most_images,
    norm_seconds,
    step_time,
)
from megdet.errors import InputError
from megdet.model.detector import Detector
from megdet.recipe import Recipe

JOB = Job(devices=8, images=2, lane_width=8, independent=8)
BENCHMARKS = Path(__file__).parents[3] / "docs" / "benchmarks.json"


def test_the_counted_gradients_are_the_detectors_own() -> None:
    model = Detector(Recipe(), 80)
    assert num_gradients() == sum(parameter.numel() for parameter in model.parameters())
    norms = [module for module in model.modules() if type(module).__name__ == "CrossDeviceBatchNorm"]
    assert sorted(layer.channels for layer in resnet50()) == sorted(len(norm.running_mean) for norm in norms)


def test_resnet50_has_the_published_multiply_adds() -> None:
    """4.1 billion at 224 x 224, with the stride in the 3 x 3 convolutions, less 2 million of the classifier."""
    assert image_work(224.0**2).backbone / 2 == pytest.approx(4.09e9, rel=0.003)


def test_the_counted_work_is_what_the_benchmark_counted_while_it_ran() -> None:
    measured = json.loads(BENCHMARKS.read_text())["results"]["train_step/800-fp32"]["result"]["flops"]
    work = image_work(800.0**2, sparse_rpn=True)
    assert work.forward + work.backward == pytest.approx(measured, rel=0.02)


def test_frozen_stages_have_a_forward_alone() -> None:
    whole, frozen = image_work(1e6), image_work(1e6, frozen_stages=2)
    assert frozen.forward == whole.forward
    assert frozen.backward < whole.backward
    assert image_work(1e6, frozen_stages=5).normed_backward == 0
    assert num_gradients(5) == num_gradients() - sum(layer.weights + 2 * layer.channels for layer in resnet50())


def test_the_canvases_are_a_distribution_of_159_photos() -> None:
    first, chances = canvas_distribution()
    assert chances.sum() == pytest.approx(1.0)
    assert np.allclose(chances * 159, np.round(chances * 159))
    assert first * 32 * 32 == 800 * 800
    assert 800 * 800 < mean_pixels() < 800 * 1344


@pytest.mark.parametrize(("workers", "rounds"), [(1, 1), (1, 7)])
def test_one_worker_waits_for_nobody(workers: int, rounds: int) -> None:
    assert slowest_of(workers, rounds) == 1.0


def test_the_slowest_worker_is_that_of_drawn_steps() -> None:
    first, chances = canvas_distribution()
    drawn = first + np.random.default_rng(0).choice(len(chances), size=(20_000, 8, 2), p=chances)
    sums = drawn.sum(2)
    assert slowest_of(8, rounds=2) == pytest.approx(sums.max(1).mean() / sums.mean(), rel=0.002)


@given(workers=st.integers(1, 200), rounds=st.integers(1, 4))
def test_more_workers_wait_longer_and_more_rounds_even_out(workers: int, rounds: int) -> None:
    here = slowest_of(workers, rounds)
    assert slowest_of(workers + 1, rounds) >= here - 1e-12
    assert slowest_of(workers, 4 * rounds) <= here + 1e-12
    assert 1.0 <= here <= 800 * 1344 / mean_pixels() + 1e-9


@pytest.mark.parametrize("rounds", [1, 2, 3, 8, 60])
def test_sums_of_canvases_are_those_of_direct_convolution(rounds: int) -> None:
    first, chances = canvas_distribution()
    sums = np.ones(1)
    for _ in range(rounds):
        sums = np.convolve(sums, chances)
    below = np.minimum(np.cumsum(sums), 1.0)
    tiles = rounds * first + np.arange(len(sums))
    largest = tiles @ np.diff(below**64, prepend=0.0)
    assert slowest_of(64, rounds) == pytest.approx(largest / (tiles @ sums), rel=1e-12)


def test_thousands_of_rounds_even_out_as_the_square_root_of_their_number() -> None:
    """Sums of so many draws are normal: what the slowest takes longer falls as 1 / sqrt(rounds)."""
    few, many, more = (slowest_of(16, rounds) - 1 for rounds in (4096, 65_536, 1_048_576))
    assert few == pytest.approx(4 * many, rel=0.01)
    assert many == pytest.approx(4 * more, rel=0.01)


def test_no_worker_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        slowest_of(0)


def test_a_step_is_the_sum_of_its_parts_by_hand() -> None:
    machine = replace(TITAN_XP, fraction=0.1)
    step = step_time(JOB, machine)
    forward, backward = image_seconds(JOB, machine)
    assert step.images == pytest.approx(2 * (forward + backward))
    assert step.stragglers == pytest.approx(step.images * (slowest_of(8) - 1))
    assert step.overhead == machine.overhead
    parts = step.images + step.overhead + step.stragglers + step.norms + step.gradients + step.input
    assert step.total == pytest.approx(parts)
    assert step.communication == pytest.approx((step.norms + step.gradients) / step.total)


def test_the_arithmetic_of_an_image_by_hand() -> None:
    machine = replace(TITAN_XP, fraction=0.5, memory_bandwidth=1e30)
    work = image_work(mean_pixels())
    assert sum(image_seconds(JOB, machine)) == pytest.approx((work.forward + work.backward) / (0.5 * 12.15e12))
    again = sum(image_seconds(replace(JOB, recompute="backbone"), machine))
    assert again == pytest.approx((work.forward + work.backward + work.backbone) / (0.5 * 12.15e12))


def test_norm_layers_read_and_write_memory_by_hand() -> None:
    machine = replace(TITAN_XP, arithmetic=1e40)
    values = image_work(mean_pixels()).normed
    trained, frozen = (sum(image_seconds(replace(JOB, batch_norm=kind), machine)) for kind in (True, False))
    assert trained == pytest.approx((4 + 5) * values * 4 / 547.7e9)
    assert frozen == pytest.approx((2 + 2) * values * 4 / 547.7e9)
    again = sum(image_seconds(replace(JOB, recompute="norms"), machine))
    assert again == pytest.approx(trained + 2 * values * 4 / 547.7e9)


def test_batch_norm_within_a_lane_of_one_needs_no_collective() -> None:
    assert norm_seconds(replace(JOB, lane_width=1), TITAN_XP) == 0.0
    assert step_time(replace(JOB, batch_norm=False), TITAN_XP).norms == 0.0


def test_every_norm_layer_has_a_collective_each_way() -> None:
    # small messages cost latency: 53 layers, an all-gather forward and an all-reduce backward
    fabric = TITAN_XP.fabric
    least = 53 * (all_gather_seconds(0.0, 8, fabric) + all_reduce_seconds(0.0, 8, fabric))
    assert least < norm_seconds(JOB, TITAN_XP) < 2 * least
    least = 53 * 3 * all_reduce_seconds(0.0, 8, fabric)
    assert least < norm_seconds(replace(JOB, algorithm1=True), TITAN_XP) < 2 * least


def test_running_statistics_are_folded_once_a_step_over_all_devices() -> None:
    wide = replace(JOB, devices=64, rounds=3, lane_width=1)
    fold = all_reduce_seconds(4.0 * 2 * sum(layer.channels for layer in resnet50()), 64, TITAN_XP.fabric)
    assert step_time(wide, TITAN_XP).norms == fold > 0
    assert fold_seconds(replace(wide, algorithm1=True), TITAN_XP) == 0.0
    assert fold_seconds(replace(JOB, devices=1), TITAN_XP) == 0.0


@pytest.mark.parametrize("frozen_stages", [0, 2])
@pytest.mark.parametrize("device", MACHINES)
def test_the_largest_micro_batch_fits_and_one_image_more_does_not(device: str, frozen_stages: int) -> None:
    machine = MACHINES[device]
    most = most_images(frozen_stages, machine)
    here, more = (Job(devices=1, images=images, frozen_stages=frozen_stages) for images in (most, most + 1))
    assert memory_bytes(here, machine) <= 0.9 * machine.memory < memory_bytes(more, machine)
    assert most_images(frozen_stages, replace(machine, memory=1e9)) == 1


def test_a_frozen_stage_keeps_less_for_the_backward() -> None:
    machine = MACHINES["h200"]
    kept = [memory_bytes(Job(devices=1, images=1, frozen_stages=stages), machine) for stages in range(6)]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 6


def test_the_buckets_carry_the_whole_gradient() -> None:
    fabric = replace(TITAN_XP.fabric, link_bandwidth=1e6)  # so slow that nothing but the bytes counts
    seconds = sum(bucket_seconds(JOB, replace(TITAN_XP, fabric=fabric)))
    assert seconds == pytest.approx(2 * 7 / 8 * 4 * num_gradients() / 1e6, rel=1e-3)


def test_a_starved_step_takes_as_long_as_its_images_take_to_load() -> None:
    starved = replace(TITAN_XP, fraction=0.1, images_per_second=2.0)
    assert step_time(JOB, starved).total == pytest.approx(16 / 2.0)
    assert step_time(JOB, replace(starved, images_per_second=math.inf)).input == 0.0


def test_one_device_is_wholly_efficient_and_many_are_less() -> None:
    machine = MACHINES["h100"]
    alone = Job(devices=1, images=32)
    assert efficiency(alone, alone, machine) == pytest.approx(1.0)
    shared = Job(devices=8, images=4, lane_width=8)
    assert 0 < efficiency(shared, alone, machine) < 1


def test_an_unknown_device_is_named_with_the_nearest_known_one() -> None:
    assert machine_of("b200").device == "B200"
    with pytest.raises(InputError, match="h20'; did you mean 'h200'"):
        machine_of("h20")
