"""The contract in small: the same training on one, two and three ranks, with every width of a lane."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from factories import with_model
from megdet.contract.verify import relative_difference
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.recipe import Recipe
from small_runs import furthest, run_steps, small_recipe, state_of, write_small_set

pytestmark = pytest.mark.distributed

STEPS = 4
LAYOUTS = {2: (1, 2), 3: (1, 3)}
"""Ranks: the widths of their lanes. Three lanes of one have two groups to share: one rank idles."""


def recipes(folder: Path) -> dict[str, Recipe]:
    batch = small_recipe(folder)
    return {
        "batch norm": batch,
        # a lane of three carries groups of two, so one of its ranks never has an image
        "frozen": with_model(replace(batch, bn_size=0, group_size=2), fpn={"norm": "none"}),
        "everything": replace(
            batch,
            data=replace(batch.data, vertical_flip=0.5, color_jitter=0.4, scale_jitter=(0.7, 1.2)),
            model=batch.model.with_norms({"rpn": "batch", "box_head": "batch"}),
            optimizer=replace(batch.optimizer, clip_norm=0.5, ema_decay=0.9, decay_norm_and_bias=False),
        ),
        "modern": with_model(
            replace(
                batch,
                data=replace(batch.data, crop=(48, 64), scale_jitter=(0.5, 2.0), scale_law="factor"),
                model=batch.model.with_norms({"rpn": "batch", "box_head": "batch"}),
            ),
            rpn={"convolutions": 2, "box_loss": "giou"},
            box_head={"convolutions": 2, "convolution_channels": 8, "layers": 1, "box_loss": "giou"},
        ),
        # from its third step on; with three lanes one rank has nothing of either half
        "agvm and noise": replace(
            batch, noise_interval=2, optimizer=replace(batch.optimizer, agvm=True, clip_norm=5.0)
        ),
    }


Found = dict[tuple[str, int], tuple[dict[str, Tensor], list[Tensor]]]


def train_all(world: World, folder: Path, widths: tuple[int, ...]) -> Found:
    found = {}
    for name, recipe in recipes(folder).items():
        for width in widths:
            trainer, reported = run_steps(recipe, STEPS, world, width)
            found[name, width] = state_of(trainer), reported
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_small_set(folder, "train", 13)
    write_small_set(folder, "val", 2, seed=1)
    return folder


@pytest.fixture(scope="module")
def alone(data: Path) -> Found:
    return train_all(World(0, 1, torch.device("cpu")), data, (1,))


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_any_number_of_ranks_and_any_lanes_train_like_one(ranks, data, alone):
    everybody: list[Found] = run_in_ranks(train_all, ranks, data, LAYOUTS[ranks])
    for (name, width), (state, reported) in everybody[0].items():
        wanted, wanted_reported = alone[name, 1]
        worst, where = furthest(wanted, state)
        assert worst < 1e-9, (name, width, where, worst)
        for step in range(STEPS):
            assert relative_difference(wanted_reported[step], reported[step]) < 1e-9, (name, width, step)
        for others in everybody[1:]:
            assert all(torch.equal(state[key], others[name, width][0][key]) for key in state), "ranks drifted apart"


def test_the_training_that_is_compared_moves_what_it_should(data, alone):
    for name, recipe in recipes(data).items():
        before = state_of(run_steps(recipe, 0)[0])  # the same weights, not yet trained
        after = alone[name, 1][0]
        for key, tensor in before.items():
            is_norm = f"{key.rsplit('.', 1)[0]}.running_mean" in before
            moves = not (name == "frozen" and is_norm) and key != "watch.num_left_out"
            assert (relative_difference(tensor, after[key]) > 1e-6) == moves, (name, key)
        assert any(key.startswith("momentum.") for key in after)


def test_batch_statistics_do_belong_to_the_group(data, alone):
    """Another BN size is another training: the equality above is not for want of statistics."""
    recipe = replace(recipes(data)["batch norm"], bn_size=8)
    worst, _ = furthest(alone["batch norm", 1][0], state_of(run_steps(recipe, STEPS)[0]))
    assert worst > 1e-3
