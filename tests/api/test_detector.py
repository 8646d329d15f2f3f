"""A trained detector as a function of images."""

from pathlib import Path

import numpy as np
import pytest
import torch

import megdet
from megdet.data.image import read_image
from megdet.errors import InputError
from megdet.inference.predict import detect_image
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import latest_checkpoint
from megdet.run_folder.folder import RunFolder
from small_runs import CLASS_NAMES, save_run, small_recipe, write_small_sets


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    return small_recipe(write_small_sets(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> RunFolder:
    return save_run(tmp_path_factory.mktemp("run"), recipe)[0]


@pytest.fixture(scope="module")
def detector(run) -> megdet.LoadedDetector:
    return megdet.load(run.path, device="cpu")


@pytest.fixture(scope="module")
def files(recipe) -> list[Path]:
    return sorted(Path(recipe.data.val_images).iterdir())


def same(ours: megdet.Detections, theirs: megdet.Detections, digits: float = 1e-6) -> bool:
    return (
        ours.labels.tolist() == theirs.labels.tolist()
        and np.allclose(ours.boxes, theirs.boxes, atol=digits)
        and np.allclose(ours.scores, theirs.scores, atol=digits)
    )


def test_it_finds_in_one_image_what_detect_finds_in_its_file(detector, files):
    found = detector(files[0])
    assert len(found) > 5
    assert found.to_coco() == detect_image(detector.trained, files[0]).to_coco()
    assert (found.class_names, found.category_ids) == (CLASS_NAMES, (10, 20, 30))
    assert found.source == str(files[0])
    assert found.pixels is None, "it can be read again"
    assert np.array_equal(found.image, read_image(files[0]))


def test_many_images_are_found_together_as_one_by_one_in_their_order(detector, files):
    alone = [detector(str(file)) for file in files]
    pixels = [read_image(file) for file in files]
    tensors = [torch.from_numpy(own).permute(2, 0, 1) / 255.0 for own in pixels]
    for together in (detector(files), detector(files[0].parent), detector(pixels), detector(iter(tensors))):
        assert len(together) == len(files)
        assert all(same(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
    assert [own.source for own in detector.each(files)] == [str(file) for file in files]
    assert detector([]) == []


def test_a_score_leaves_out_what_has_less(detector, files):
    every = detector(files[0])
    middle = float(np.median(every.scores))
    assert 0 < len(detector(files[0], score=middle)) == int((every.scores >= middle).sum()) < len(every)


def test_a_bad_image_among_many_is_named(detector, files, tmp_path):
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(InputError, match=r"b\.png: cannot be read as an image"):
        detector([files[0], tmp_path / "b.png"])


def test_a_run_a_checkpoint_changed_keys_and_folded_norms_are_loaded(run, detector, files):
    checkpoint = latest_checkpoint(run)
    assert same(megdet.load(checkpoint, device="cpu")(files[0]), detector(files[0]))
    assert same(megdet.load(run.path, device="cpu", fold=True)(files[0]), detector(files[0]), digits=1e-4)
    changed = megdet.load(str(run.path), device="cpu", overrides={"model.box_head.detections": 3})
    assert len(changed(files[0])) == 3
    assert repr(detector) == "<LoadedDetector faster_rcnn of 3 classes: bolt, nut, gear>"
    assert not detector.has_masks


def test_a_checkpoint_is_loaded_from_inside_its_folder(run, monkeypatch):
    path = latest_checkpoint(run)
    monkeypatch.chdir(path.parent)
    assert megdet.load(path.name, device="cpu").trained.step == megdet.load(path, device="cpu").trained.step


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "nowhere: no such run folder"), (".", "not a run folder, it has no recipe.yaml")],
)
def test_what_is_no_run_is_refused(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        megdet.load(path)
