"""The images and classes of a file that needs no annotations."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_factories import save_image, two_images
from megdet.data.image_info import ImageInfo, images_to_detect, read_image_info
from megdet.errors import InputError
from megdet.recipe import Data


def info_of(folder: Path, **changes: Any) -> ImageInfo:
    document = {key: value for key, value in (two_images() | changes).items() if value is not None}
    (folder / "info.json").write_text(json.dumps(document))
    return read_image_info(folder / "info.json")


def test_a_file_without_annotations_is_read_and_its_images_are_a_data_set(tmp_path):
    info = info_of(tmp_path, annotations=None)
    assert not info.has_annotations
    assert info_of(tmp_path).has_annotations
    assert info.classes == {4: "cat", 9: "dog"}
    save_image(tmp_path / "a.jpg", 40, 30)
    save_image(tmp_path / "b.jpg", 40, 30)
    dataset = images_to_detect(info, tmp_path, Data())
    assert (dataset.class_names, dataset.category_ids, dataset.image_ids) == (("cat", "dog"), (4, 9), (7, 3))
    assert dataset.sizes.tolist() == [[30, 40]] * 2
    assert [len(own.labels) for own in dataset.annotations] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"images": []}, "there is no image in it"),
        ({"categories": []}, "there is no category in it"),
        ({"images": [{"id": 7}, {"id": 7}]}, "the image id 7 occurs twice"),
        ({"images": None}, "images"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, changes, fault):
    with pytest.raises(InputError, match=f"info.json: .*{fault}"):
        info_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        ({"id": 7}, "image 7: the image has no 'file_name'"),
        ({"id": 7, "file_name": "../a.jpg"}, "leads out of the image folder"),
        ({"id": 7, "file_name": "a.jpg", "width": 40, "height": 31}, "the file is 40 x 30 pixels, the annotations say"),
        ({"id": 7, "file_name": "c.jpg"}, "1 of 1 images"),
    ],
)
def test_an_image_that_is_not_as_the_file_says_is_refused(tmp_path, image, fault):
    save_image(tmp_path / "a.jpg", 40, 30)
    with pytest.raises(InputError, match=fault):
        images_to_detect(info_of(tmp_path, images=[image]), tmp_path, Data())
    info = info_of(tmp_path, images=[{"id": 7, "file_name": "a.jpg"}])
    with pytest.raises(InputError, match="image 7"):
        images_to_detect(info, tmp_path, Data(max_pixels=1199))
