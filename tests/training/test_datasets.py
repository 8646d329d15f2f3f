import json
from dataclasses import replace
from pathlib import Path

import pytest

from megdet.data.loader import training_batches
from megdet.errors import InputError
from megdet.model.faster_rcnn import FasterRcnn
from megdet.training.datasets import load_datasets
from megdet.training.run import open_run
from small_runs import ALONE, small_recipe, write_small_sets


def without_segmentations(file: Path) -> None:
    document = json.loads(file.read_text())
    for row in document["annotations"][1:]:
        del row["segmentation"]
    file.write_text(json.dumps(document))


def test_only_a_detector_with_masks_has_them_in_its_data_sets(tmp_path, monkeypatch):
    recipe = small_recipe(write_small_sets(tmp_path))
    plain = load_datasets(recipe, ALONE)
    monkeypatch.setattr(FasterRcnn, "has_masks", True)
    masked = load_datasets(recipe, ALONE)
    for name in ("train", "val"):
        assert getattr(plain, name).annotations.segmentations is None
        assert len(getattr(masked, name).annotations.segmentations) == len(getattr(masked, name).annotations.boxes)


def test_a_run_of_a_detector_with_masks_makes_its_steps_from_batches_that_have_them(tmp_path, monkeypatch):
    monkeypatch.setattr(FasterRcnn, "has_masks", True)
    seen, real = [], FasterRcnn.forward
    monkeypatch.setattr(FasterRcnn, "forward", lambda self, batch: seen.append(batch) or real(self, batch))
    with open_run(small_recipe(write_small_sets(tmp_path)), ALONE) as run:
        next(run.steps(0, 1))
        (first, second) = training_batches(
            run.datasets.train, run.plan, run.layout, 0, (0, 1), workers=0, device=ALONE.device
        )
    for own, expected in zip(seen, (first, second), strict=True):
        assert own.targets.masks is not None
        assert (own.targets.masks.bits == expected.targets.masks.bits).all()
        assert ((own.targets.masks.frames[:, :, 3] > 0) == own.targets.is_box).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_without_masks_are_refused_before_a_detector_with_masks_is_built(tmp_path, monkeypatch, split):
    recipe = small_recipe(write_small_sets(tmp_path))
    without_segmentations(tmp_path / f"{split}.json")
    monkeypatch.setattr("megdet.training.run.make_trainer", None)
    monkeypatch.setattr(FasterRcnn, "has_masks", True)
    with (
        pytest.raises(InputError, match=rf"{split}\.json, image \d+, annotation \d+: it has no segmentation") as caught,
        open_run(recipe, ALONE),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert "like" in str(caught.value)


def test_data_without_masks_train_a_detector_of_boxes(tmp_path):
    recipe = replace(small_recipe(write_small_sets(tmp_path)), batch_size=4)
    without_segmentations(tmp_path / "train.json")
    with open_run(recipe, ALONE) as run:
        assert next(run.steps(0, 1)).step == 0
