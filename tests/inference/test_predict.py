import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from factories import SMALL_MASKS, of_kind
from megdet.architecture import MaskRcnn
from megdet.data.classes import category_ids_for
from megdet.data.coco import CocoDataset, load_coco, write_coco
from megdet.data.plan import evaluation_plan
from megdet.data.rle import decode_mask
from megdet.errors import InputError
from megdet.inference import predict
from megdet.inference.predict import detect_dataset, detect_image
from megdet.inference.trained import TrainedDetector, load_detector
from megdet.model.choice import make_detector
from megdet.recipe import Recipe
from megdet.structures import BatchDetections
from small_runs import ALONE, CPU, save_run, small_recipe, val_set, write_small_set

HEIGHT, WIDTH = 50, 75
"""of the test pictures as displayed; resized to 64 x 96, the canvas too"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder: Path = tmp_path_factory.mktemp("predict")
    write_small_set(folder, "val", 5)
    recipe = small_recipe(folder, bn_size=4)
    return replace(recipe, data=replace(recipe.data, short_edges=(32, 64), max_long_edge=200))


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory) -> TrainedDetector:
    return load_detector(save_run(tmp_path_factory.mktemp("run"), recipe)[0], CPU)


@pytest.fixture
def dataset(recipe) -> CocoDataset:
    return val_set(recipe)


def picture() -> np.ndarray:
    """Gray noise with a bright corner on the upper right."""
    pixels = np.random.default_rng(0).integers(0, 90, (HEIGHT, WIDTH), dtype=np.uint8)
    pixels[:20, 50:] = 255
    return pixels


def save(folder: Path, kind: str) -> Path:
    gray = Image.fromarray(picture())
    file = folder / f"{kind}.png"
    if kind == "rgb":
        gray.convert("RGB").save(file)
    elif kind == "gray":
        gray.save(file)
    elif kind == "alpha":
        gray.convert("RGBA").save(file)
    elif kind == "16-bit":
        Image.fromarray(picture().astype(np.uint16) * 257).save(file)
    elif kind == "cmyk":
        file = folder / "cmyk.tif"
        black = Image.fromarray(255 - picture())
        nothing = Image.new("L", gray.size)
        Image.merge("CMYK", (nothing, nothing, nothing, black)).save(file)
    elif kind == "exif":  # stored lying, to be turned a quarter clockwise for display
        exif = Image.Exif()
        exif[0x112] = 6
        gray.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    return file


@pytest.mark.parametrize("kind", ["gray", "alpha", "16-bit", "cmyk", "exif"])
def test_files_of_any_kind_are_detected_as_they_are_displayed(trained, kind, tmp_path):
    expected = detect_image(trained, save(tmp_path, "rgb"))
    results = expected.to_coco()
    assert expected.image.shape == (HEIGHT, WIDTH, 3)
    assert len(results) == 10
    detections = detect_image(trained, save(tmp_path, kind))
    found = detections.to_coco()
    assert np.array_equal(detections.image, expected.image)
    assert [{**result, "image_id": ""} for result in found] == [{**result, "image_id": ""} for result in results]
    assert {result["image_id"] for result in found} == {save(tmp_path, kind).name}


def noise_of(sizes: list[tuple[int, int]], folder: Path) -> CocoDataset:
    """A data set of noise, of these heights and widths."""
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    write_coco(
        folder / "noise.json",
        images=[{"id": n, "file_name": f"{n}.png", "height": h, "width": w} for n, (h, w) in enumerate(sizes)],
        annotations=[],
        categories=[{"id": 10 * n, "name": f"{n}"} for n in (1, 2, 3)],
    )
    return load_coco(folder / "noise.json", folder, keep_empty=True)


def answer(monkeypatch, boxes: list[list[float]], labels: list[int], masks: torch.Tensor | None = None) -> None:
    """Let the detector find these boxes, in pixels of the canvas, with these masks on every image."""

    def detect(_model, pixels, _sizes, _precision):
        count = len(pixels)
        return BatchDetections(
            torch.tensor(boxes).expand(count, -1, -1),
            torch.linspace(0.9, 0.1, len(labels)).expand(count, -1),
            torch.tensor(labels).expand(count, -1),
            None if masks is None else masks.expand(count, -1, -1, -1),
        )

    monkeypatch.setattr(predict, "_detect", detect)


def test_boxes_of_the_canvas_become_pixels_of_the_file_by_hand(trained, tmp_path, monkeypatch):
    answer(monkeypatch, [[9.6, 6.4, 48.0, 64.0], [0, 0, 0, 0]], [1, -1])
    results = detect_image(trained, save(tmp_path, "exif")).to_coco()
    # 75 px became 96 and 50 became 64: 1.28 both ways
    assert results == [{"image_id": "exif.png", "category_id": 20, "bbox": [7.5, 5.0, 30.0, 45.0], "score": 0.9}]


def test_boxes_of_a_data_set_become_pixels_of_each_file_by_hand(trained, dataset, monkeypatch):
    answer(monkeypatch, [[6.4, 3.2, 12.8, 32.0]], [2])
    results = detect_dataset(trained.model, trained.recipe, dataset, [10, 20, 30], ALONE, workers=0)
    assert sorted(result["image_id"] for result in results) == sorted(dataset.image_ids)
    for result in results:
        height, width = dataset.sizes[dataset.image_ids.index(result["image_id"])].tolist()
        scale = 64 / min(height, width)
        x, y = width / round(width * scale), height / round(height * scale)
        assert result["bbox"] == pytest.approx([6.4 * x, 3.2 * y, 6.4 * x, 28.8 * y], abs=1e-3)
        assert result["category_id"] == 30


def test_a_file_is_detected_like_the_same_image_among_others_in_the_evaluation_of_a_data_set(trained, tmp_path):
    sizes = [(50, 75), (75, 50), (50, 70), (64, 64), (50, 75), (60, 64), (75, 48), (50, 99)]
    dataset = noise_of(sizes, tmp_path)
    plan = evaluation_plan(dataset.sizes, trained.recipe)
    assert len(plan) < len(sizes), "some share a canvas"
    assert len({group.canvas for group in plan}) > 2
    results = detect_dataset(trained.model, trained.recipe, dataset, [10, 20, 30], ALONE, workers=0)
    for index, image_id in enumerate(dataset.image_ids):
        expected = detect_image(trained, dataset.image_path(index)).to_coco()
        found = [result for result in results if result["image_id"] == image_id]
        assert len(found) == len(expected) > 0
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["category_id"] == theirs["category_id"]
            assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=2e-3)
            assert ours["score"] == pytest.approx(theirs["score"], abs=2e-6)


def test_masks_are_pasted_at_the_size_of_the_file_by_hand(trained, tmp_path, monkeypatch):
    # finer than the pixels, so that corners are not rounded
    whole, right_half = torch.ones(64, 64), (torch.arange(64) >= 32).float().expand(64, 64)
    # the last is outside of the image: it has a mask too, without a pixel
    boxes = [[12.8, 6.4, 43.52, 64.0], [19.2, 12.8, 25.6, 19.2], [0, 0, 0, 0], [100.0, 70.0, 120.0, 90.0]]
    grids = torch.stack([right_half, whole, whole, whole])
    answer(monkeypatch, boxes, [1, 0, -1, 2], grids.unsqueeze(0))
    results = detect_image(trained, save(tmp_path, "exif")).to_coco()
    assert len(results) == 3
    # 75 px became 96 and 50 became 64: 1.28 both ways
    expected = np.zeros((3, HEIGHT, WIDTH), dtype=bool)
    expected[0, 5:50, 22:34] = True  # of a box from 10 to 34
    expected[1, 10:15, 15:20] = True
    for result, mask in zip(results, expected, strict=True):
        assert result["segmentation"]["size"] == [HEIGHT, WIDTH]
        assert np.array_equal(decode_mask(result["segmentation"]), mask)
    json.dumps(results)


def test_masks_of_a_data_set_are_pasted_at_the_size_of_each_file(trained, dataset, monkeypatch):
    answer(monkeypatch, [[6.4, 3.2, 12.9, 32.0], [0, 0, 30, 30]], [2, 1], torch.ones(1, 2, 64, 64))
    results = detect_dataset(trained.model, trained.recipe, dataset, [10, None, 30], ALONE, workers=0)
    assert len(results) == len(dataset), "a detection of a class without an id is left out with its mask"
    for result in results:
        size = dataset.sizes[dataset.image_ids.index(result["image_id"])].tolist()
        x, y, width, height = result["bbox"]
        mask = decode_mask(result["segmentation"])
        assert mask.shape == tuple(size)
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        assert len(columns) * len(rows) == mask.sum()
        assert (columns[0], rows[0]) == pytest.approx((x, y), abs=0.51)
        assert (columns[-1] + 1, rows[-1] + 1) == pytest.approx((x + width, y + height), abs=0.51)


@pytest.mark.parametrize("is_exact", [True, False])
def test_the_recipe_says_how_masks_are_pasted(trained, dataset, tmp_path, is_exact):
    small = replace(SMALL_MASKS, exact_paste=is_exact)
    with_masks = of_kind(trained.recipe, MaskRcnn, mask_head=small)
    detector = replace(trained, model=make_detector(with_masks, 3).double().eval(), recipe=with_masks)
    assert detector.model.exact_paste == is_exact
    asked = []

    def paste(_masks, _boxes, _size, *, exact):
        asked.append(exact)
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "paste_masks", paste)
        results = detect_image(detector, save(tmp_path, "rgb")).to_coco()
        assert asked == [is_exact]
        results += detect_dataset(detector.model, with_masks, dataset, [10, 20, 30], ALONE, workers=0)
    assert asked == [is_exact] * (1 + len(dataset))
    assert all("segmentation" in result for result in results)


def test_results_without_masks_have_no_segmentation(trained, tmp_path):
    results = detect_image(trained, save(tmp_path, "rgb")).to_coco()
    assert {key for result in results for key in result} == {"image_id", "category_id", "bbox", "score"}


def renamed(dataset: CocoDataset, names: tuple[str, ...], ids: tuple[int, ...]) -> CocoDataset:
    return replace(dataset, class_names=names, category_ids=ids)


def test_classes_are_matched_by_name_and_those_the_data_has_not_are_left_out(trained, dataset):
    fewer = renamed(dataset, ("gear", "bolt"), (4, 9))
    ids = category_ids_for(trained.class_names, fewer)
    assert ids == [9, None, 4]
    every = detect_dataset(trained.model, trained.recipe, dataset, [10, 20, 30], ALONE, workers=0)
    some = detect_dataset(trained.model, trained.recipe, fewer, ids, ALONE, workers=0)
    assert {result["category_id"] for result in every} == {10, 20, 30}
    meaning = {10: 9, 30: 4}
    assert some == [
        {**result, "category_id": meaning[result["category_id"]]} for result in every if result["category_id"] != 20
    ]


def test_a_class_that_the_detector_does_not_know_is_refused_with_the_nearest(trained, dataset):
    with pytest.raises(InputError, match="class 'bolts' is not among the detector's 3 classes; did you mean 'bolt'"):
        category_ids_for(trained.class_names, renamed(dataset, ("bolts", "nut"), (1, 2)))


def test_two_classes_of_one_name_keep_their_ids_in_the_same_data_and_are_refused_in_other(dataset):
    same = renamed(dataset, ("bolt", "bolt", "nut"), (3, 5, 8))
    assert category_ids_for(("bolt", "bolt", "nut"), same) == [3, 5, 8]
    with pytest.raises(InputError, match="two classes are called 'bolt'"):
        category_ids_for(("bolt", "nut"), same)


def test_progress_counts_images(trained, dataset):
    told: list[int] = []
    detect_dataset(trained.model, trained.recipe, dataset, [10, 20, 30], ALONE, workers=0, progress=told.append)
    of_batches = [len(group.images) for group in evaluation_plan(dataset.sizes, trained.recipe)]
    assert told == list(itertools.accumulate(of_batches))
    assert len(told) < told[-1] == 5


def test_a_file_that_is_no_image_is_refused(trained, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InputError, match=r"text\.png: cannot be read as an image"):
        detect_image(trained, tmp_path / "text.png")
