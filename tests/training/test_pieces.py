"""Memory that runs out in the middle of a step: the step is made again in smaller pieces, and nobody can tell."""

import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from factories import with_model
from megdet.distributed import gradients
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.memory import is_out_of_memory
from megdet.recipe import Recipe
from megdet.structures import Batch, Targets
from megdet.training.pieces import Pieces
from megdet.training.run import RunOptions, open_run
from small_runs import ALONE, furthest, small_recipe, state_of, write_small_sets

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
PLACES = ("forward", "early in the backward", "late in the backward")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    return small_recipe(write_small_sets(tmp_path_factory.mktemp("pieces")))


def fail_once(model: nn.Module, place: str, call: int) -> Callable[[], None]:
    """Let memory run out once, at the given call of the place; returns what undoes it."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(place)
        if len(calls) == call:
            raise RuntimeError(NO_MEMORY)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if place == "forward":
        return model.backbone.register_forward_hook(fail).remove
    parameter = parameters[-1] if place.startswith("early") else parameters[0]
    return parameter.register_post_accumulate_grad_hook(fail).remove


def steps(
    world: World, recipe: Recipe, width: int, failing: tuple[int, str, int] | None
) -> tuple[dict[str, Tensor], list[float], int]:
    """The state after three steps, what they reported, and the parts that were made again on this rank."""
    defaults = (4096,)  # so that there are several buckets
    with (
        mock.patch.object(gradients.GradientBuckets.__init__, "__defaults__", defaults),
        open_run(recipe, world, RunOptions(workers=0, lane_width=width)) as run,
    ):
        if failing is not None and failing[0] == world.rank:
            fail_once(run.trainer.model, *failing[1:])
        losses = [sum(value.item() for value in result.means.values()) for result in run.steps(0, 3)]
        return state_of(run.trainer), losses, run.trainer.pieces.repeated


def same(ours: tuple[dict[str, Tensor], list[float], int], theirs: tuple[dict[str, Tensor], list[float], int]) -> bool:
    return ours[1] == theirs[1] and all(torch.equal(tensor, theirs[0][name]) for name, tensor in ours[0].items())


@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_ran_out_of_memory_is_made_again_to_the_bit(recipe, place):
    plain = steps(ALONE, recipe, 1, None)
    again = steps(ALONE, recipe, 1, (0, place, 4))  # the second micro-batch of the second step
    assert (plain[2], again[2]) == (0, 1)
    assert same(plain, again)


def test_halves_of_a_step_are_made_again_one_by_one(recipe):
    agvm = replace(recipe, optimizer=replace(recipe.optimizer, agvm=True))
    plain = steps(ALONE, agvm, 1, None)
    for call in (1, 2):
        again = steps(ALONE, agvm, 1, (0, PLACES[2], call))
        assert again[2] == 1
        assert same(plain, again)


@pytest.mark.distributed
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_one_rank_makes_its_part_again_while_the_other_waits(recipe, place, width):
    plain = run_in_ranks(steps, 2, recipe, width, None)
    again = run_in_ranks(steps, 2, recipe, width, (1, place, 2 * 2 if width == 2 else 2))
    assert [own[2] for own in again] == [0, 1]
    assert all(same(ours, theirs) for ours, theirs in zip(plain, again, strict=True))


def test_without_batch_statistics_images_go_one_by_one_in_the_end(recipe):
    frozen = with_model(replace(recipe, bn_size=0, group_size=4), fpn={"norm": "none"})
    plain = steps(ALONE, frozen, 1, None)
    with open_run(frozen, ALONE, RunOptions(workers=0)) as run:
        run.trainer.pieces.limits = [0, 0]
        counted: list[int] = []
        run.trainer.model.register_forward_pre_hook(lambda _, given: counted.append(len(given[0].image_index)))
        list(run.steps(0, 3))
        assert set(counted) == {1}
        assert furthest(plain[0], state_of(run.trainer))[0] < 1e-9


def test_an_error_that_is_not_of_memory_is_raised_and_so_is_one_that_nothing_helps(recipe):
    for message, kind in ((NO_MEMORY, InputError), ("a bug", RuntimeError)):
        with open_run(recipe, ALONE, RunOptions(workers=0)) as run:
            run.trainer.model.backbone.register_forward_hook(mock.Mock(side_effect=RuntimeError(message)))
            with pytest.raises(kind, match="does not fit cpu" if kind is InputError else "a bug"):
                list(run.steps(0, 1))


def batch_of(images: int, edge: int) -> Batch:
    targets = Targets(torch.zeros(images, 8, 4), torch.full((images, 8), -1), torch.zeros(images, dtype=torch.int64))
    sizes = torch.full((images, 2), edge)
    return Batch(torch.zeros(images, 3, edge, edge), sizes, targets, tuple(range(images)), torch.ones(images, 2))


def test_pieces_become_smaller_for_what_did_not_fit_and_for_all_that_is_larger():
    pieces = Pieces()
    small, large, larger = batch_of(1, 32), batch_of(2, 32), batch_of(3, 32)
    assert pieces.shrink(large, 1)
    assert [pieces.size_of(batch) for batch in (small, large, larger)] == [0, 1, 1]
    assert not pieces.shrink(larger, 1)
    assert pieces.shrink(larger, 2)
    assert [pieces.size_of(batch) for batch in (small, large, larger)] == [0, 1, 2]
    assert pieces.shrink(small, 2)
    assert [pieces.size_of(batch) for batch in (small, large, larger)] == [1, 1, 2]
    assert pieces.shrink(small, 2)
    assert [pieces.size_of(batch) for batch in (small, large, larger)] == [2, 2, 2]
    assert not pieces.shrink(small, 2)


def test_what_torch_says_of_full_memory_is_understood():
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 36, before[1]))
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("a bug"))
    assert not is_out_of_memory(ValueError(NO_MEMORY))
