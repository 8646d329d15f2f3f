import numpy as np
import pytest
from PIL import Image

from data_factories import SHARED_DATA, box_row, image_row, needs_shared_data, two_images, with_masks, write_set
from megdet.data.coco import load_coco
from megdet.data.stats import dataset_statistics
from megdet.data.stats_picture import plot_statistics
from megdet.errors import InputError


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    document = two_images()
    document["images"].append(image_row(5, "empty.jpg"))
    document["annotations"].append(box_row(14, 7, 9, [0, 0, 40, 10], area=1024.0))
    document["annotations"].append(box_row(15, 7, 9, [0, 0, 0, 10]))
    document["categories"].append({"id": 12, "name": "$絵$"})
    return load_coco(*write_set(tmp_path, document), keep_empty=True)


def test_statistics_agree_with_a_count_by_hand(dataset):
    stats = dataset_statistics(dataset)
    assert (stats.num_images, stats.num_empty_images, stats.num_boxes) == (3, 1, 3)
    assert (stats.num_crowds, stats.num_dropped) == (1, 1)
    assert stats.class_counts == {"cat": 1, "dog": 2, "$絵$": 0}
    assert stats.boxes_per_image.tolist() == [2, 1, 0]
    np.testing.assert_allclose(stats.box_sizes, [8, 20, np.sqrt(200)])
    np.testing.assert_allclose(stats.aspect_ratios, [1, 4, 0.5])
    assert stats.image_sizes.tolist() == [[30, 40]] * 3
    assert (stats.num_small, stats.num_medium, stats.num_large) == (2, 1, 0)
    assert stats.quantiles(stats.aspect_ratios)[::3] == (0.5, 1.0, 4.0)


def test_masks_are_counted_where_they_were_asked_for_by_hand(dataset, tmp_path):
    assert dataset_statistics(dataset).mask_fractions is None
    document = with_masks(two_images())
    document["annotations"].append(box_row(14, 7, 9, [0, 0, 40, 10]))
    document["annotations"].append(box_row(15, 7, 9, [0, 0, 40, 10], segmentation=[[0, 0, 40, 0, 40, 10, 0, 10]]))
    stats = dataset_statistics(load_coco(*write_set(tmp_path, document), keep_empty=True, with_masks=True))
    assert stats.num_boxes == 4
    assert stats.mask_fractions.tolist() == [0.5, 1, 0.5]  # no crowd


def test_the_picture_is_written_for_names_of_any_script(dataset, tmp_path):
    plot_statistics(dataset_statistics(dataset), tmp_path / "new" / "stats.png", title="a $ set of 猫")
    with Image.open(tmp_path / "new" / "stats.png") as image:
        assert image.size == (1430, 792)
    with pytest.raises(InputError, match="no such kind of picture"):
        plot_statistics(dataset_statistics(dataset), tmp_path / "stats.nonsense")


def test_a_set_without_boxes_has_statistics_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = write_set(tmp_path, {**two_images(), "annotations": []})
    stats = dataset_statistics(load_coco(*files, keep_empty=True))
    assert (stats.num_boxes, stats.num_empty_images, stats.num_small) == (0, 2, 0)
    assert all(np.isnan(stats.quantiles(stats.box_sizes)))
    plot_statistics(stats, tmp_path / "stats.png")


@needs_shared_data
def test_coco_mini_has_the_boxes_its_readme_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = SHARED_DATA / "coco_mini"
    stats = dataset_statistics(
        load_coco(folder / "annotations" / "instances_train2017.json", folder / "train2017", keep_empty=True)
    )
    assert stats.num_boxes + stats.num_crowds + stats.num_dropped == 739
    assert stats.num_small + stats.num_medium + stats.num_large == stats.num_boxes == sum(stats.class_counts.values())
