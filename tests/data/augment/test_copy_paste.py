"""Copy-paste: the plan draws partners and places, and the result is the same wherever it is computed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_factories import unpacked_masks
from megdet.data.augment.partners import drawn_objects, placed_on
from megdet.data.augment.pasting import NO_MASK, Prepared, pasted
from megdet.data.coco import CocoDataset, training_set
from megdet.data.loader import LoadingFaults, training_batches
from megdet.data.masks import PlacedMask
from megdet.data.plan import TrainingPlan
from megdet.data.planned import PlannedImage
from megdet.data.sampling.frequencies import training_plan
from megdet.data.transforms import load_batch
from megdet.data.unreadable import without
from megdet.distributed.layout import choose_layout
from megdet.errors import InputError
from megdet.recipe import Data, Recipe
from megdet.structures import Batch
from plans import some_sizes, steps_of
from small_runs import CPU, small_recipe, train_set, write_small_set


def plan_with(copy_paste: float, **data) -> TrainingPlan:
    own = Data(copy_paste=copy_paste, short_edges=(40, 60), **data)
    return TrainingPlan(some_sizes(23), Recipe(batch_size=8, bn_size=4, plan_window=3, data=own))


@pytest.mark.parametrize("more", [{}, {"crop": (48, 64), "scale_jitter": (0.3, 2.0), "vertical_flip": 0.5}])
def test_partners_change_nothing_else_in_the_plan(more):
    groups = [steps_of(plan_with(part, **more), 0, 20) for part in (0.0, 0.3, 1.0)]
    for plain, some, every in zip(*groups, strict=True):
        assert plain.canvas == some.canvas == every.canvas
        for without_it, maybe, with_it in zip(plain.images, some.images, every.images, strict=True):
            assert without_it.paste is None
            assert replace(with_it, paste=None) == replace(maybe, paste=None) == without_it
            assert with_it.paste is not None
            assert maybe.paste in (None, with_it.paste)
            assert with_it.paste.source.index != with_it.index
            assert with_it.paste.source.epoch == with_it.epoch
            assert with_it.paste.source.paste is None
    pastes = [image.paste for group in groups[1] for image in group.images]
    assert 0.15 < np.mean([paste is not None for paste in pastes]) < 0.45  # 160 images
    seeds = [image.paste.source.seed for group in groups[2] for image in group.images]
    assert len(set(seeds)) == len(seeds)
    assert len({image.paste.source.index for group in groups[2] for image in group.images}) == 23


@given(*[st.integers(1, 30)] * 4, st.integers(-(2**63), 2**63 - 1))
def test_one_picture_lies_in_the_other_on_either_axis(height, width, own_height, own_width, seed):
    image, source = PlannedImage(0, 0, 1, (height, width)), PlannedImage(1, 0, seed, (own_height, own_width))
    corner = placed_on(image, source, 0.1).corner
    for place, length, own in zip(corner, (height, width), (own_height, own_width), strict=True):
        assert min(0, length - own) <= place <= max(0, length - own)


def test_partners_come_as_often_as_their_weight_says(tmp_path, cache_folder):
    write_small_set(tmp_path, "train", 10)
    table = tmp_path / "weights.csv"
    table.write_text("file_name,weight\n" + "".join(f"{n}.png,{6 if n == 4 else 1}\n" for n in range(10)))
    recipe = small_recipe(tmp_path)
    recipe = replace(recipe, data=replace(recipe.data, image_weights=str(table), copy_paste=1.0))
    plan = training_plan(training_set(recipe.data, masks="none"), recipe)
    images = [image for group in steps_of(plan, 0, 50) for image in group.images]
    counts = np.bincount([image.paste.source.index for image in images if image.index != 4], minlength=10)
    assert counts[4] > 3 * np.delete(counts, 4).max()
    assert all(image.paste.source.index != 4 for image in images if image.index == 4)


def test_a_data_set_of_one_image_has_no_partner():
    plan = TrainingPlan(np.array([[30, 40]]), Recipe(batch_size=1, bn_size=1, data=Data(copy_paste=1.0)))
    assert plan.groups(0)[0].images[0].paste is None


@pytest.mark.parametrize("places", [[], [3], [0, 1, 2, 5]])
def test_some_objects_are_drawn_at_least_one_and_each_as_often(places):
    drawn = [drawn_objects(seed, places) for seed in range(2000)]
    assert all(own for own in drawn) or not places
    counts = [sum(place in own for own in drawn) / 2000 for place in places]
    least = (
        0.5 + 0.5 / len(places) * 0.5 ** (len(places) - 1) if places else 0.0
    )  # chosen though all are above one half
    assert counts == pytest.approx([least] * len(places), abs=0.05)


def whole(mask: PlacedMask, size: tuple[int, int]) -> np.ndarray:
    found = np.zeros(size, bool)
    height, width = mask.pixels.shape
    found[mask.y : mask.y + height, mask.x : mask.x + width] = mask.pixels
    return found


def prepared(size, *objects, value=0, first_label=0) -> Prepared:
    """A picture of one value with objects: boxes that are filled, as (x1, y1, x2, y2)."""
    masks = [PlacedMask(x1, y1, np.ones((y2 - y1, x2 - x1), bool)) for x1, y1, x2, y2 in objects]
    boxes = torch.tensor(objects, dtype=torch.float32).reshape(-1, 4)
    labels = torch.arange(len(objects)) + first_label
    return Prepared(torch.full((3, *size), value, dtype=torch.uint8), boxes, labels, masks)


def test_objects_are_pasted_at_the_place_and_hide_what_is_below_by_hand():
    image = prepared((20, 30), (0, 0, 10, 10), (20, 10, 30, 20), (12, 2, 16, 6), value=9)
    source = prepared((10, 12), (0, 0, 6, 6), (8, 8, 12, 10), value=200, first_label=7)
    found = pasted(image, source, (1, 11), 0.1)  # pasted to 11..17, 1..7 and 19..23, 9..11
    expected = torch.full((20, 30), 9)
    expected[1:7, 11:17] = expected[9:11, 19:23] = 200
    assert torch.equal(found.pixels, expected.to(torch.uint8).expand(3, -1, -1))
    assert found.labels.tolist() == [0, 1, 7, 8]  # the third object is hidden
    boxes = [[0, 0, 10, 10], [20, 10, 30, 20], [11, 1, 17, 7], [19, 9, 23, 11]]
    assert found.boxes.tolist() == boxes  # a corner of the second is hidden, no whole side
    assert whole(found.masks[1], (20, 30)).sum() == 100 - 3


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_pixels_of_any_type_and_layout_are_pasted(kind):
    random = torch.Generator().manual_seed(0)
    image, source = prepared((12, 16)), prepared((12, 16), (3, 2, 9, 7))
    plain = [torch.randint(0, 256, (3, 12, 16), generator=random).to(kind) for _ in range(2)]
    expected = plain[0].clone()
    expected[:, 3:8, 5:11] = plain[1][:, 2:7, 3:9]
    layouts = (torch.Tensor.clone, lambda own: own.permute(1, 2, 0).contiguous().permute(2, 0, 1).clone())
    for below in layouts:
        for above in (*layouts, lambda own: own.flip(2).contiguous().flip(2)):
            image.pixels, source.pixels = below(plain[0]), above(plain[1])
            assert torch.equal(pasted(image, source, (1, 2), 0.1).pixels, expected)


def test_a_box_shrinks_by_what_is_hidden_of_a_whole_side_of_its_mask():
    image = prepared((20, 30), (10, 5, 20, 15))
    image.boxes[0] += torch.tensor([-0.25, 0.25, 0.5, -0.5])  # as a person drew it
    found = pasted(image, prepared((20, 30), (0, 0, 14, 20), value=1), (0, 0), 0.1)
    assert found.boxes[0].tolist() == [13.75, 5.25, 20.5, 14.5]
    assert found.boxes[1].tolist() == [0, 0, 14, 20]


@pytest.mark.parametrize(("least", "labels"), [(0.0, [0, 1]), (0.2, [0, 1]), (0.21, [1]), (1.0, [1])])
def test_what_is_hidden_too_much_is_no_target(least, labels):
    image = prepared((10, 20), (0, 0, 10, 10))
    found = pasted(image, prepared((10, 20), (0, 0, 8, 10), first_label=1), (0, 0), least)
    assert found.labels.tolist() == labels


@pytest.mark.parametrize(("least", "labels"), [(0.0, [0]), (0.3, [0]), (0.31, [])])
def test_what_lies_outside_of_the_image_too_much_is_not_pasted(least, labels):
    image = prepared((10, 10))
    found = pasted(image, prepared((10, 20), (7, 0, 17, 10), (0, 0, 3, 3), value=5), (0, -14), least)
    assert found.labels.tolist() == labels
    assert found.boxes.tolist() == [[0, 0, 3, 10]] * len(labels)
    assert int((found.pixels == 5).sum()) == 3 * 30 * len(labels)


def test_an_object_without_a_mask_is_the_rectangle_of_its_box():
    image, source = prepared((10, 20), (0, 0, 10, 10)), prepared((10, 20), (2, 0, 12, 10), value=3)
    image.masks, source.masks, source.boxes = [NO_MASK], [NO_MASK], source.boxes + 0.25
    found = pasted(image, source, (0, 0), 0.1)
    assert (found.pixels[0] == 3).sum() == 10 * 10
    assert found.boxes.tolist() == [[0, 0, 2, 10], [2.25, 0.25, 12.25, 10]]


_corner = st.tuples(st.integers(-12, 12), st.integers(-12, 12))


@st.composite
def _numbers(draw) -> tuple[tuple[int, int], list[tuple[int, int, int, int]], int]:
    """Size, boxes and a seed; the pictures are made in the test, since the type checker draws random numbers."""
    height, width = draw(st.integers(6, 24)), draw(st.integers(6, 24))
    box = st.tuples(st.integers(0, width - 5), st.integers(0, height - 5), st.integers(1, 5), st.integers(1, 5))
    boxes = [(x, y, x + w, y + h) for x, y, w, h in draw(st.lists(box, max_size=4))]
    return (height, width), boxes, draw(st.integers(0, 99))


def picture(size: tuple[int, int], boxes: list[tuple[int, int, int, int]], seed: int, value: int) -> Prepared:
    """Objects with holes in their masks, each of at least one pixel."""
    random, made = np.random.default_rng(seed), prepared(size, *boxes, value=value)
    for place, mask in enumerate(made.masks):
        pixels = random.random(mask.pixels.shape) < 0.7
        pixels[0, 0] = True
        made.masks[place] = PlacedMask(mask.x, mask.y, pixels)
    return made


@given(_numbers(), _numbers(), _corner, st.sampled_from([0.0, 0.1, 0.6]))
def test_pasting_is_what_whole_masks_on_the_canvas_give(below, above, corner, least):
    image, source = picture(*below, 1), picture(*above, 2)
    size = tuple(image.pixels.shape[1:])
    shift = np.zeros((80, 80), bool)

    def on_image(mask: PlacedMask) -> np.ndarray:
        room = shift.copy()
        room[20 + corner[0] : 44 + corner[0], 20 + corner[1] : 44 + corner[1]] = whole(mask, (24, 24))
        return room[20 : 20 + size[0], 20 : 20 + size[1]]

    old = [whole(mask, size) for mask in image.masks]
    new = [on_image(mask) for mask in source.masks]
    is_new = [own.any() and own.sum() >= least * mask.pixels.sum() for own, mask in zip(new, source.masks, strict=True)]
    new = [own for own, is_own in zip(new, is_new, strict=True) if is_own]
    cover = np.logical_or.reduce([np.zeros(size, bool), *new])
    left = [own & ~cover for own in old]
    is_left = [(own & ~cover).any() and (own & ~cover).sum() >= least * own.sum() for own in old]
    found = pasted(image, source, corner, least)
    assert np.array_equal(found.pixels[0].numpy(), np.where(cover, 2, 1))
    masks = [own for own, is_own in zip(left, is_left, strict=True) if is_own] + new
    # a box that is as small as its hidden part has no area left
    assert len(found.masks) == len(found.boxes) == len(found.labels) <= len(masks)
    if len(found.masks) == len(masks):
        assert all(np.array_equal(whole(own, size), mask) for own, mask in zip(found.masks, masks, strict=True))
    assert ((found.boxes[:, 2:] - found.boxes[:, :2]) > 0).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, 2:] <= torch.tensor([size[1], size[0]])).all()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder: Path = tmp_path_factory.mktemp("paste")
    write_small_set(folder, "train", 10)
    write_small_set(folder, "val", 3, seed=1)
    own = small_recipe(folder)
    return replace(own, data=replace(own.data, color_jitter=0.3, copy_paste=0.8))


def batches(recipe: Recipe, dataset: CocoDataset, **how) -> tuple[list[Batch], LoadingFaults]:
    given_ = {"rank": 0, "ranks": 1, "workers": 0, "steps": (0, 3)} | how
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, given_["ranks"], given_["ranks"])
    faults, plan = LoadingFaults(), training_plan(dataset, recipe)
    place = (layout, given_["rank"], given_["steps"])
    return list(training_batches(dataset, plan, *place, workers=given_["workers"], device=CPU, faults=faults)), faults


def images_of(found: list[Batch]) -> list[tuple]:
    """Pixels, boxes, labels and masks of each image, cut to what is not padding."""
    rows = []
    for batch in found:
        masks = [None] * len(batch.sizes) if batch.targets.masks is None else unpacked_masks(batch)
        for i, (height, width) in enumerate(batch.sizes.tolist()):
            is_box = batch.targets.is_box[i]
            own = None if masks[i] is None else masks[i][is_box.numpy(), :height, :width].tolist()
            targets = batch.targets.boxes[i][is_box].tolist(), batch.targets.labels[i][is_box].tolist()
            rows.append((batch.image_index[i], batch.pixels[i, :, :height, :width].tolist(), *targets, own))
    return rows


@pytest.mark.parametrize("use", ["none", "all"])
def test_the_same_images_come_out_of_every_layout_every_number_of_workers_and_every_start(recipe, use):
    dataset = training_set(recipe.data, masks=use)
    one = images_of(batches(recipe, dataset)[0])
    assert any(own[4] is not None for own in one) == (use == "all")
    assert images_of(batches(recipe, dataset, workers=2)[0]) == one
    assert images_of(batches(recipe, dataset, steps=(1, 3))[0]) == one[8:]
    halves = [images_of(batches(recipe, dataset, rank=rank, ranks=2)[0]) for rank in range(2)]
    assert sorted(halves[0] + halves[1], key=str) == sorted(one, key=str)
    plain = images_of(batches(replace(recipe, data=replace(recipe.data, copy_paste=0.0)), dataset)[0])
    others = [a != b for a, b in zip(one, plain, strict=True)]
    assert 0.5 < np.mean(others) <= 1
    assert [own[0] for own in one] == [own[0] for own in plain]


def test_a_detector_of_boxes_gets_the_boxes_of_pasted_masks_and_no_masks(recipe):
    of_boxes, of_masks = (training_set(recipe.data, masks=use) for use in ("none", "all"))
    assert not of_boxes.has_mask_targets
    assert of_masks.has_mask_targets
    ours, theirs = (images_of(batches(recipe, own)[0]) for own in (of_boxes, of_masks))
    assert [own[:4] for own in ours] == [own[:4] for own in theirs]
    assert not training_set(replace(recipe.data, copy_paste=0.0), masks="none").annotations.segmentations


def test_data_without_masks_paste_rectangles(recipe):
    dataset = train_set(recipe, with_masks=False)
    found, _ = batches(recipe, dataset)
    assert all(batch.targets.masks is None for batch in found)
    counts = [sum(int(b.targets.is_box.sum()) for b in own) for own in (found, batches(_plain(recipe), dataset)[0])]
    assert counts[0] > 1.2 * counts[1]


def _plain(recipe: Recipe) -> Recipe:
    return replace(recipe, data=replace(recipe.data, copy_paste=0.0))


@pytest.mark.parametrize("kind", ["decoded", "resized"])
def test_kept_images_are_pasted_as_those_that_are_read(recipe, tmp_path, kind):
    if kind == "resized":
        recipe = replace(recipe, data=replace(recipe.data, short_edges=(48,)))
    kept = replace(recipe, data=replace(recipe.data, cache=kind, cache_folder=str(tmp_path)))
    dataset = training_set(recipe.data, masks="all")
    one = images_of(batches(recipe, dataset)[0])
    for _ in range(2):
        assert images_of(batches(kept, dataset)[0]) == one
    assert list(tmp_path.rglob("*.pixels"))


def test_a_lost_partner_is_replaced_by_the_next_image_alike_on_every_layout(tmp_path):
    write_small_set(tmp_path, "train", 10)
    small = small_recipe(tmp_path)
    recipe = replace(small, data=replace(small.data, copy_paste=1.0, unreadable="replace", most_replaced=0.3))
    dataset = training_set(recipe.data, masks="all")
    plan = training_plan(dataset, recipe)
    (Path(recipe.data.train_images) / dataset.file_names[3]).unlink()
    one, faults = batches(recipe, dataset)
    order = [plan.permutation(epoch).tolist() for epoch in range(3)]
    following = {own[(own.index(3) + 1) % 10] for own in order}
    assert {lost.image for lost in faults.replaced} == {3}
    assert {lost.by for lost in faults.replaced} <= following
    times = sum(3 in image.indices for group in steps_of(plan, 0, 3) for image in group.images)
    assert len(faults.replaced) == times > 3
    halves = [images_of(batches(recipe, dataset, rank=rank, ranks=2)[0]) for rank in range(2)]
    assert sorted(halves[0] + halves[1], key=str) == sorted(images_of(one), key=str)
    stopped = replace(recipe, data=replace(recipe.data, unreadable="stop"))
    with pytest.raises(InputError, match=r"3\.png: no such image file"):
        batches(stopped, dataset)


def test_of_an_image_and_its_partner_the_lost_one_is_replaced():
    source, other = PlannedImage(5, 0, 77, (30, 30)), PlannedImage(6, 0, 78, (10, 44))
    image = replace(PlannedImage(4, 0, 76, (20, 40)), paste=placed_on(PlannedImage(4, 0, 76, (20, 40)), source, 0.3))
    assert without(image, 4, lambda _: other) == (other, other)
    left, taken = without(image, 5, lambda own: other if own == source else image)
    assert taken == other
    assert left.paste == placed_on(image, other, 0.3)
    assert replace(left, paste=image.paste) == image


def test_an_image_without_objects_gets_those_of_its_partner_and_crowds_are_left(tmp_path, cache_folder):
    write_small_set(tmp_path, "train", 2, same_size=True)
    dataset = training_set(small_recipe(tmp_path).data, masks="all")
    table = dataset.annotations
    table.is_crowd[: table.counts[0]] = True
    image = PlannedImage(0, 0, 1, (64, 64))
    batch = load_batch(
        dataset, [replace(image, paste=placed_on(image, PlannedImage(1, 0, 2, (64, 64)), 0.1))], (64, 64)
    )
    chosen = drawn_objects(2, range(int(table.counts[1])))
    boxes = table[1].boxes[chosen]
    assert batch.targets.boxes[0, : len(boxes)].numpy() == pytest.approx(boxes)
    reverse = load_batch(
        dataset, [replace(PlannedImage(1, 0, 1, (64, 64)), paste=placed_on(image, image, 0.1))], (64, 64)
    )
    assert reverse.targets.is_box.sum() == table.counts[1]
