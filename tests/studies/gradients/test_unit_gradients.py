"""Gradients of images and groups, by the code that trains."""

import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import TINY, with_model
from megdet.data.loader import training_batches
from megdet.data.plan import TrainingPlan
from megdet.distributed.layout import recipe_layout
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.studies.gradients.units import (
    COLUMNS,
    Sketch,
    Study,
    add_gradient,
    disjoint_groups,
    gradients_of,
    load_study,
    units_of_plan,
)
from megdet.training.loop import train
from megdet.training.run import RunOptions
from megdet.training.step import train_step
from megdet.training.trainer import trainer_of
from small_runs import ALONE, CPU, save_run, small_recipe, write_small_set


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("data")
    write_small_set(folder, "train", 16)
    write_small_set(folder, "val", 2, seed=1)
    recipe = small_recipe(folder, batch_size=8, bn_size=4)
    return replace(recipe, schedule=replace(recipe.schedule, epochs=0.5))


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "a")
    train(recipe, folder, RunOptions(workers=0), ALONE)
    return folder


@pytest.fixture(scope="module")
def grouped(run: RunFolder) -> Study:
    return load_study(run, CPU)


def unit_sketches(study: Study, number: int) -> list[dict[str, torch.Tensor]]:
    sketch = Sketch(study.trained, columns=1 << 22)  # wide enough to keep all
    found = []
    for unit in units_of_plan(study, number, 0):
        study.model.zero_grad(set_to_none=True)
        add_gradient(study, unit, study.unit_images)
        found.append({name: sketch.of(name, gradients_of(own)) for name, own in study.trained.items()})
    return found


def test_the_unit_is_the_group_where_batch_statistics_tie_its_images(run: RunFolder, grouped: Study) -> None:
    assert (grouped.has_groups, grouped.unit_images) == (True, 4)
    assert [len(unit.sizes) for unit in units_of_plan(grouped, 2, 0)] == [4, 4]


def test_the_mean_gradient_of_the_groups_is_that_of_the_training_step(recipe: Recipe, grouped: Study) -> None:
    layout = recipe_layout(recipe, 1)
    trainer = trainer_of(grouped.recipe, copy.deepcopy(grouped.model), ALONE)
    batches = training_batches(grouped.dataset, grouped.plan, layout, 0, (0, 1), workers=0, device=CPU)
    train_step(trainer, islice(batches, 2), layout.groups_of(0), 0.0, 0, ALONE)
    first, second = unit_sketches(grouped, 2)
    sketch = Sketch(grouped.trained, columns=1 << 22)
    for name in ("backbone", "fpn", "rpn", "box_head"):
        wanted = [p.grad for p in getattr(trainer.model, name).parameters() if p.requires_grad]
        mean = (first[name] + second[name]) / 2
        assert mean.abs().max() > 0
        torch.testing.assert_close(mean, sketch.of(name, wanted), rtol=1e-9, atol=1e-12)


def test_images_that_do_not_touch_each_other_have_gradients_of_their_own(run: RunFolder) -> None:
    save_run(run.path.parent / "frozen", frozen_recipe(run))
    study = load_study(RunFolder(run.path.parent / "frozen"), CPU)
    assert (study.has_groups, study.unit_images) == (False, 1)
    one, other = unit_sketches(study, 2)
    pair = next(
        training_batches(study.dataset, study.plan, recipe_layout(study.recipe, 1), 0, (0, 1), workers=0, device=CPU)
    )
    study.model.zero_grad(set_to_none=True)
    add_gradient(study, pair, 2)
    sketch = Sketch(study.trained, columns=1 << 22)
    for name, own in study.trained.items():
        assert not torch.allclose(one[name], other[name])
        torch.testing.assert_close(
            (one[name] + other[name]) / 2, sketch.of(name, gradients_of(own)), rtol=1e-9, atol=1e-12
        )


def frozen_recipe(run: RunFolder) -> Recipe:
    recipe = load_study(run, CPU).recipe
    return replace(with_model(recipe, backbone={"norm": "frozen"}, fpn={"norm": "group"}), bn_size=0, group_size=2)


def test_running_statistics_stay_as_the_checkpoint_has_them(grouped: Study) -> None:
    before = {name: tensor.clone() for name, tensor in grouped.model.state_dict().items()}
    unit_sketches(grouped, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in grouped.model.state_dict().items())


def test_a_small_module_is_kept_whole_and_a_large_one_keeps_its_inner_products() -> None:
    generator = torch.Generator().manual_seed(5)
    small = torch.randn(3, 4, generator=generator)
    large = torch.randn(100_000, generator=generator)
    other = torch.randn(100_000, generator=generator) + large
    names = {"small": [torch.nn.Parameter(small)], "large": [torch.nn.Parameter(large)]}
    sketch = Sketch(names, columns=1024)
    assert float(sketch.of("small", [small]).square().sum()) == pytest.approx(float(small.square().sum()))
    found = float(sketch.of("large", [large]) @ sketch.of("large", [other]))
    assert abs(found - float(large @ other)) < 4 * (2 / 1024) ** 0.5 * float(large.norm() * other.norm())
    difference = sketch.of("large", [other]) - sketch.of("large", [large])
    torch.testing.assert_close(sketch.of("large", [other - large]), difference, rtol=1e-4, atol=1e-3)


def test_the_sketch_of_a_layer_as_wide_as_a_power_of_two_keeps_its_length() -> None:
    # gradients of rank one from a single active input: all that is not 0 lies a power of two apart
    generator = torch.Generator().manual_seed(6)
    weight = torch.nn.Parameter(torch.empty(1024, 1024))
    sketch = Sketch({"layer": [weight]})
    errors = []
    for active in range(0, 1024, 50):
        gradient = torch.zeros(1024, 1024, dtype=torch.float64)
        gradient[:, active] = torch.randn(1024, generator=generator, dtype=torch.float64)
        length = float(gradient.square().sum())
        errors.append(float(sketch.of("layer", [gradient]).square().sum()) / length - 1)
    assert np.sqrt(np.mean(np.square(errors))) < 1.5 * (2 / COLUMNS) ** 0.5


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 99))
def test_a_sketch_in_chunks_is_a_sum_of_signed_entries(number: int, seed: int) -> None:
    # every single entry has one place, of its own among those that follow one another
    weight = torch.nn.Parameter(torch.empty(number))
    sketch = Sketch({"layer": [weight]}, columns=8)
    entries = torch.stack([sketch.of("layer", [row]) for row in torch.eye(number, dtype=torch.float64)])
    assert (entries.abs().sum(1) == 1).all()
    for first in range(0, number, 8):
        assert entries[first : first + 8].abs().sum(0).max() == 1
    gradient = torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(sketch.of("layer", [gradient]), gradient @ entries)


def test_groups_that_repeat_an_image_are_left_out() -> None:
    # a window of 4 x 4 images on 13: three of them come twice
    plan = TrainingPlan(np.full((13, 2), 64), replace(TINY, batch_size=4, bn_size=2, plan_window=4))
    found = disjoint_groups(plan)
    indices = [image.index for step, number in found for image in plan.groups(step)[number].images]
    assert len(indices) == len(set(indices)) >= 10
    assert found == sorted(found)
    one_by_one = TrainingPlan(np.full((13, 2), 64), replace(TINY, batch_size=4, bn_size=2, plan_window=1))
    assert disjoint_groups(one_by_one)[:6] == [(step, number) for step in range(3) for number in range(2)]


def test_units_of_the_plan_share_no_image(grouped: Study) -> None:
    units = list(units_of_plan(grouped, grouped.disjoint_images // 4, 0))
    indices = [index for unit in units for index in unit.image_index]
    assert len(indices) == len(set(indices)) == grouped.disjoint_images


def refusal(folder: Path, recipe: Recipe) -> str:
    with pytest.raises(InputError) as refused:
        load_study(RunFolder(folder), CPU)
    return str(refused.value)


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(recipe: Recipe, run: RunFolder, tmp_path: Path) -> None:
    assert "not a run folder" in refusal(tmp_path, recipe)
    (tmp_path / "recipe.yaml").write_text(run.recipe.read_text())
    assert "has no checkpoint yet" in refusal(tmp_path, recipe)
    newest = load_study(run, CPU).step
    assert load_study(run, CPU, step=newest).step == newest
    with pytest.raises(InputError, match=r"there is no checkpoint .*step_00000999"):
        load_study(run, CPU, step=999)


def test_other_data_than_those_of_the_run_are_refused(recipe: Recipe, run: RunFolder, tmp_path: Path) -> None:
    write_small_set(tmp_path, "train", 13, seed=9)
    with pytest.raises(InputError, match=r"not those that .* was trained on"):
        load_study(
            run,
            CPU,
            {"data.train_annotations": str(tmp_path / "train.json"), "data.train_images": str(tmp_path / "train")},
        )
    save_run(tmp_path / "b", recipe, ("bolt", "nut"))
    assert "its classes are not those" in refusal(tmp_path / "b", recipe)
