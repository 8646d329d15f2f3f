"""Variance equivalence on a tiny run: what must hold whatever the data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from factories import with_model
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.run_folder.folder import RunFolder
from megdet.studies.gradients.findings import Variance
from megdet.studies.gradients.pictures import plot_updates, plot_variance
from megdet.studies.gradients.units import Study, load_study
from megdet.studies.gradients.variance import measure_variance
from small_runs import CPU, four_images_a_step, save_run

MODULES = ["backbone", "fpn", "rpn", "box_head", "whole"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return four_images_a_step(tmp_path_factory.mktemp("data"), 33)


def study_of(recipe: Recipe, folder: Path) -> Study:
    save_run(folder, recipe)
    study = load_study(RunFolder(folder), CPU)
    torch.manual_seed(3)
    with torch.no_grad():  # fresh weights are all at the kinks of ReLU: zero biases meet zero padding
        for parameter in study.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return study


@pytest.fixture(scope="module")
def study(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_of(recipe, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def found(study: Study) -> Variance:
    return measure_variance(study, batch=2, factors=[2, 4], rate=1e-10)


def test_every_module_and_size_is_measured_on_disjoint_images(found: Variance) -> None:
    assert [module.name for module in found.modules] == MODULES
    assert (found.unit, found.unit_images, found.images, found.step) == ("group", 2, 32, 7)
    for module in found.modules:
        assert [(level.factor, level.batch, level.batches) for level in module.levels] == [
            (1, 2, 16),
            (2, 4, 8),
            (4, 8, 4),
        ]
        assert [update.factor for update in module.updates] == [2, 4]


def test_the_whole_is_the_sum_of_its_modules(found: Variance) -> None:
    *parts, whole = found.modules
    assert whole.parameters == sum(part.parameters for part in parts)
    for place, level in enumerate(whole.levels):
        assert level.variance.value == pytest.approx(sum(part.levels[place].variance.value for part in parts))


def test_updates_of_a_tiny_rate_obey_the_equation_since_the_weights_stand_still(found: Variance) -> None:
    for module in found.modules:
        for update in module.updates:
            assert update.distance < 1e-4
            assert update.ratio.value == pytest.approx(1, abs=1e-4)


def test_the_law_of_the_updates_is_equation_four(found: Variance) -> None:
    for module in found.modules:
        for update in module.updates:
            assert update.law == pytest.approx(
                update.factor * 1e-20 * module.levels[0].variance.value, rel=1e-12, abs=0
            )


def test_the_largest_update_is_the_gradient_of_the_largest_mini_batch(found: Variance) -> None:
    for module in found.modules:
        # variance of k r g over the blocks: (4 r)^2 times the variance of g
        wanted = 16 * 1e-20 * module.levels[-1].variance.value
        assert module.updates[-1].large.value == pytest.approx(wanted, rel=1e-9, abs=0)


def test_the_weights_are_put_back_and_a_real_rate_moves_them_on_the_way(study: Study) -> None:
    before = {name: tensor.clone() for name, tensor in study.model.state_dict().items()}
    moved = measure_variance(study, batch=2, factors=[2], images=16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in study.model.state_dict().items())
    assert moved.rate == pytest.approx(0.02 * 2 / 16)
    assert moved.modules[-1].updates[0].distance > 1e-3


def test_images_are_the_units_where_nothing_ties_them(recipe: Recipe, tmp_path: Path) -> None:
    frozen = with_model(recipe, backbone={"norm": "frozen"}, fpn={"norm": "none"})
    study = study_of(replace(frozen, bn_size=0, group_size=2), tmp_path)
    found = measure_variance(study, batch=1, factors=[2], images=8)
    assert (found.unit, found.unit_images, found.images) == ("image", 1, 8)
    assert "Images do not interact in the forward" in found.remark
    assert "share batch statistics" not in found.remark


def test_groups_are_said_to_be_no_means_of_images(found: Variance) -> None:
    assert "the gradient of a group is not the mean of its images' gradients" in found.remark
    assert json.loads(json.dumps(found.as_dict()))["remark"] == found.remark


def test_the_rate_of_the_updates_stands_beside_that_of_the_run(found: Variance) -> None:
    # the last of 7 steps, after 2 of warmup: 0.02 for 16 images is 0.005 for 4
    assert (found.blocks, found.optimizer, found.scheduled_rate) == (4, "sgd", pytest.approx(0.005))
    assert found.rates == "Rate r 1e-10; the run's own at step 7 was 0.005."


def test_the_rate_of_another_optimizer_is_not_taken_for_that_of_plain_sgd(recipe: Recipe, tmp_path: Path) -> None:
    study = study_of(replace(recipe, optimizer=replace(recipe.optimizer, kind="adamw", base_lr=1e-4)), tmp_path)
    with pytest.raises(InputError, match=r"optimizer\.kind is adamw, .*: choose one with --rate"):
        measure_variance(study, batch=2, factors=[2])
    found = measure_variance(study, batch=2, factors=[2], images=16, rate=1e-3)
    assert found.rates.endswith("was 2.5e-05. Updates are of plain SGD, while the run used adamw.")


def test_what_is_changed_of_the_recipe_is_told(recipe: Recipe, tmp_path: Path) -> None:
    save_run(tmp_path, recipe)
    study = load_study(RunFolder(tmp_path), CPU, {"bn_size": 4})
    found = measure_variance(study, batch=4, factors=[2], rate=1e-3)
    assert (found.unit_images, found.changes) == (4, ", bn_size 4")
    assert found.as_dict()["overrides"] == {"bn_size": 4}


def test_both_pictures_are_drawn(found: Variance, tmp_path: Path) -> None:
    plot_variance(found, tmp_path / "a/variance.png")
    plot_updates(found, tmp_path / "a/updates.png")
    assert (tmp_path / "a/variance.png").read_bytes() != (tmp_path / "a/updates.png").read_bytes()


def test_a_gradient_that_is_not_finite_is_refused_with_its_module_and_images(recipe: Recipe, tmp_path: Path) -> None:
    study = study_of(recipe, tmp_path)
    with torch.no_grad():
        study.model.box_head.classes.bias[0] = torch.nan
    with pytest.raises(InputError, match=r"gradient of \w+ is not finite at step 7 \(images \d+.png"):
        measure_variance(study, batch=2, factors=[2])


def test_small_updates_that_diverge_are_refused(study: Study) -> None:
    before = {name: tensor.clone() for name, tensor in study.model.state_dict().items()}
    with pytest.raises(InputError, match="take a healthy checkpoint or a lower --rate"):
        measure_variance(study, batch=2, factors=[2, 4], rate=1e250)
    study.model.load_state_dict(before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 8, "factors": [2]}, "take 64; choose --batch 4 or smaller --factors, or more images"),
        ({"batch": 4, "images": 20, "factors": [2]}, "--images 20: 20 different images are too few"),
        ({"factors": [64]}, "choose smaller --factors, or more images"),
        ({"batch": 3}, "--batch 3: it must be a multiple of bn_size 2"),
        ({"factors": [1]}, "--factors: name at least one above 1"),
        ({"factors": [0, 2]}, "--factors"),
        ({"batch": 2, "factors": [2], "rate": 0.0}, "--rate 0.0: it must be above 0"),
    ],
)
def test_what_gives_no_estimate_is_refused(study: Study, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as refused:
        measure_variance(study, **options)
    assert words in str(refused.value)
