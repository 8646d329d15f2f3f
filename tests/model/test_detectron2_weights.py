"""A small detector after detectron2's documentation is the reference: same weights, same image, same detections."""

import pytest
import torch
from torch import Tensor

import detectron2_reference as reference
from megdet.errors import InputError
from megdet.model.choice import make_detector
from megdet.model.detector import Detector
from megdet.model.detectron2_weights import (
    convert_detectron2_weights,
    detectron2_layout,
    detectron2_recipe,
    num_detectron2_classes,
)
from megdet.recipe import Recipe


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return reference.random_state()


@pytest.fixture(scope="module")
def ours(state) -> Detector:
    recipe = detectron2_recipe(Recipe(), detectron2_layout(state))
    detector = make_detector(recipe, num_detectron2_classes(state))
    detector.load_state_dict(convert_detectron2_weights(state, detector.state_dict()))
    return detector.eval()


@pytest.mark.parametrize("canvas", [(160, 224), (320, 256)])
def test_the_same_weights_detect_the_same(state, ours, canvas):
    rgb = torch.randint(0, 256, (3, *canvas), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([canvas])
    with torch.no_grad():
        boxes, scores, labels = reference.detect(state, rgb.flip(0).float())
    found = ours.detect(ours.normalized(rgb[None], sizes), sizes)
    count = len(boxes)
    assert count >= 20
    assert scores.std() > 0.02
    assert len(labels.unique()) > 1
    assert (found.labels[0] >= 0).sum() == count
    assert torch.equal(found.labels[0, :count], labels)
    assert (found.scores[0, :count] - scores).abs().max() < 1e-4
    assert (found.boxes[0, :count] - boxes).abs().max() < 1e-2


def test_the_features_are_those_of_the_reference(state, ours):
    rgb = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference.features(state, rgb[0].flip(0).float())
        found = ours.features(ours.normalized(rgb, torch.tensor([[64, 96]])))
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() / a.abs().max() < 1e-4


def test_anchors_are_where_the_reference_has_them(ours):
    pyramid = [torch.zeros(1, 1, 64 // 2**level, 96 // 2**level) for level in range(2, 6)]
    for level, own in zip(range(2, 6), ours.anchors_of(pyramid, (64, 96)), strict=True):
        torch.testing.assert_close(own, reference.anchors(level, 64 // 2**level, 96 // 2**level))


def test_every_tensor_of_ours_comes_from_theirs(state, ours):
    old = state | {f"proposal_generator.anchor_generator.cell_anchors.{i}": torch.zeros(3, 4) for i in range(5)}
    old["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] = torch.tensor(1)
    converted = convert_detectron2_weights(old, ours.state_dict())
    assert list(converted) == list(ours.state_dict())
    assert num_detectron2_classes(old) == reference.CLASSES
    conv1 = converted["backbone.body.conv1.weight"]
    assert torch.equal(conv1[:, 0], state["backbone.bottom_up.stem.conv1.weight"][:, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.fpn_lateral3.weight": None}, "no tensor for fpn.lateral.1.0.weight"),
        ({"roi_heads.keypoint_head.a": torch.zeros(1)}, "roi_heads.keypoint_head.a has no place"),
        ({"backbone.bottom_up.res4.6.conv1.weight": torch.zeros(1)}, "file's backbone.body.layer3.6.conv1.weight"),
        ({"proposal_generator.rpn_head.conv.weight": torch.zeros(1)}, r"rpn.conv.weight has shape \(1,\)"),
        ({"roi_heads.box_head.fc1.weight": torch.zeros(7)}, r"box_head.fc1.weight has shape \(7,\)"),
        ({"pixel_mean": torch.tensor([123.675, 116.28, 103.53])}, "pixel_mean is .* for other pixels"),
        ({"pixel_std": torch.tensor([57.375, 57.12, 58.395])}, "pixel_std is .* for other pixels"),
        ({"pixel_mean": torch.zeros(4)}, "pixel_mean is"),
        ({"roi_heads.box_predictor.cls_score.bias": torch.zeros(())}, r"shape \(\), not one of classes"),
        ({"roi_heads.box_predictor.cls_score.bias": torch.zeros(1)}, r"shape \(1,\), not one of classes"),
        ({"roi_heads.box_predictor.cls_score.bias": None}, "no model of detectron2's that is known: R50-FPN Faster"),
    ],
)
def test_weights_of_another_detector_are_refused_with_the_first_tensor_that_does_not_fit(changes, message, state, ours):
    changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}

    def read() -> None:
        num_detectron2_classes(changed)
        convert_detectron2_weights(changed, ours.state_dict())

    with pytest.raises(InputError, match=message):
        read()
