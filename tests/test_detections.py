"""What users get of one image: chosen, drawn, and as other libraries have it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megdet.data.rle import encode_mask
from megdet.detections import Detections
from megdet.errors import InputError

SIZE = (20, 30)
SQUARE = np.ones((4, 5), np.bool_)


@pytest.fixture
def found() -> Detections:
    masks = tuple(encode_mask(SQUARE, x, y, SIZE) for x, y in ((2, 3), (10, 11), (20, 0)))
    return Detections(
        np.array([[2, 3, 7, 7], [10, 11, 15, 15], [20, 0, 25, 4]], dtype=float),
        np.array([0.9, 0.6, 0.2]),
        np.array([1, 0, 1]),
        ("nut", "bolt"),
        (10, 40),
        SIZE,
        masks,
        "folder/a.png",
        np.zeros((*SIZE, 3), np.uint8),
    )


def test_they_are_counted_chosen_and_named(found):
    assert len(found) == 3
    assert found.names == ["bolt", "nut", "bolt"]
    assert repr(found) == "<Detections in folder/a.png: 2 bolt, 1 nut>"
    assert found.above(0.6).scores.tolist() == [0.9, 0.6]
    assert found[1].names == ["nut"]
    assert found[[2, 0]].scores.tolist() == [0.2, 0.9]
    assert found[found.labels == 1].boxes.tolist() == [[2, 3, 7, 7], [20, 0, 25, 4]]
    assert found[1:].mask(0)[11:15, 10:15].all()
    assert found[1:].mask(0).sum() == 20
    assert len(found.above(1.0)) == 0
    assert repr(found.above(1.0)) == "<Detections in folder/a.png: nothing>"


def test_coco_has_corners_and_lengths_and_the_ids_of_the_file(found):
    first, second, third = found.to_coco()
    assert first == {
        "image_id": "a.png",
        "category_id": 40,
        "bbox": [2, 3, 5, 4],
        "score": 0.9,
        "segmentation": encode_mask(SQUARE, 2, 3, SIZE),
    }
    assert (second["category_id"], third["bbox"]) == (10, [20, 0, 5, 4])
    assert [row["image_id"] for row in found.to_coco(7, [1, None])] == [7], "a class without an id is left out"


def test_torchvision_has_tensors_and_labels_from_one(found):
    own = found.to_torchvision()
    assert own["labels"].tolist() == [2, 1, 2]
    assert own["boxes"].dtype == own["scores"].dtype == torch.float32
    assert own["masks"].shape == (3, 1, *SIZE)
    assert own["masks"].sum(dim=(1, 2, 3)).tolist() == [20, 20, 20]
    assert found.above(1.0).to_torchvision()["masks"].shape == (0, 1, *SIZE)


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision_has_them_with_masks_and_names(found):
    own = found.to_supervision()
    assert own.xyxy.tolist() == found.boxes.tolist()
    assert own.class_id.tolist() == [1, 0, 1]
    assert own.confidence == pytest.approx([0.9, 0.6, 0.2])
    assert own.mask.sum(axis=(1, 2)).tolist() == [20, 20, 20]
    assert own["class_name"].tolist() == ["bolt", "nut", "bolt"]
    assert len(found.above(1.0).to_supervision()) == 0


def test_they_are_drawn_from_a_score_on_and_shown_in_a_notebook(found):
    def painted(score: float) -> int:
        return int((np.asarray(found.draw(score)).sum(axis=2) > 0).sum())

    assert painted(1.0) == 0 < painted(0.8) < painted(0.1)
    shown = np.asarray(Image.open(io.BytesIO(found._repr_png_())))
    assert np.array_equal(shown, np.asarray(found.draw(0.5)))


def test_an_image_that_is_a_file_is_read_when_it_is_needed(found, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    names = ("boxes", "scores", "labels", "class_names", "category_ids", "size")
    fields = {name: getattr(found, name) for name in names}
    assert np.array_equal(Detections(**fields, source=str(tmp_path / "a.png")).image, pixels)
    with pytest.raises(InputError, match="have no image"):
        _ = Detections(**fields).image
    with pytest.raises(InputError, match="finds boxes but no masks"):
        Detections(**fields).mask(0)
