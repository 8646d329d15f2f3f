"""Scaling of devices of today."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from megdet.errors import InputError
from megdet.paper.tables import TRAINING_IMAGES
from megdet.planning.pictures import plot_scaling
from megdet.planning.published import MACHINES, PLAIN, TUNED
from megdet.planning.scaling import COUNTS, Asked, last_that_pays, simulate_scaling
from megdet.recipe import Schedule
from megdet.run_length import decay_of

H200 = MACHINES["h200"]


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("bn_size", [0, 32])
def test_more_devices_train_more_images_a_second_at_lower_efficiency(device: str, bn_size: int) -> None:
    points = simulate_scaling(MACHINES[device], Asked(images_per_device=2, bn_size=bn_size))
    assert [point.layout.world_size for point in points] == list(COUNTS)
    assert (COUNTS[0], COUNTS[-1]) == (1, 1024)
    speeds = [point.images_per_second for point in points]
    efficiencies = [point.efficiency for point in points]
    assert speeds == sorted(speeds)
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[0] == pytest.approx(1.0)


def test_the_batch_grows_with_the_devices_from_one_group_on() -> None:
    points = simulate_scaling(H200, Asked(images_per_device=8, bn_size=32))
    assert [point.batch_size for point in points[:5]] == [32, 32, 32, 64, 128]
    assert all(point.batch_size % 32 == 0 for point in simulate_scaling(H200, Asked(images_per_device=3, bn_size=32)))


def test_a_fixed_batch_is_spread_over_as_many_devices_as_it_has_images() -> None:
    points = simulate_scaling(H200, Asked(batch_size=64, bn_size=16))
    assert [point.layout.world_size for point in points] == [1, 2, 4, 8, 16, 32, 64]
    assert {point.batch_size for point in points} == {64}


def test_frozen_statistics_take_micro_batches_as_large_as_fit() -> None:
    points = simulate_scaling(H200, Asked(batch_size=256, bn_size=0))
    assert [(point.layout.rounds, point.layout.largest_share) for point in points[:3]] == [(2, 128), (1, 128), (1, 64)]
    assert all(point.fits for point in points)
    assert all(point.layout.rounds * point.layout.largest_share * point.layout.world_size == 256 for point in points)
    # one device is as fast as with frozen groups of any other large size, which differ in a few overheads alone
    groups = simulate_scaling(H200, Asked(images_per_device=64, bn_size=0))[0]
    assert points[0].hours == pytest.approx(groups.hours, rel=0.1)
    efficiencies = [point.efficiency for point in points]
    assert efficiencies[0] == pytest.approx(1.0)
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[-1] < 0.5


@pytest.mark.parametrize("batch_size", [97, 250, 257, 2000])
def test_frozen_statistics_ask_for_no_divisor(batch_size: int) -> None:
    points = simulate_scaling(MACHINES["a100"], Asked(batch_size=batch_size, bn_size=0))
    for point in points:
        least = -(-batch_size // point.layout.world_size)
        assert least <= point.layout.rounds * point.layout.largest_share < least + point.layout.rounds
    efficiencies = [point.efficiency for point in points]
    assert efficiencies == sorted(efficiencies, reverse=True)


@pytest.mark.parametrize("asked", [Asked(batch_size=16_384, bn_size=0), Asked(batch_size=65_536, bn_size=32)])
def test_large_batches_are_simulated(asked: Asked) -> None:
    points = simulate_scaling(H200, asked)
    assert [point.layout.world_size for point in points] == list(COUNTS)
    efficiencies = [point.efficiency for point in points]
    assert efficiencies == sorted(efficiencies, reverse=True)


def test_the_hours_are_eleven_epochs_of_coco() -> None:
    point = simulate_scaling(H200, Asked())[3]
    assert point.hours == pytest.approx(
        decay_of(Schedule()).epochs * TRAINING_IMAGES / point.batch_size * point.step.total / 3600
    )


def test_one_device_is_wholly_efficient_and_many_are_less() -> None:
    efficiencies = [point.efficiency for point in simulate_scaling(MACHINES["h100"], Asked(batch_size=32))]
    assert efficiencies[0] == pytest.approx(1.0)
    assert all(0 < after < before for before, after in pairwise(efficiencies))


@pytest.mark.parametrize("device", MACHINES)
def test_the_largest_frozen_micro_batch_fits_and_a_larger_one_does_not(device: str) -> None:
    machine = MACHINES[device]
    (one, *_) = simulate_scaling(machine, Asked(batch_size=1000, bn_size=0))
    rounds, images = one.layout.rounds, one.layout.largest_share
    assert one.memory_bytes <= 0.9 * machine.memory
    larger = -(-1000 // (rounds - 1))
    slope = (one.memory_bytes - simulate_scaling(machine, Asked(batch_size=1, bn_size=0))[0].memory_bytes) / (
        images - 1
    )
    assert one.memory_bytes + (larger - images) * slope > 0.9 * machine.memory
    tiny = simulate_scaling(replace(machine, memory=1e9), Asked(batch_size=8, bn_size=0))[0]
    assert (tiny.layout.largest_share, tiny.layout.rounds, tiny.fits) == (1, 8, False)


def test_it_stops_paying_below_half_efficiency() -> None:
    points = simulate_scaling(H200, Asked(images_per_device=1))
    best = last_that_pays(points)
    assert best is not None
    after = points[points.index(best) + 1]
    assert best.efficiency >= 0.5 > after.efficiency
    assert "efficiency" in after.why_not
    assert last_that_pays(points[points.index(after) :]) is None


def test_it_stops_paying_where_the_batch_passes_the_noise_scale() -> None:
    best = last_that_pays(simulate_scaling(H200, Asked(noise_scale=300.0)))
    assert best is not None
    assert best.batch_size == 256
    assert best.worth is not None
    assert best.worth.examples == pytest.approx(1 + 256 / 300)


def test_it_stops_paying_where_the_run_is_shorter_than_the_warmup() -> None:
    points = simulate_scaling(H200, Asked())
    best = last_that_pays(points)
    assert best is not None
    assert (best.batch_size, best.steps) == (2048, 11 * 118_000 // 2048)
    assert points[-1].why_not == "158 steps, fewer than the 500 of the warmup"


def test_what_does_not_fit_does_not_pay_and_more_devices_make_it_fit() -> None:
    points = simulate_scaling(MACHINES["a100"], Asked(batch_size=256, bn_size=256))
    assert [point.why_not for point in points[:2]] == ["does not fit"] * 2
    assert points[2].why_not == ""
    best = last_that_pays(points)
    assert best is not None
    assert best.fits
    assert simulate_scaling(H200, Asked(batch_size=256, bn_size=128))[0].why_not == "does not fit"


def test_without_overhead_two_images_a_device_pay_on_more_devices() -> None:
    asked = Asked(images_per_device=2)
    last = last_that_pays(simulate_scaling(replace(H200, speed=replace(H200.speed, overhead=0.0)), asked))
    usual = last_that_pays(simulate_scaling(H200, asked))
    assert last is not None
    assert usual is not None
    assert last.layout.world_size > usual.layout.world_size


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(images_per_device=0), "at least 1"),
        (Asked(batch_size=0), "at least 1"),
        (Asked(batch_size=48, bn_size=32), "32 does not divide the batch of 48"),
        (Asked(noise_scale=0.0), "above 0"),
    ],
)
def test_what_cannot_be_is_refused(asked: Asked, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate_scaling(H200, asked)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    asked = Asked(noise_scale=300.0)
    plain, tuned = (simulate_scaling(replace(H200, speed=speed), asked) for speed in (PLAIN, TUNED))
    plot_scaling([("plain", plain), ("tuned", tuned)], "H200", tmp_path / "scaling.png")
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("L").getcolors() or ()) > 20
