import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from megdet.data import loader
from megdet.data.loader import group_batches, training_batches
from megdet.data.plan import TrainingPlan, evaluation_plan
from megdet.distributed.layout import choose_layout
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.structures import Batch
from small_runs import CPU, small_recipe, train_set, val_set, write_small_set


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder: Path = tmp_path_factory.mktemp("loader")
    write_small_set(folder, "train", 10)
    write_small_set(folder, "val", 5, seed=1)
    recipe = small_recipe(folder)
    return replace(recipe, data=replace(recipe.data, color_jitter=0.3))


def batches(recipe: Recipe, workers: int = 0, rank: int = 0, ranks: int = 1, width: int | None = None) -> list[Batch]:
    dataset = train_set(recipe)
    plan = TrainingPlan(dataset.sizes, recipe)
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, ranks, width)
    return list(training_batches(dataset, plan, layout, rank, (1, 4), workers=workers, device=CPU))


def same(ours: Batch, theirs: Batch) -> bool:
    return (
        all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("pixels", "sizes", "scales"))
        and all(
            torch.equal(getattr(ours.targets, name), getattr(theirs.targets, name))
            for name in ("boxes", "labels", "image_seeds")
        )
        and ours.image_index == theirs.image_index
    )


def test_batches_come_in_the_order_of_the_plan(recipe):
    plan = TrainingPlan(train_set(recipe).sizes, recipe)
    planned = [group for step in range(1, 4) for group in plan.groups(step)]
    found = batches(recipe)
    assert [batch.image_index for batch in found] == [tuple(i.index for i in group.images) for group in planned]
    assert [tuple(batch.pixels.shape[2:]) for batch in found] == [group.canvas for group in planned]
    assert [b.targets.image_seeds.tolist() for b in found] == [[i.seed for i in group.images] for group in planned]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_make_the_batches_of_one_process(recipe, workers):
    alone, shared = batches(recipe), batches(recipe, workers)
    assert len(alone) == len(shared) == 6
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    assert not same(alone[0], alone[1])


def test_shares_of_a_lane_are_slices_of_its_groups_on_the_same_canvas(recipe):
    whole = batches(recipe)
    shares = [batches(recipe, rank=rank, ranks=3, width=3) for rank in range(3)]
    for number, batch in enumerate(whole):
        parts = [own[number] for own in shares]
        assert [len(part.pixels) for part in parts] == [1, 1, 2]
        assert torch.equal(torch.cat([part.pixels for part in parts]), batch.pixels)
        assert torch.equal(torch.cat([part.sizes for part in parts]), batch.sizes)
        assert torch.cat([p.targets.image_seeds for p in parts]).tolist() == batch.targets.image_seeds.tolist()


def test_a_rank_without_an_image_gets_empty_batches(recipe):
    recipe = replace(recipe, bn_size=0, group_size=2, fpn=replace(recipe.fpn, norm="none"))
    shares = [batches(recipe, rank=rank, ranks=3, width=3) for rank in range(3)]
    assert [sum(len(batch.pixels) for batch in share) for share in shares] == [0, 12, 12]
    assert len(shares[0]) == 12


def test_an_idle_lane_has_no_batches(recipe):
    assert batches(recipe, workers=1, rank=2, ranks=3, width=1) == []


def test_what_a_worker_gets_can_be_pickled_for_the_spawn_start_method(recipe):
    plan = TrainingPlan(train_set(recipe).sizes, recipe)
    plan.groups(0)  # fill the caches, which cannot be pickled
    shares = loader._TrainingShares(train_set(recipe), plan, slice(1, 3))
    copy = pickle.loads(pickle.dumps(shares))
    assert all(same(copy[key], shares[key]) for key in ((0, 0), (2, 1)))


@pytest.mark.slow
@pytest.mark.distributed
def test_workers_that_are_spawned_make_the_same_batches(recipe, monkeypatch):
    alone = batches(recipe)
    monkeypatch.setattr(
        loader, "DataLoader", lambda *args, **options: DataLoader(*args, multiprocessing_context="spawn", **options)
    )
    assert all(same(a, b) for a, b in zip(alone, batches(recipe, 1), strict=True))


def test_evaluation_batches_are_whole_groups_without_colour_jitter(recipe):
    dataset = val_set(recipe)
    plan = evaluation_plan(dataset.sizes, recipe)
    plain = list(group_batches(dataset, plan, workers=0, device=CPU))
    assert [batch.image_index for batch in plain] == [tuple(i.index for i in group.images) for group in plan]
    assert all(same(a, b) for a, b in zip(plain, group_batches(dataset, plan, workers=2, device=CPU), strict=True))
    calm = replace(recipe, data=replace(recipe.data, color_jitter=0.0))
    assert all(
        same(a, b) for a, b in zip(plain, group_batches(val_set(calm), plan, workers=0, device=CPU), strict=True)
    )


def test_no_groups_are_no_batches_whatever_the_workers(recipe):
    assert list(group_batches(val_set(recipe), [], workers=2, device=CPU)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_damaged_after_its_header_was_read_is_named(tmp_path, workers):
    write_small_set(tmp_path, "train", 8)
    recipe = small_recipe(tmp_path)
    file = tmp_path / "train" / "5.png"
    file.write_bytes(file.read_bytes()[:200])  # the header is whole, the pixels are not
    with pytest.raises(InputError, match=r"5\.png: cannot be read as an image") as caught:
        batches(recipe, workers)
    assert "\n" not in str(caught.value)
