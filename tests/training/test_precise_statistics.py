"""Statistics estimated anew: means over the plan's groups, the same on any number of ranks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from factories import with_model
from megdet.data.loader import training_batches
from megdet.data.plan import TrainingPlan
from megdet.distributed.layout import choose_layout
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.inference.trained import load_detector
from megdet.layers.batch_norm import CrossDeviceBatchNorm, set_statistics
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.training.precise_statistics import load_precise_detector
from megdet.training.run import RunOptions
from small_runs import ALONE, CPU, furthest, save_run, small_recipe, train_set, write_small_set

IMAGES = 11  # rounded up to two mini-batches of 8, four groups of 4


def recipe_of(folder: Path) -> Recipe:
    """Batch norm everywhere, also over the RoIs of the box head, of which some are padding."""
    recipe = small_recipe(folder)
    return with_model(recipe, rpn={"norm": "batch"}, box_head={"norm": "batch"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precise")
    write_small_set(folder, "train", 20)
    save_run(folder / "run", recipe_of(folder))
    return folder / "run"


def estimate(world: World, run: Path, lane_width: int | None = None) -> dict[str, Tensor]:
    options = RunOptions(0, lane_width)
    return load_precise_detector(RunFolder(run), world, IMAGES, options).model.state_dict()


def test_statistics_are_the_plain_means_over_the_groups_of_the_plan(run: Path) -> None:
    recipe = recipe_of(run.parent)
    model = load_detector(RunFolder(run), CPU).model.train()
    means: dict[str, list[Tensor]] = {}
    variances: dict[str, list[Tensor]] = {}

    def look(name: str, inputs: tuple[Tensor, ...]) -> None:
        x, *mask = inputs
        rows = x[mask[0]] if mask else x
        values = rows.transpose(0, 1).flatten(1)
        means.setdefault(name, []).append(values.mean(1))
        variances.setdefault(name, []).append(values.var(1, unbiased=True))

    norms = {name: module for name, module in model.named_modules() if isinstance(module, CrossDeviceBatchNorm)}
    for name, module in norms.items():
        module.register_forward_pre_hook(lambda _module, inputs, name=name: look(name, inputs))
    dataset = train_set(recipe)
    plan = TrainingPlan(dataset.sizes, recipe)
    with torch.no_grad():
        for batch in training_batches(dataset, plan, choose_layout(2, 4, 1), 0, (0, 2), workers=0, device=CPU):
            model(batch)
    found = estimate(ALONE, run)
    assert any(name.startswith("box_head") for name in norms)
    for name in norms:
        assert len(means[name]) == 4
        for buffer, groups in (("running_mean", means), ("running_var", variances)):
            wanted = torch.stack(groups[name]).mean(0)
            torch.testing.assert_close(found[f"{name}.{buffer}"], wanted, rtol=1e-10, atol=1e-12)


def test_nothing_but_the_statistics_changes_and_the_run_stays_as_it_is(run: Path) -> None:
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    before = load_detector(RunFolder(run), CPU).model.state_dict()
    after = estimate(ALONE, run)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {name.rsplit(".", 1)[1] for name in changed} == {"running_mean", "running_var"}
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "width"), [(2, 1), (2, 2), (3, None), (3, 3)])
def test_any_number_of_ranks_estimates_the_same(run: Path, size: int, width: int | None) -> None:
    alone = estimate(ALONE, run)
    for found in run_in_ranks(estimate, size, run, width):
        assert furthest(alone, found)[0] < 1e-9


def test_setting_forgets_the_sums() -> None:
    norm = CrossDeviceBatchNorm(2).double()
    norm(torch.tensor([[1.0, 10.0], [3.0, 30.0]]).double())
    norm(torch.tensor([[5.0, 0.0], [7.0, 0.0]]).double())
    set_statistics(norm.modules(), 2, ALONE)
    assert norm.running_mean.tolist() == [4, 10]  # of 2 and 6, of 20 and 0
    assert norm.running_var.tolist() == [2, 100]  # of 2 and 2, of 200 and 0
    assert not norm.step_mean.any()
    assert not norm.step_var.any()


def test_a_model_without_batch_norm_has_nothing_to_set() -> None:
    set_statistics(nn.Linear(2, 2).modules(), 2, ALONE)


def refusal(folder: Path, recipe: Recipe, num_images: int = IMAGES) -> str:
    save_run(folder / "run", recipe)
    with pytest.raises(InputError) as caught:
        load_precise_detector(RunFolder(folder / "run"), ALONE, num_images, RunOptions(0))
    return str(caught.value)


def test_no_image_is_refused(run: Path, tmp_path: Path) -> None:
    assert "--precise-bn 0: it takes at least 1 image" in refusal(tmp_path, recipe_of(run.parent), 0)


def test_frozen_and_group_norms_have_nothing_to_estimate(run: Path, tmp_path: Path) -> None:
    recipe = small_recipe(run.parent)
    frozen = replace(with_model(recipe, fpn={"norm": "group"}), bn_size=0, group_size=4)
    assert "bn_size is 0" in refusal(tmp_path, frozen)
    stages = with_model(recipe, backbone={"frozen_stages": 5}, fpn={"norm": "group"})
    assert "every batch norm is frozen" in refusal(tmp_path / "stages", stages)


def test_missing_training_data_are_refused_with_their_file(run: Path, tmp_path: Path) -> None:
    recipe = recipe_of(run.parent)
    gone = replace(recipe, data=replace(recipe.data, train_annotations=str(tmp_path / "gone.json")))
    assert "gone.json" in refusal(tmp_path, gone)


def test_training_data_of_other_classes_are_refused(run: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "run", recipe_of(run.parent), ("bolt", "nut"))
    with pytest.raises(InputError, match=r"train.json: its classes are not those"):
        load_precise_detector(RunFolder(tmp_path / "run"), ALONE, IMAGES, RunOptions(0))
