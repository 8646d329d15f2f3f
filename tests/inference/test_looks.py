"""Test-time augmentation: several looks at an image, and one list of detections."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from factories import SMALL_MASKS, masked_batch, of_kind
from megdet.architecture import MaskRcnn
from megdet.data.coco import CocoDataset
from megdet.data.plan import evaluation_plan
from megdet.data.planned import PlannedImage
from megdet.data.rle import decode_mask
from megdet.data.transforms import load_batch
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.inference import predict
from megdet.inference.looks import mirrored_detections, mirrored_pixels, together, within
from megdet.inference.predict import Result, detect_dataset, detect_image
from megdet.inference.trained import TrainedDetector, load_detector
from megdet.recipe import Evaluation, Recipe
from megdet.run_folder.folder import RunFolder
from megdet.structures import BatchDetections
from small_runs import ALONE, CPU, save_run, small_recipe, val_set, write_small_set

IDS = [10, 20, 30]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[RunFolder, Recipe]:
    folder: Path = tmp_path_factory.mktemp("looks")
    write_small_set(folder, "val", 7)
    recipe = small_recipe(folder, bn_size=4)
    recipe = replace(recipe, data=replace(recipe.data, short_edges=(32, 64), max_long_edge=200))
    recipe = of_kind(replace(recipe, precision="float64"), MaskRcnn, mask_head=SMALL_MASKS)
    folder, _ = save_run(tmp_path_factory.mktemp("run"), recipe)
    return folder, recipe


@pytest.fixture(scope="module")
def trained(run) -> TrainedDetector:
    return load_detector(run[0], CPU)


@pytest.fixture
def dataset(run) -> CocoDataset:
    return val_set(run[1])


def looking(trained: TrainedDetector, **keys: Any) -> TrainedDetector:
    recipe = trained.recipe
    return replace(trained, recipe=replace(recipe, evaluation=replace(recipe.evaluation, **keys)))


def found_in(trained: TrainedDetector, dataset: CocoDataset, world: World = ALONE) -> list[Result]:
    return detect_dataset(trained.model, trained.recipe, dataset, IDS, world, workers=0)


def test_one_look_is_what_is_found_without_any_of_it(trained, dataset):
    expected = found_in(trained, dataset)
    assert len(expected) > 20
    others = {"merge": "wbf", "merge_iou": 0.1, "vote_iou": 0.2, "merged_detections": 1}
    assert found_in(looking(trained, scales=(64,), **others), dataset) == expected
    assert found_in(looking(trained, scales=(64,), object_ranges=((0.0, 1e5),)), dataset) == expected
    assert found_in(looking(trained, scales=(48,)), dataset) != expected


def test_mirrored_pixels_and_boxes_are_those_of_training(dataset):
    plain = [PlannedImage(index, 0, 0, size) for index, size in ((0, (40, 50)), (3, (64, 33)))]
    batch = load_batch(dataset, plain, (64, 64))
    wanted = load_batch(dataset, [replace(image, flip_horizontal=True) for image in plain], (64, 64))
    assert torch.equal(mirrored_pixels(batch.pixels, batch.sizes), wanted.pixels)
    assert not torch.equal(batch.pixels, wanted.pixels)
    assert wanted.targets.is_box.any(1).all()
    labels = wanted.targets.labels
    mirrored = mirrored_detections(BatchDetections(wanted.targets.boxes, labels.float(), labels), wanted.sizes)
    torch.testing.assert_close(mirrored.boxes, batch.targets.boxes)


def test_a_mirrored_mask_lies_in_its_mirrored_box():
    batch = masked_batch(2)
    boxes, labels = batch.targets.boxes, batch.targets.labels
    masks = torch.rand(*labels.shape, 4, 4)
    found = BatchDetections(boxes, labels.float(), labels, masks)
    once = mirrored_detections(found, batch.sizes)
    assert once.masks is not None
    assert torch.equal(once.masks[..., 0], masks[..., 3])
    twice = mirrored_detections(once, batch.sizes)
    torch.testing.assert_close(twice.boxes[labels >= 0], boxes[labels >= 0])


def detections(*rows: tuple[list[float], float, int], masks: torch.Tensor | None = None) -> BatchDetections:
    """Those of one image."""
    boxes, scores, labels = zip(*rows, strict=True)
    return BatchDetections(
        torch.tensor([boxes], dtype=torch.float64),
        torch.tensor([scores], dtype=torch.float64),
        torch.tensor([labels]),
        None if masks is None else masks.unsqueeze(0),
    )


def test_boxes_of_two_looks_and_their_masks_vote_by_hand():
    # an 8 pixel grid over 8 pixels; the second look's object begins two pixels further to the right
    left, right = torch.ones(8, 8), torch.ones(8, 8)
    left[:, 4:] = 0
    right[:, 4:] = 0
    nothing = torch.zeros(8, 8)
    first = detections(([0, 0, 8, 8], 0.75, 1), ([0, 0, 8, 8], 0.5, 0), masks=torch.stack([left, nothing]))
    second = detections(([2, 0, 10, 8], 0.25, 1), ([0, 0, 0, 0], 0.9, -1), masks=torch.stack([right, nothing]))
    found = together([first, second], Evaluation())
    assert found.labels.tolist() == [[1, 0]]
    assert found.scores.tolist() == [[0.75, 0.5]]
    assert found.boxes[0].tolist() == [[0.5, 0, 8.5, 8], [0, 0, 8, 8]]
    assert found.masks is not None
    # centres of the voted box's cells lie half a pixel behind those of the first box and 1.5 before the second's
    expected = 0.75 * np.array([1, 1, 1, 0.5, 0, 0, 0, 0]) + 0.25 * np.array([0, 0.5, 1, 1, 1, 0.5, 0, 0])
    np.testing.assert_allclose(found.masks[0, 0, 3].numpy(), expected, atol=1e-6)
    kept = together([first, second], Evaluation(merge="nms"))
    assert kept.boxes[0, 0].tolist() == [0, 0, 8, 8]
    assert kept.masks is not None
    torch.testing.assert_close(kept.masks[0, 0], left)
    assert together([first, second], Evaluation(merged_detections=1)).labels.tolist() == [[1]]
    fused = together([first, second], Evaluation(merge="wbf"))
    assert fused.scores[0].tolist() == pytest.approx([0.5, 0.25]), "the second object was seen once of two times"
    soft = together([first, second], Evaluation(merge="soft-nms"))
    assert soft.scores[0].tolist() == pytest.approx([0.75, 0.5, 0.25 * (1 - 6 / 10)])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_detector_of_any_precision_may_look_several_times(run, dataset, precision):
    single = load_detector(run[0], CPU, {"precision": precision})
    found = found_in(looking(single, flip=True, merge="vote"), dataset)
    assert len(found) > 20
    assert found != found_in(single, dataset)


def test_images_in_which_nothing_is_found_stay_empty():
    nothing = BatchDetections(
        torch.zeros(2, 3, 4).double(), torch.zeros(2, 3), torch.full((2, 3), -1), torch.zeros(2, 3, 4, 4)
    )
    found = together([nothing, nothing], Evaluation())
    assert found.boxes.shape == (2, 0, 4)
    assert found.masks is not None
    assert found.masks.shape == (2, 0, 4, 4)


def test_objects_outside_their_range_do_not_count():
    found = detections(([0, 0, 9, 4], 0.9, 1), ([0, 0, 10, 10], 0.8, 0), ([0, 0, 90, 40], 0.7, 2))
    assert within(found, (6.0, 60.0)).labels.tolist() == [[1, 0, -1]]
    assert within(found, (6.1, 10.0)).labels.tolist() == [[-1, -1, -1]], "the root of 9 x 4 is 6"


def test_each_scale_counts_the_sizes_of_its_range_in_pixels_of_the_file(trained, dataset):
    ranges = ((20.0, 1e5), (0.0, 20.0))
    every = found_in(looking(trained, scales=(32, 96), merge="nms", merge_iou=1.0), dataset)
    some = found_in(looking(trained, scales=(32, 96), merge="nms", merge_iou=1.0, object_ranges=ranges), dataset)
    large, small = (
        found_in(looking(trained, scales=(edge,), object_ranges=(own,)), dataset)
        for edge, own in zip((32, 96), ranges, strict=True)
    )
    assert len(large) > 5 < len(small)
    assert all(result["bbox"][2] * result["bbox"][3] > 399 for result in large)
    assert all(result["bbox"][2] * result["bbox"][3] < 401 for result in small)
    assert key_of(some) == key_of(large + small)
    assert len(every) > len(some)


def key_of(results: list[Result]) -> list[Any]:
    return sorted((result["image_id"], result["category_id"], result["bbox"], result["score"]) for result in results)


def test_an_image_has_the_same_companions_at_every_scale(dataset, run):
    recipe = replace(run[1], evaluation=Evaluation(batch_size=2, scales=(64, 32, 96)))
    sizes = np.concatenate([dataset.sizes, dataset.sizes])
    plan = evaluation_plan(sizes, recipe)
    groups = [plan[start : start + 3] for start in range(0, len(plan), 3)]
    assert any(len(group.images) > 1 for group in plan)
    for own in groups:
        assert len({tuple(image.index for image in group.images) for group in own}) == 1
        assert [min(group.images[0].size) for group in own] == [64, 32, 96]
    assert sorted(image.index for own in groups for image in own[0].images) == list(range(len(sizes)))


def mirror_of(file: Path, folder: Path) -> Path:
    """Of the same name, in the folder."""
    pixels = np.asarray(Image.open(file).convert("RGB"))
    Image.fromarray(pixels[:, ::-1]).save(folder / file.name)
    return folder / file.name


@pytest.mark.parametrize("merge", ["vote", "wbf", "gaussian-soft-nms"])
def test_a_mirrored_image_has_mirrored_detections_and_masks(trained, dataset, tmp_path, merge):
    twice = looking(trained, scales=(64,), flip=True, merge=merge)
    file = dataset.image_path(1)
    (_, width), mirrored = dataset.sizes[1].tolist(), mirror_of(file, tmp_path)
    once = detect_image(trained, file).to_coco()
    turned_once = detect_image(trained, mirrored).to_coco()
    assert sorted(r["bbox"][1] for r in once) != sorted(r["bbox"][1] for r in turned_once), "without it they are others"
    found, turned = detect_image(twice, file).to_coco(), detect_image(twice, mirrored).to_coco()
    assert len(found) == len(turned) > 10
    for ours, theirs in zip(found, turned, strict=True):
        x, y, w, h = theirs["bbox"]
        assert ours["bbox"] == pytest.approx([width - x - w, y, w, h], abs=2e-3)
        assert ours["score"] == pytest.approx(theirs["score"], abs=2e-6)
        assert ours["category_id"] == theirs["category_id"]
        a, b = decode_mask(ours["segmentation"]), decode_mask(theirs["segmentation"])[:, ::-1]
        assert (a != b).mean() < 0.01


def test_what_is_found_in_a_symmetric_image_is_symmetric(trained, tmp_path, monkeypatch):
    """A toy detector of bright pixels that is a pixel off to the right."""
    pixels = np.zeros((64, 96), np.uint8)
    pixels[10:30, 40:56] = 255
    Image.fromarray(pixels).save(tmp_path / "symmetric.png")

    def detect(_model, pixels, _sizes, _precision):
        ys, xs = (pixels[0, 0] > 128).nonzero(as_tuple=True)
        return detections(([xs.min() + 1, ys.min(), xs.max() + 2, ys.max() + 1], 0.5, 1), masks=torch.ones(1, 64, 64))

    monkeypatch.setattr(predict, "_detect", detect)
    (once,) = detect_image(trained, tmp_path / "symmetric.png").to_coco()
    assert once["bbox"] == [41, 10, 16, 20]
    (twice,) = detect_image(looking(trained, flip=True), tmp_path / "symmetric.png").to_coco()
    assert twice["bbox"] == [40, 10, 16, 20]
    mask = decode_mask(twice["segmentation"])
    assert np.array_equal(mask, mask[:, ::-1])
    assert mask.sum() == 16 * 20


LOOKS = {"scales": (64, 32, 96), "flip": True}


def detect_with_looks(world: World, folder: Path, recipe: Recipe) -> list[Result]:
    return found_in(looking(load_detector(RunFolder(folder), world.device), **LOOKS), val_set(recipe), world)


@pytest.mark.distributed
def test_two_ranks_find_the_same_with_all_looks_and_a_file_alone_too(run, trained, dataset):
    expected = found_in(looking(trained, **LOOKS), dataset)
    assert expected != found_in(trained, dataset)
    for found in run_in_ranks(detect_with_looks, 2, run[0].path, run[1]):
        assert found == expected
    for index, image_id in enumerate(dataset.image_ids[:2]):
        alone = detect_image(looking(trained, **LOOKS), dataset.image_path(index)).to_coco()
        own = [result for result in expected if result["image_id"] == image_id]
        assert len(own) == len(alone) > 5
        for ours, theirs in zip(own, alone, strict=True):
            assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=2e-3)
