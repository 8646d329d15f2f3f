"""Torchvision's detector is the reference, from the file on the disk to the boxes in its pixels."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import RetinaNet as TheirRetinaNet
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.functional import pil_to_tensor

import detectron2_reference
from data_factories import SHARED_DATA, needs_shared_data
from megdet.data.image import image_size
from megdet.data.loader import group_batches
from megdet.data.plan import evaluation_plan, evaluation_size
from megdet.inference.predict import detect_image
from megdet.inference.trained import TrainedDetector, load_detector
from megdet.model.torchvision_weights import torchvision_recipe
from megdet.recipe import Data, Recipe
from megdet.run_folder.folder import RunFolder
from megdet.training.initial_weights import import_detectron2, import_torchvision
from small_runs import CPU, val_set
from torchvision_models import CLASSES, their_detector, their_retinanet

PHOTOS = SHARED_DATA / "photos"
MINI = SHARED_DATA / "coco_mini"
SMALL = Data(short_edges=(240,), max_long_edge=400)


@pytest.fixture(scope="module", params=["faster_rcnn", "retinanet", "retinanet_v2"])
def theirs(request: pytest.FixtureRequest) -> nn.Module:
    sizes = {"min_size": 240, "max_size": 400}
    if request.param == "faster_rcnn":
        return their_detector(1e-5, **sizes)
    return their_retinanet({"retinanet": retinanet_resnet50_fpn}.get(request.param, retinanet_resnet50_fpn_v2), **sizes)


@pytest.fixture(scope="module")
def imported(theirs, tmp_path_factory) -> TrainedDetector:
    folder = tmp_path_factory.mktemp("imported")
    torch.save(theirs.state_dict(), folder / "theirs.pth")
    run = RunFolder(folder / "run")
    assert import_torchvision(folder / "theirs.pth", run, Recipe(data=SMALL), 1e-5, CPU) == CLASSES
    return load_detector(run, CPU)


def photo(path: Path) -> torch.Tensor:
    """As torchvision's users read it: 0 to 1."""
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB")).float() / 255


def some_photos() -> list[Path]:
    """Three photos, and four of COCO of which two are rounded to another size than torchvision's."""
    return [*sorted(PHOTOS.glob("*.[pj][np]g")), *sorted((MINI / "val2017").iterdir())[:4]]


@needs_shared_data
def test_an_imported_detector_finds_in_a_file_what_torchvision_finds_in_it(theirs, imported):
    found = 0
    for path in some_photos():
        with torch.no_grad():
            (expected,) = theirs([photo(path)])
        results = detect_image(imported, path).to_coco()
        boxes = torch.tensor([result["bbox"] for result in results], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels, scores = (torch.tensor([result[key] for result in results]) for key in ("category_id", "score"))
        # RetinaNet's random towers amplify the last digits of a pixel, and of its thousands of candidates some pairs
        # overlap by the threshold of NMS to these digits
        is_dense = isinstance(theirs, TheirRetinaNet)
        pixels, score, allowed = (1e-2, 1e-4, len(results) // 100) if is_dense else (3e-3, 1e-5, 0)
        is_same = (boxes[:, None] - expected["boxes"].double()).abs().amax(dim=2) < pixels
        is_same &= labels[:, None] == expected["labels"]
        is_same &= (scores[:, None] - expected["scores"]).abs() < score
        assert len(results) == len(expected["boxes"]), path
        assert (~is_same.any(dim=0)).sum() <= allowed, path
        assert (~is_same.any(dim=1)).sum() <= allowed, path
        found += len(results)
    assert found > 100


@needs_shared_data
@pytest.mark.parametrize("make_recipe", [lambda recipe: recipe, lambda recipe: torchvision_recipe(recipe, 0.0)])
def test_every_photo_has_torchvisions_size_where_the_recipe_asks_for_it(make_recipe: Callable[[Recipe], Recipe]):
    recipe = make_recipe(Recipe())
    transform = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3)
    sizes = [image_size(path) for path in sorted((MINI / "val2017").iterdir())]
    theirs = [tuple(transform.resize(torch.zeros(1, *size))[0].shape[1:]) for size in sizes]
    same = sum(evaluation_size(*size, recipe.data) == other for size, other in zip(sizes, theirs, strict=True))
    assert len(sizes) == 79
    assert (same == 79) == (recipe.data.resize == "torchvision")


@needs_shared_data
def test_batches_hold_torchvisions_pixels(imported):
    data = replace(
        imported.recipe.data,
        val_annotations=str(MINI / "annotations/instances_val2017.json"),
        val_images=str(MINI / "val2017"),
    )
    recipe = replace(imported.recipe, data=data, evaluation=replace(imported.recipe.evaluation, batch_size=2))
    dataset = val_set(recipe)
    model = recipe.model
    transform = GeneralizedRCNNTransform(240, 400, list(model.mean), list(model.std))
    groups = evaluation_plan(dataset.sizes, recipe)[::8]
    for batch in group_batches(dataset, groups, workers=0, device=CPU):
        expected, _ = transform([photo(dataset.image_path(index)) for index in batch.image_index])
        assert expected.image_sizes == [tuple(size) for size in batch.sizes.tolist()]
        assert batch.pixels.dtype == torch.float32
        assert expected.tensors.shape == batch.pixels.shape
        assert (imported.model.normalized(batch.pixels, batch.sizes) - expected.tensors).abs().max() < 2e-5


def test_a_v2_file_makes_a_run_that_trains_its_batch_statistics(tmp_path):
    theirs = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    torch.save(theirs.state_dict(), tmp_path / "v2.pth")
    run = RunFolder(tmp_path / "run")
    assert import_torchvision(tmp_path / "v2.pth", run, Recipe(bn_size=0, data=SMALL), 1e-5, CPU) == 90
    imported = load_detector(run, CPU)
    assert imported.recipe.bn_size == imported.recipe.batch_size == 16
    assert (imported.recipe.model.fpn.norm, imported.recipe.model.box_head.convolutions) == ("batch", 4)
    assert imported.class_names[0] == "person"


@pytest.mark.parametrize("is_pickle", [True, False])
def test_an_imported_detectron2_detector_finds_in_a_file_what_the_reference_finds_in_its_pixels(tmp_path, is_pickle):
    state = detectron2_reference.random_state()
    if is_pickle:
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    else:
        torch.save({"model": state, "iteration": 3}, tmp_path / "model.pth")
    run = RunFolder(tmp_path / "run")
    file = tmp_path / ("model.pkl" if is_pickle else "model.pth")
    assert import_detectron2(file, run, Recipe(data=SMALL), CPU) == detectron2_reference.CLASSES
    imported = load_detector(run, CPU)
    assert imported.recipe.data.resize == "antialias"
    pixels = np.random.default_rng(0).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    imported = replace(imported, recipe=replace(imported.recipe, data=replace(SMALL, short_edges=(256,))))
    results = detect_image(imported, tmp_path / "a.png").to_coco()
    bgr = torch.from_numpy(pixels[:, :, ::-1].copy()).permute(2, 0, 1).float()
    with torch.no_grad():
        boxes, scores, labels = detectron2_reference.detect(state, bgr)
    assert len(results) == len(boxes) > 10
    found = torch.tensor([result["bbox"] for result in results])
    found[:, 2:] += found[:, :2]
    assert (found - boxes).abs().max() < 2e-2
    assert [result["category_id"] - 1 for result in results] == labels.tolist()
    assert (torch.tensor([result["score"] for result in results]) - scores).abs().max() < 1e-4


def test_a_detectron2_file_of_80_classes_gets_cocos_names_and_ids(tmp_path):
    state = detectron2_reference.random_state()
    for name, rows in (("cls_score", 81), ("bbox_pred", 320)):
        for kind, shape in (("weight", (rows, 1024)), ("bias", (rows,))):
            state[f"roi_heads.box_predictor.{name}.{kind}"] = torch.zeros(shape)
    torch.save(state, tmp_path / "model.pth")
    assert import_detectron2(tmp_path / "model.pth", RunFolder(tmp_path / "run"), Recipe(), CPU) == 80
    imported = load_detector(RunFolder(tmp_path / "run"), CPU)
    assert (imported.class_names[0], imported.category_ids[0]) == ("person", 1)
    assert (imported.class_names[-1], imported.category_ids[-1]) == ("toothbrush", 90)
    assert (imported.class_names[11], imported.category_ids[11]) == ("stop sign", 13)
