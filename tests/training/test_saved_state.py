"""What a checkpoint holds of optimizer, AGVM and noise scale is all that a run needs to go on to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megdet.contract.run import Training, run_steps
from megdet.recipe import Optimizer, Recipe, Watch
from megdet.run_folder.checkpoint_files import latest_checkpoint
from megdet.run_folder.folder import RunFolder
from run_folders import load_checkpoint
from small_runs import ALONE, small_recipe, write_small_set


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    folder = tmp_path_factory.mktemp("data")
    write_small_set(folder, "train", 13)
    write_small_set(folder, "val", 2, seed=1)
    recipe = small_recipe(folder)
    return replace(recipe, schedule=replace(recipe.schedule, warmup_steps=1))


@pytest.mark.parametrize(
    ("optimizer", "changes", "kinds"),
    [
        (Optimizer(agvm=True), {"noise_interval": 2}, {"agvm", "noise"}),
        (Optimizer(kind="adamw", agvm=True, base_lr=1e-4), {}, {"agvm"}),
        (Optimizer(kind="lars", base_lr=1.0), {}, set()),
        # one group a step: the gradient of the second step waits in the checkpoint for that of the third
        (Optimizer(kind="lamb", base_lr=1e-3), {"bn_size": 8, "noise_interval": 3}, {"noise"}),
        # an update is left out where its gradient is larger than that of the last one that was applied
        (Optimizer(ema_decay=0.9), {"watch": Watch(window=1, explodes_at=1.0)}, {"averages"}),
    ],
    ids=["agvm", "agvm-adamw", "lars", "lamb", "left out"],
)
def test_a_stopped_run_goes_on_to_the_bit(optimizer, changes, kinds, recipe, tmp_path):
    changed = replace(recipe, optimizer=optimizer, **changes)
    whole = run_steps(ALONE, Training(changed, 1, None, (0, 4)))
    run_steps(ALONE, Training(changed, 1, None, (0, 2), tmp_path))
    resumed = run_steps(ALONE, Training(changed, 1, None, (2, 4), tmp_path))
    assert whole is not None
    assert resumed is not None
    assert whole.state.keys() == resumed.state.keys()
    different = [name for name, tensor in whole.state.items() if not torch.equal(tensor, resumed.state[name])]
    assert different == []
    assert not whole.unmoved
    saved = latest_checkpoint(RunFolder(tmp_path))
    assert saved is not None
    tensors = load_checkpoint(saved)[0]
    assert set(tensors) == {"model", "optimizer", "watch"} | kinds
    if changes.get("bn_size") == 8:
        assert any(name.startswith("gradient.backbone.") for name in tensors["noise"])
    if "watch" in changes:
        assert 0 < whole.state["watch.num_left_out"] < 4
    if "agvm" in kinds:
        assert (tensors["agvm"]["factors"] != 1).any()


def test_a_checkpoint_of_plain_momentum_is_named_by_its_parameters(recipe, tmp_path: Path):
    run_steps(ALONE, Training(recipe, 1, None, (0, 1), tmp_path))
    saved = latest_checkpoint(RunFolder(tmp_path))
    assert saved is not None
    tensors = load_checkpoint(saved)[0]
    assert tensors["optimizer"].keys() <= tensors["model"].keys(), "as in checkpoints before there was a choice"
