from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megdet.data.coco import CocoDataset, training_set
from megdet.data.loader import LoadingFaults, group_batches, training_batches
from megdet.data.plan import TrainingPlan, evaluation_plan
from megdet.data.planned import PlannedImage
from megdet.data.transforms import load_batch
from megdet.data.unreadable import MOST_IN_A_ROW, most_replaced, stand_in
from megdet.distributed.layout import choose_layout
from megdet.errors import InputError
from megdet.model.choice import mask_use
from megdet.recipe import Recipe
from megdet.structures import Batch
from small_runs import CPU, small_recipe, train_set, val_set, write_small_set


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    write_small_set(tmp_path, "train", 10)
    write_small_set(tmp_path, "val", 3, seed=1)
    recipe = small_recipe(tmp_path)
    return replace(recipe, data=replace(recipe.data, color_jitter=0.3, unreadable="replace", most_replaced=0.3))


def batches(
    recipe: Recipe, dataset: CocoDataset, rank: int = 0, ranks: int = 1, workers: int = 0
) -> tuple[list[Batch], LoadingFaults]:
    plan, faults = TrainingPlan(dataset.sizes, recipe), LoadingFaults()
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, ranks, ranks)
    found = training_batches(dataset, plan, layout, rank, (0, 3), workers=workers, device=CPU, faults=faults)
    return list(found), faults


def files(recipe: Recipe) -> Path:
    return Path(recipe.data.train_images)


@pytest.mark.parametrize("changes", [{}, {"crop": (40, 40), "scale_jitter": (0.5, 2.0)}, {"resize": "torchvision"}])
def test_the_image_that_takes_a_place_is_the_next_of_the_epoch_and_fits_every_canvas(recipe, changes):
    recipe = replace(recipe, data=replace(recipe.data, **changes))
    plan = TrainingPlan(train_set(recipe).sizes, recipe)
    order = plan.order(1).tolist()
    for place, index in enumerate(order):
        image = PlannedImage(index, 1, 7 + index, (1, 1))
        for canvas in ((32, 32), (64, 32), (32, 96), (512, 512)):
            other = stand_in(plan, image, canvas)
            assert (other.index, other.epoch) == (order[(place + 1) % len(order)], 1)
            assert other.size[0] <= canvas[0]
            assert other.size[1] <= canvas[1]
            height, width = plan.sizes[other.index]
            assert other.size[0] / other.size[1] == pytest.approx(height / width, rel=0.1)
            assert canvas == (512, 512) or max(a / b for a, b in zip(other.size, canvas, strict=True)) > 0.95
    assert len({stand_in(plan, PlannedImage(0, 1, seed, (1, 1)), (64, 64)).seed for seed in range(20)}) == 20


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n half"])
def test_a_lost_image_is_replaced_with_its_targets_alike_on_every_layout_and_by_every_process(recipe, content):
    dataset = train_set(recipe, with_masks=True)
    plan = TrainingPlan(dataset.sizes, recipe)
    before, _ = batches(recipe, dataset)
    file = files(recipe) / dataset.file_names[5]
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    whole, faults = batches(recipe, dataset)
    shares = [batches(recipe, dataset, rank, 3, workers=rank) for rank in range(3)]
    lost = 0
    for number, (old, new) in enumerate(zip(before, whole, strict=True)):
        group = plan.groups(number // 2)[number % 2]
        own = [stand_in(plan, image, group.canvas) if image.index == 5 else image for image in group.images]
        wanted = load_batch(dataset, own, group.canvas, recipe.data.color_jitter)
        assert new.image_index == tuple(image.index for image in own)
        assert all(torch.equal(a, b) for a, b in zip(new.tensors(), wanted.tensors(), strict=True))
        kept = [row for row, index in enumerate(old.image_index) if index != 5]
        lost += len(own) - len(kept)
        assert torch.equal(new.pixels[kept], old.pixels[kept])
        parts = [share[number] for share, _ in shares]
        assert torch.equal(torch.cat([part.pixels for part in parts]), new.pixels)
        assert torch.cat([part.targets.image_seeds for part in parts]).tolist() == new.targets.image_seeds.tolist()
    assert lost >= 2
    assert len(faults.replaced) == lost == sum(len(own.replaced) for _, own in shares)
    assert {one.image for one in faults.replaced} == {5}
    assert str(files(recipe)) not in faults.replaced[0].reason


def test_where_the_next_image_is_lost_too_the_one_after_it_is_taken(recipe):
    dataset = train_set(recipe)
    plan = TrainingPlan(dataset.sizes, recipe)
    first, second, third = (int(index) for index in plan.order(0)[2:5])
    for index in (first, second):
        (files(recipe) / dataset.file_names[index]).unlink()
    found, faults = batches(recipe, dataset)
    assert not {first, second} & {index for batch in found for index in batch.image_index}
    pairs = {(one.image, one.by) for one in faults.replaced}
    assert pairs >= {(first, second), (second, third)}


def test_a_folder_that_is_gone_stops_the_run_after_a_few_images(recipe):
    dataset = train_set(recipe)
    files(recipe).rename(files(recipe).with_name("elsewhere"))
    with pytest.raises(InputError, match="no such image file"):
        batches(recipe, dataset)
    assert len(dataset) > MOST_IN_A_ROW


def test_an_image_that_is_evaluated_is_never_replaced(recipe):
    dataset = val_set(recipe)
    (Path(recipe.data.val_images) / dataset.file_names[1]).unlink()
    with pytest.raises(InputError, match=r"1\.png: no such .* the score would be that of other data"):
        list(group_batches(dataset, evaluation_plan(dataset.sizes, recipe), workers=0, device=CPU))


def read(recipe: Recipe) -> CocoDataset:
    return training_set(recipe.data, masks=mask_use(recipe.model))


def test_a_data_set_is_read_as_before_where_the_recipe_allows_for_its_lost_images(recipe):
    whole = read(recipe)
    (files(recipe) / "2.png").unlink()
    (files(recipe) / "4.png").write_bytes((files(recipe) / "4.png").read_bytes()[:300])
    again = read(recipe)
    assert again.file_names == whole.file_names
    assert (again.sizes == whole.sizes).all()
    with pytest.raises(InputError, match="1 of 10 images"):
        read(replace(recipe, data=replace(recipe.data, unreadable="stop")))
    (files(recipe) / "6.png").unlink()
    (files(recipe) / "7.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"4 files cannot be read, more than data\.most_replaced"):
        read(recipe)


def test_an_image_that_was_never_read_has_the_size_of_the_annotations(recipe, monkeypatch, tmp_path):
    whole = read(recipe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    (files(recipe) / "2.png").unlink()
    for _ in range(2):
        assert (read(recipe).sizes == whole.sizes).all()


def test_one_image_may_always_be_lost():
    assert [most_replaced(0.01, number) for number in (5, 100, 250)] == [1, 1, 2]
