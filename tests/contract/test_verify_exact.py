"""`megdet verify --exact`: the same bits on any devices, and every sum in an order of the devices is caught."""

import pytest
import torch
from torch import distributed

from megdet.contract.cases import cases_of
from megdet.contract.verify import verify
from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.lane import Lane
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.layers.image_team import ImageTeam
from megdet.training.trainer import Trainer


@pytest.mark.distributed
def test_exact_runs_have_one_sha256_on_any_devices(recipe):
    verdict = verify(recipe, (1, 2, 3), cases=("bn-all", "resume"), steps=2, dtype="bfloat16", exact=True)
    assert verdict.passes, verdict.sentence()
    assert verdict.worst.difference == 0
    by_case: dict[str, set[str]] = {}
    for row in verdict.rows:
        by_case.setdefault(row.case, set()).add(row.sha256)
    assert {len(found) for found in by_case.values()} == {1}
    assert by_case["bn-all"] != by_case["resume"]
    assert verdict.count("another layout") == 3
    assert verdict.sentence() == (
        "pass: 3 runs compared with another layout; difference 0, every bit is the same; SHA-256 " + verdict.sha256
    )
    assert verdict.as_dict()["sha256"] == verdict.sha256


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_exact_case_has_one_sha256_on_all_device_counts(recipe, dtype):
    names = tuple(cases_of(recipe))
    verdict = verify(recipe, cases=names, steps=4, dtype=dtype, exact=True)
    assert verdict.passes, verdict.sentence()
    assert verdict.worst.difference == 0
    assert {row.case for row in verdict.rows} == set(names)


def add_in_floating_point(trainer: Trainer, world: World) -> None:
    trainer.apart, trainer.buckets = None, GradientBuckets(trainer.model.parameters(), world)


def add_gradients_in_rank_order(trainer: Trainer, world: World) -> None:
    """Images are apart, and their gradients are added in float32: those of a rank's images, then those of the ranks."""
    assert trainer.apart is not None
    own, sums = trainer.apart.gradients, dict[int, torch.Tensor]()

    def add(place: int, gradient: torch.Tensor) -> None:
        sums[place] = gradient.clone() if place not in sums else sums[place] + gradient

    def finish() -> None:
        for place, parameter in enumerate(own.parameters):
            parts = world.gather_objects(sums.pop(place, torch.zeros_like(parameter)))
            parameter.grad = torch.stack(parts).sum(0) / own.num_images

    own.add, own.finish = add, finish  # type: ignore[method-assign]  # this process is for one run


def add_statistics_in_rank_order(trainer: Trainer, world: World) -> None:
    """The sums that the gradient of a batch norm needs are float32 sums over a rank's images, then over the lane."""
    of_lane = ImageTeam._of_lane

    def by_rank(self: ImageTeam, rows: torch.Tensor, lane: Lane) -> torch.Tensor:
        is_forward = rows.shape[1] % 2  # a count, a mean and a variance of each channel
        if is_forward:
            return of_lane(self, rows, lane)
        sums = rows[: self.num_images].float().sum(0)
        if lane.width == 1:
            return sums.unsqueeze(0)
        found = [torch.empty_like(sums) for _ in range(lane.width)]
        distributed.all_gather(found, sums, group=lane.process_group)
        return torch.stack(found)

    ImageTeam._of_lane = by_rank  # type: ignore[method-assign]  # this process is for one run


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("leak", "case"),
    [
        (add_in_floating_point, "bn-all"),
        (add_gradients_in_rank_order, "lane-2"),
        (add_statistics_in_rank_order, "lane-2"),
    ],
)
def test_sums_in_an_order_of_the_devices_are_caught_in_an_exact_run(recipe, leak, case):
    verdict = verify(recipe, (1, 2), cases=(case,), steps=1, dtype="float32", exact=True, break_with=leak)
    assert [row.passes for row in verdict.rows if row.devices == 2] == [False]
    assert all(row.passes for row in verdict.rows if row.devices == 1)
    assert 0 < verdict.rows[-1].difference < 0.1


@pytest.mark.distributed
def test_two_ranks_that_carry_a_group_together_give_the_bits_of_one(recipe):
    """What the controls above break."""
    verdict = verify(recipe, (1, 2), cases=("lane-2",), steps=1, dtype="float32", exact=True)
    assert verdict.passes, verdict.sentence()
    assert [(row.devices, row.lane_width, row.difference) for row in verdict.rows] == [(2, 2, 0)]


def test_bfloat16_is_judged_with_exact_alone(recipe):
    with pytest.raises(InputError, match=r"--dtype bfloat16: .* with --exact"):
        verify(recipe, (1, 2), dtype="bfloat16")
