"""Mosaic: pictures of four images, of the size that the plan gives, the same wherever they are computed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_factories import unpacked_masks
from megdet.data.augment.mosaic import refilled, tile_in, tiles_of
from megdet.data.augment.partners import placed_on
from megdet.data.augment.pasting import NO_MASK, Prepared, put_together
from megdet.data.coco import CocoDataset, training_set
from megdet.data.loader import LoadingFaults, training_batches
from megdet.data.masks import PlacedMask
from megdet.data.plan import TrainingPlan
from megdet.data.planned import PlannedImage, Tile
from megdet.data.transforms import load_batch
from megdet.data.unreadable import without
from megdet.distributed.layout import choose_layout
from megdet.recipe import Data, Recipe
from megdet.structures import Batch
from plans import some_sizes, steps_of
from recipe_refusals import refusal
from small_runs import CPU, small_recipe, write_small_set


def plan_with(mosaic: float, count: int = 23, **data) -> TrainingPlan:
    own = Data(mosaic=mosaic, short_edges=(40, 60), **data)
    return TrainingPlan(some_sizes(count), Recipe(batch_size=8, bn_size=4, plan_window=3, data=own))


MORE = {"crop": (48, 64), "scale_jitter": (0.3, 2.0), "copy_paste": 0.5, "crop_probability": 0.5}


@pytest.mark.parametrize("more", [{}, MORE])
def test_a_mosaic_changes_nothing_else_in_the_plan(more):
    groups = [steps_of(plan_with(part, **more), 0, 20) for part in (0.0, 0.4, 1.0)]
    for plain, some, every in zip(*groups, strict=True):
        assert plain.canvas == some.canvas == every.canvas
        for alone, maybe, mosaic in zip(plain.images, some.images, every.images, strict=True):
            assert alone.tiles == ()
            assert maybe.tiles in ((), mosaic.tiles)
            assert replace(mosaic, tiles=()) == alone
    assert 0.25 < np.mean([image.tiles != () for group in groups[1] for image in group.images]) < 0.55


@pytest.mark.parametrize("more", [{}, MORE])
def test_the_tiles_fill_the_picture_and_the_image_is_one_of_them(more):
    images = [image for group in steps_of(plan_with(1.0, **more), 0, 20) for image in group.images]
    places = Counter[int]()
    for image in images:
        if min(image.size) < 2:
            assert image.tiles == ()
            continue
        filled = np.zeros(image.size, int)
        for tile in image.tiles:
            (top, left), (height, width) = tile.corner, tile.image.size
            filled[top : top + height, left : left + width] += 1
            assert tile.image.crop is not None
            for length, whole, corner in zip(tile.image.size, tile.image.resized, tile.image.crop.corner, strict=True):
                assert 0 <= corner <= whole - length
            assert tile.image.epoch == image.epoch
            assert (tile.image.tiles, tile.image.paste) == ((), None)
        assert (filled == 1).all()
        own = [number for number, tile in enumerate(image.tiles) if tile.image.index == image.index]
        assert len(own) == 1
        places.update(own)
        assert image.tiles[own[0]].image.seed == image.seed
        assert image.tiles[own[0]].image.window == image.window
    assert min(places[number] for number in range(4)) > 20  # 40 on average
    seeds = [tile.image.seed for image in images for tile in image.tiles]
    assert len(set(seeds)) == len(seeds)


@given(*[st.integers(2, 60)] * 4, st.integers(-(2**63), 2**63 - 1))
def test_an_image_covers_its_quarter_and_is_not_larger_than_alone_where_it_need_not(height, width, rows, columns, seed):
    tile = tile_in((1, 2), (rows, columns), PlannedImage(0, 0, seed, (height, width)), 0.2)
    assert tile.corner == (1, 2)
    assert tile.image.size == (rows, columns)
    assert tile.image.crop.least_area == 0.2
    cover = max(rows / height, columns / width)
    for own, whole, quarter in zip((height, width), tile.image.resized, (rows, columns), strict=True):
        assert quarter <= whole
        assert whole <= max(quarter, round(own * max(1.0, cover)))
        assert whole >= round(own * cover) or whole == quarter


def test_a_picture_of_one_pixel_has_no_quarters_and_a_lone_image_has_no_partners():
    data, order = Data(mosaic=1.0), np.arange(1)
    thin = PlannedImage(0, 0, 3, (1, 50))
    assert tiles_of(thin, order, lambda index, seed: replace(thin, index=index, seed=seed), data) == ()
    image = replace(thin, size=(2, 50))
    tiles = tiles_of(image, order, lambda index, seed: replace(image, index=index, seed=seed), data)
    assert [tile.image.index for tile in tiles] == [0] * 4
    assert len({tile.image.seed for tile in tiles}) == 4


def test_parts_are_put_together_with_their_targets_by_hand():
    def part(height, width, value, mask):
        boxes, labels = torch.tensor([[1.0, 0, 2, 2]]), torch.tensor([value])
        return Prepared(torch.full((3, height, width), value, dtype=torch.uint8), boxes, labels, [mask])

    mask = PlacedMask(1, 0, np.ones((2, 1), bool))
    parts = [((0, 0), part(2, 3, 1, mask)), ((0, 3), part(2, 4, 2, NO_MASK))]
    parts += [((2, 0), part(3, 3, 3, mask)), ((2, 3), part(3, 4, 4, mask))]
    found = put_together(parts, (5, 7))
    rows = [[1] * 3 + [2] * 4] * 2 + [[3] * 3 + [4] * 4] * 3
    assert torch.equal(found.pixels, torch.tensor(rows, dtype=torch.uint8).expand(3, -1, -1))
    assert found.boxes.tolist() == [[1, 0, 2, 2], [4, 0, 5, 2], [1, 2, 2, 4], [4, 2, 5, 4]]
    assert found.labels.tolist() == [1, 2, 3, 4]
    assert [(own.x, own.y, own.pixels.size) for own in found.masks][2:] == [(1, 2, 2), (4, 2, 2)]
    assert found.masks[1].pixels.size == 0
    assert found.pixels.permute(1, 2, 0).is_contiguous()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder: Path = tmp_path_factory.mktemp("mosaic")
    write_small_set(folder, "train", 10)
    own = small_recipe(folder)
    return replace(own, data=replace(own.data, color_jitter=0.3, mosaic=0.8, copy_paste=0.4))


def batches(
    recipe: Recipe, dataset: CocoDataset, rank=0, ranks=1, workers=0, first=0
) -> tuple[list[Batch], LoadingFaults]:
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, ranks, ranks)
    faults, plan = LoadingFaults(), TrainingPlan(dataset.sizes, recipe)
    found = training_batches(dataset, plan, layout, rank, (first, 2), workers=workers, device=CPU, faults=faults)
    return list(found), faults


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.image_index == other.image_index
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def test_mosaics_are_the_same_on_every_layout_for_every_worker_from_the_cache_and_from_every_start(recipe, tmp_path):
    dataset = training_set(recipe.data, masks="all")
    one, _ = batches(recipe, dataset)
    kept = replace(recipe, data=replace(recipe.data, cache="decoded", cache_folder=str(tmp_path)))
    for other in (batches(recipe, dataset, workers=2), batches(kept, dataset), batches(kept, dataset)):
        assert_equal(one, other[0])
    assert_equal(one[len(one) // 2 :], batches(recipe, dataset, first=1)[0])
    halves = [batches(recipe, dataset, rank=rank, ranks=2)[0] for rank in range(2)]
    for whole, *parts in zip(one, *halves, strict=True):
        assert torch.equal(whole.pixels, torch.cat([part.pixels for part in parts]))
        labels = [own.tolist() for part in parts for own in part.targets.labels]
        assert [[n for n in own if n >= 0] for own in labels] == [
            [n for n in own if n >= 0] for own in whole.targets.labels.tolist()
        ]


def test_the_targets_of_a_picture_are_those_of_its_parts(recipe):
    dataset = training_set(recipe.data, masks="all")
    plan = TrainingPlan(dataset.sizes, replace(recipe, data=replace(recipe.data, copy_paste=0.0, mosaic=1.0)))
    group = plan.groups(0)[0]
    image = group.images[0]
    batch = load_batch(dataset, [image], group.canvas)
    count = 0
    for tile in image.tiles:
        alone = load_batch(dataset, [tile.image], group.canvas)
        (top, left), (height, width) = tile.corner, tile.image.size
        part = batch.pixels[0, :, top : top + height, left : left + width]
        assert torch.equal(part, alone.pixels[0, :, :height, :width])
        own = int(alone.targets.is_box.sum())
        boxes = alone.targets.boxes[0, :own] + torch.tensor([left, top, left, top])
        assert torch.equal(batch.targets.boxes[0, count : count + own], boxes)
        masks = unpacked_masks(batch)[0][count : count + own, top : top + height, left : left + width]
        assert np.array_equal(masks, unpacked_masks(alone)[0][:own, :height, :width])
        count += own
    assert batch.targets.is_box.sum() == count > 0
    assert batch.image_index == (image.index,)
    assert batch.targets.image_seeds.tolist() == [image.seed]
    assert (batch.targets.boxes[0, :count, 2:] <= torch.tensor([image.size[1], image.size[0]])).all()


def test_a_lost_part_is_replaced_by_the_next_image_alike_on_every_layout(recipe, tmp_path):
    write_small_set(tmp_path, "train", 10)
    own = small_recipe(tmp_path)
    lossy = replace(own, data=replace(recipe.data, train_images=own.data.train_images, unreadable="replace"))
    lossy = replace(lossy, data=replace(lossy.data, train_annotations=own.data.train_annotations, most_replaced=0.3))
    dataset = training_set(lossy.data, masks="all")
    plan = TrainingPlan(dataset.sizes, lossy)
    (Path(lossy.data.train_images) / dataset.file_names[3]).unlink()
    one, faults = batches(lossy, dataset)
    following = {own[(own.index(3) + 1) % 10] for own in (plan.permutation(epoch).tolist() for epoch in range(2))}
    assert {lost.image for lost in faults.replaced} == {3}
    assert {lost.by for lost in faults.replaced} <= following
    assert len(faults.replaced) == sum(3 in image.indices for group in steps_of(plan, 0, 2) for image in group.images)
    halves = [batches(lossy, dataset, rank=rank, ranks=2)[0] for rank in range(2)]
    for whole, *parts in zip(one, *halves, strict=True):
        assert torch.equal(whole.pixels, torch.cat([part.pixels for part in parts]))


def test_all_that_an_unreadable_image_gives_to_a_picture_is_replaced_at_once():
    alone = {index: PlannedImage(index, 0, 70 + index, (40, 40)) for index in range(6)}
    tiles = tuple(
        tile_in(corner, (20, 20), alone[index], 0.3)
        for index, corner in ((0, (0, 0)), (1, (0, 20)), (2, (20, 0)), (1, (20, 20)))
    )
    image = replace(alone[0], tiles=tiles, paste=placed_on(alone[0], alone[1], 0.4))
    assert image.indices == (0, 0, 1, 2, 1, 1)
    left, taken = without(image, 1, lambda _: alone[5])
    assert taken == alone[5]
    assert left.indices == (0, 0, 5, 2, 5, 5)
    assert left.tiles[1] == refilled(tiles[1], alone[5]) == Tile(left.tiles[1].image, (0, 20))
    assert left.tiles[1].image.crop.least_area == 0.3
    assert left.paste == placed_on(image, alone[5], 0.4)
    assert without(image, 0, lambda _: alone[5]) == (alone[5], alone[5])


def test_mosaics_are_not_kept_resized():
    message = refusal("", data__cache="resized", data__mosaic="0.5")
    assert "resizes an image to other sizes in every epoch (data.mosaic): cache decoded" in message
