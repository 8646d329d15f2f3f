import json
import pickle
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_factories import (
    SHARED_DATA,
    box_row,
    coco_mask,
    image_row,
    needs_shared_data,
    two_images,
    with_masks,
    write_set,
)
from megdet.data import segmentations
from megdet.data.coco import load_coco, training_set, validation_set
from megdet.data.columns import read_columns
from megdet.data.rle import pixels_of_runs
from megdet.data.segmentations import segmentation_fault
from megdet.errors import InputError
from megdet.recipe import Data
from megdet.training.datasets import fingerprint

pytestmark = pytest.mark.usefixtures("cache_folder")


def load(files, *, asked=True, keep_empty=True):
    return load_coco(*files, keep_empty=keep_empty, with_masks=asked)


def values_of(dataset, index):
    return [
        ([p.tolist() for p in one.polygons], one.runs.tolist()) for one in dataset.annotations.segmentations_of(index)
    ]


def test_polygons_and_runs_are_those_of_the_boxes_of_each_image(tmp_path):
    document = with_masks(two_images())
    document["annotations"][0]["segmentation"].append([0, 0, 5, 0.5, 5, 5, 0, 5])
    dataset = load(write_set(tmp_path, document))
    assert values_of(dataset, 0) == [([[[5, 5], [13, 5], [5, 13]]], [])]
    assert values_of(dataset, 1) == [
        ([[[1, 2], [11, 2], [1, 22]], [[0, 0], [5, 0.5], [5, 5], [0, 5]]], []),
        ([], [30, 30, 1140]),
    ]


def test_compressed_runs_are_read_like_plain_ones(tmp_path):
    document = with_masks(two_images())
    document["annotations"][1]["segmentation"] = {"size": [30, 40], "counts": "n0n0dS1"}
    plain = {"size": [30, 40], "counts": [30, 30, 1140]}
    dataset = load(write_set(tmp_path, document))
    assert values_of(dataset, 0) == [([], [30, 30, 1140])]
    assert np.array_equal(pixels_of_runs(np.array([30, 30, 1140]), 30, 40), coco_mask(plain, (30, 40), (30, 40)))


def test_masks_stay_with_their_boxes_where_boxes_and_images_are_left_out(tmp_path):
    document = two_images()
    document["images"].insert(0, image_row(5, "empty.jpg"))
    document["annotations"].insert(1, box_row(20, 3, 4, [3, 3, 0, 9]))
    document["annotations"].insert(0, box_row(21, 5, 4, [50, 3, 9, 9]))
    dataset = load(write_set(tmp_path, with_masks(document)), keep_empty=False)
    assert dataset.annotations[1].annotation_ids == (11, 13)
    assert values_of(dataset, 0) == [([[[5, 5], [13, 5], [5, 13]]], [])]
    assert values_of(dataset, 1)[0] == ([[[1, 2], [11, 2], [1, 22]]], [])


def test_who_does_not_ask_for_masks_neither_reads_nor_checks_them(tmp_path, cache_folder, monkeypatch):
    document = with_masks(two_images())
    document["annotations"][0]["segmentation"] = "nonsense"
    files = write_set(tmp_path, document)
    monkeypatch.setattr(segmentations, "parse", None)
    assert load(files, asked=False).annotations.segmentations is None
    assert not list(cache_folder.glob("masks-*"))
    with pytest.raises(ValueError, match="read without masks"):
        load(files, asked=False).annotations.segmentations_of(0)


def test_masks_are_parsed_once_and_then_mapped_from_a_file_of_their_own(tmp_path, cache_folder, monkeypatch):
    files = write_set(tmp_path, with_masks(two_images()))
    first = load(files)
    for name in ("parse", "segmentations.parse"):
        monkeypatch.setattr(f"megdet.data.coco_file.{name}", None)
    second = load(files)
    (cache,) = cache_folder.glob("masks-*")
    for dataset in (first, second):
        array = dataset.annotations.segmentations.vertices
        while array is not None and not isinstance(array, np.memmap):
            array = array.base
        assert Path(array.filename) == cache
        assert values_of(dataset, 1) == values_of(first, 1)


def test_masks_that_are_asked_for_later_are_read_then_and_those_of_a_changed_file_anew(tmp_path):
    file, images = write_set(tmp_path, with_masks(two_images()))
    load((file, images), asked=False)
    assert values_of(load((file, images)), 0)[0][0][0][1] == [13, 5]
    file.write_text(file.read_text().replace("[5, 5, 13, 5,", "[5, 5, 12, 5,"))
    assert values_of(load((file, images)), 0)[0][0][0][1] == [12, 5]


def test_without_a_cache_masks_are_held_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    files = write_set(tmp_path, with_masks(two_images()))
    expected = values_of(load(files), 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    dataset = load(files)
    assert dataset.annotations.segmentations.file is None
    assert values_of(pickle.loads(pickle.dumps(dataset)), 1) == values_of(dataset, 1) == expected


def test_another_process_gets_the_place_of_the_file_and_all_of_it_only_where_that_has_gone(tmp_path, cache_folder):
    document = with_masks(two_images())
    document["annotations"][0]["segmentation"] = [[float(n % 30) for n in range(6000)]]
    dataset = load(write_set(tmp_path, document))
    table = dataset.annotations
    assert len(pickle.dumps(table)) < 6000
    assert values_of(pickle.loads(pickle.dumps(dataset)), 1) == values_of(dataset, 1)
    (cache,) = cache_folder.glob("masks-*")
    cache.unlink()
    whole = pickle.dumps(dataset)
    assert len(whole) > 24_000
    assert values_of(pickle.loads(whole), 1) == values_of(dataset, 1)


def test_a_damaged_cache_is_made_anew(tmp_path, cache_folder):
    files = write_set(tmp_path, with_masks(two_images()))
    expected = values_of(load(files), 1)
    (cache,) = cache_folder.glob("masks-*")
    whole, (columns, notes) = cache.read_bytes(), read_columns(cache)
    for content in (b"", whole[:-4], whole[:-4] + b"abcd"):
        cache.unlink()  # a mapped file is replaced, never written to
        cache.write_bytes(content)
        assert values_of(load(files), 1) == expected
        again, its_notes = read_columns(cache)
        assert its_notes == notes
        assert all(np.array_equal(again[name], columns[name]) for name in columns)


POLYGON = [1, 1, 9, 1, 9, 9]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1, 1, 9, 1]], r"a polygon \[1, 1, 9, 1\] of 2 points, it takes 3"),
        ([POLYGON, []], r"a polygon \[\] of 0 points"),
        ([[*POLYGON, 3]], r"a polygon .* of 7 numbers: x and y must be pairs"),
        ([[1, 1, 9, 1, 9, 1e31]], "with a value that is not a finite number"),
        ([[1, 1, 9, 1, 9, "9"]], "with a value that is not a finite number"),
        ([[1, 1, 9, 1, 9, True]], "with a value that is not a finite number"),
        ([[1, 1, 9, 1, 9, None]], "with a value that is not a finite number"),
        ([[0, 0, 1, *[40, 0, 0, 30] * 200_000, 9]], r"whose outline is 1.6e\+07 pixels long"),
        (POLYGON, "1 in the place of a polygon"),
        ("abc", "segmentation is 'abc', neither a list of polygons nor an RLE"),
        (7, "segmentation is 7, neither"),
        ({}, "an RLE of size None"),
        ({"size": [30], "counts": [1200]}, r"an RLE of size \[30\]"),
        ({"size": [30.0, 40], "counts": [1200]}, r"an RLE of size \[30.0, 40\]"),
        ({"size": [0, 40], "counts": []}, r"an RLE of size \[0, 40\]"),
        ({"size": [30, 40]}, "whose counts are None, neither a list nor compressed"),
        ({"size": [30, 40], "counts": [600, -1, 601]}, "not all whole numbers"),
        ({"size": [30, 40], "counts": [600, 599.5, 0.5]}, "not all whole numbers"),
        ({"size": [30, 40], "counts": [600, 599]}, "add up to 1199 pixels, not to 30 x 40"),
        ({"size": [30, 40], "counts": "n0"}, "add up to 30 pixels, not to 30 x 40"),
        ({"size": [30, 40], "counts": "zzz"}, "counts 'zzz' are no compressed runs"),
        ({"size": [40, 30], "counts": [1200]}, r"an RLE of 40 x 30 pixels \(height x width\), the image has 30 x 40"),
        ([[1, 1, 81, 1, 9, 9]], "a polygon from 1, 1 to 81, 9, more than the size of the 40 x 30 image outside of it"),
        ([POLYGON, [1, -31, 9, 1, 9, 9]], "a polygon from 1, -31 to 9, 9"),
    ],
)
def test_a_segmentation_that_cannot_be_meant_is_refused_at_its_ids(tmp_path, value, message):
    document = with_masks(two_images())
    document["annotations"][1]["segmentation"] = value
    files = write_set(tmp_path, document)
    with pytest.raises(InputError, match="image 7, annotation 12: segmentation ") as caught:
        load(files)
    assert re.search(message, str(caught.value))
    assert str(files[0]) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "megdet data check --masks" in str(caught.value)
    assert len(load(files, asked=False)) == 2


_numbers = st.integers(-3, 50) | st.floats() | st.sampled_from([True, None, "x", 1e31, 10**400])
_polygons = st.lists(st.lists(_numbers, max_size=9) | _numbers, max_size=3) | st.just([POLYGON])
_rles = st.fixed_dictionaries(
    {},
    optional={
        "size": st.just([2, 3]) | st.lists(_numbers, max_size=3),
        "counts": st.sampled_from([[6], [1, 2, 3], "123", "15", "6"]) | st.lists(_numbers) | st.text(max_size=4),
    },
)


@given(st.lists(_polygons | _rles | _numbers, min_size=1, max_size=3))
def test_a_file_is_read_exactly_if_no_segmentation_has_a_fault(values):
    try:
        text = json.dumps([json.loads(json.dumps(value, allow_nan=False)) for value in values])
    except ValueError:
        return  # no JSON
    content = json.dumps({"annotations": [{"id": n, "image_id": 1, "segmentation": v} for n, v in enumerate(values)]})
    faults = [segmentation_fault(value) for value in json.loads(text)]
    if any(faults):
        first = next(n for n, fault in enumerate(faults) if fault)
        with pytest.raises(InputError, match=f"image 1, annotation {first}: "):
            segmentations.parse(Path("x.json"), content.encode())
    else:
        found = segmentations.parse(Path("x.json"), content.encode())
        assert [len(found[n].polygons) for n in range(len(found))] == [
            len(value) if isinstance(value, list) else 0 for value in values
        ]
        assert found.is_missing.tolist() == [not value for value in values]


def recipe_data(file, images):
    return Data(
        train_annotations=str(file), train_images=str(images), val_annotations=str(file), val_images=str(images)
    )


def test_a_detector_with_masks_refuses_data_without_in_one_line(tmp_path):
    document = with_masks(two_images())
    del document["annotations"][2]["segmentation"]
    document["annotations"][0]["segmentation"] = []
    data = recipe_data(*write_set(tmp_path, document))
    for load_set in (partial(training_set, masks="all"), partial(validation_set, with_masks=True)):
        with pytest.raises(InputError, match=r"image 3, annotation 11: it has no segmentation, like 2 of 3 ") as caught:
            load_set(data)
        assert "\n" not in str(caught.value)
    assert len(training_set(data, masks="none")) == len(validation_set(data, with_masks=False)) == 2
    data = recipe_data(*write_set(tmp_path, with_masks(document)))
    assert len(training_set(data, masks="all")) == len(validation_set(data, with_masks=True)) == 2


def test_any_masks_are_those_that_there_are_and_an_object_without_has_an_empty_one(tmp_path):
    document = with_masks(two_images())
    del document["annotations"][2]["segmentation"]
    dataset = training_set(recipe_data(*write_set(tmp_path, document)), masks="any")
    missing = [
        not (own.polygons or len(own.runs))
        for index in range(len(dataset))
        for own in dataset.annotations.segmentations_of(index)
    ]
    assert sorted(missing) == [False, False, True]
    assert training_set(recipe_data(*write_set(tmp_path, document)), masks="none").annotations.segmentations is None


def test_the_fingerprint_follows_the_masks_where_they_were_asked_for(tmp_path):
    document = with_masks(two_images())
    first = write_set(tmp_path, document)
    plain, masked = fingerprint(load(first, asked=False)), fingerprint(load(first))
    document["annotations"][0]["segmentation"][0][2] -= 1
    second = write_set(tmp_path, document)
    assert fingerprint(load(second, asked=False)) == plain
    assert len({plain, masked, fingerprint(load(second))}) == 3


def test_areas_are_those_of_polygons_and_runs_by_hand(tmp_path):
    document = with_masks(two_images())
    document["annotations"][1]["segmentation"] = [
        [0, 0, 4, 0, 4, 5, 0, 5],
        [9, 9, 9, 11, 7, 9],
    ]  # 20 and 2, either way round
    document["annotations"].append(box_row(14, 7, 4, [1, 1, 5, 5]))
    found = load(write_set(tmp_path, document)).annotations.segmentations
    assert found.areas().tolist() == [100, 22, 30, 0]
    assert (
        load(write_set(tmp_path, {**two_images(), "annotations": []})).annotations.segmentations.areas().tolist() == []
    )


@needs_shared_data
def test_coco_mini_has_the_masks_that_the_coco_api_reads():
    folder = SHARED_DATA / "coco_mini"
    for split in ("train2017", "val2017"):
        file = folder / "annotations" / f"instances_{split}.json"
        dataset = load_coco(file, folder / split, keep_empty=True, with_masks=True)
        rows = {row["id"]: row for row in json.loads(file.read_text())["annotations"]}
        num_runs = 0
        for index in range(len(dataset)):
            for number, own in zip(
                dataset.annotations[index].annotation_ids, dataset.annotations.segmentations_of(index), strict=True
            ):
                truth, size = rows[number]["segmentation"], tuple(dataset.sizes[index].tolist())
                if isinstance(truth, dict):
                    num_runs += 1
                    assert np.array_equal(pixels_of_runs(own.runs, *size), coco_mask(truth, size, size))
                else:
                    assert len(own.polygons) == len(truth)
                    for polygon, expected in zip(own.polygons, truth, strict=True):
                        np.testing.assert_allclose(polygon.ravel(), expected, rtol=1e-6)
        assert num_runs > 0
