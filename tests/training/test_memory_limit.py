"""A real limit on the memory of a CPU process: what does not fit is computed in smaller pieces, with the same bits."""

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megdet.architecture_parts import Backbone
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.memory import give_memory_back, is_out_of_memory
from megdet.recipe import Recipe
from megdet.training.dry_run import MemoryTrial, largest_batch
from megdet.training.pieces import Pieces, accumulate
from megdet.training.run import RunOptions, open_run
from small_runs import small_recipe, write_small_sets

STEP = 24 << 20
CANVAS = (384, 384)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the size of a process is read from /proc"),
]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = small_recipe(write_small_sets(tmp_path), batch_size=4, bn_size=4)
    model = replace(recipe.model, backbone=Backbone(name="resnet18"))
    data = replace(recipe.data, short_edges=(CANVAS[0],), max_long_edge=CANVAS[0])
    return replace(recipe, model=model, data=data, precision="float32")


def data_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmData")).split()[1]) << 10


@contextmanager
def at_most(data: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def under_growing_limits(world: World, recipe: Recipe) -> dict[str, Any]:
    """Tries one micro-batch under more and more memory until it fits; then without a limit, for comparison."""
    torch.set_num_threads(1)
    with ExitStack() as opened:
        with mock.patch.object(MemoryTrial, "_is_needed", return_value=False):  # its memory would be kept
            run = opened.enter_context(open_run(recipe, world, RunOptions(workers=0)))
        trainer = run.trainer
        batch = largest_batch(run.datasets.train, 4, CANVAS, run.recipe.data)

        def gradients(pieces: Pieces) -> list[torch.Tensor]:
            trainer.buckets.zero()
            many = trainer.model, recipe, trainer.buckets, pieces, [batch], 1, world.device
            accumulate(*many, again=lambda: [batch])
            trainer.buckets.finish()
            return [own.clone() for own in trainer.buckets.gradients]

        start, failures, pieces, found = data_bytes(), 0, Pieces(), None
        while found is None:
            pieces = Pieces()
            try:
                with at_most(start + (failures + 1) * STEP):
                    found = gradients(pieces)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failures += 1
            give_memory_back(world.device)
        refusals, sentence = 0, ""
        while not sentence:  # the trial keeps room for the momentum too
            trial = MemoryTrial(trainer, run.plan, run.datasets.train, world)
            try:
                with at_most(start + (failures + 1 + 2 * refusals) * STEP):
                    _, sentence = trial.fitting(run.layout, None, None)
            except InputError:  # nothing fits: with less, a part of it does not either
                refusals += 1
        trainer.pieces.limits = []
        expected = gradients(Pieces())
        return {
            "failures": failures,
            "repeated": pieces.repeated,
            "same": all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)),
            "refusals": refusals,
            "sentence": sentence,
        }


def test_the_smallest_memory_that_is_enough_takes_smaller_pieces_with_the_same_gradients(recipe):
    (found,) = run_in_ranks(under_growing_limits, 1, recipe, timeout=900.0)
    print(found["failures"], found["refusals"])
    assert found["failures"] > 0, "less was not enough"
    assert found["repeated"] == 1, "the whole micro-batch did not fit, its pieces did"
    assert found["same"]
    assert found["refusals"] > 0
    assert "recompute block where micro-batches are large; the result is the same" in found["sentence"]
