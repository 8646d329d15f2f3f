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
        ({"roi_heads.box_predictor.cls_score.bias": None}, "not of a known detectron2 model: R50-FPN Faster"),
    ],
)
def test_weights_of_another_detector_are_refused_with_the_first_tensor_that_does_not_fit(changes, message, state, ours):
    changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}

    def read() -> None:
        num_detectron2_classes(changed)
        convert_detectron2_weights(changed, ours.state_dict())

    with pytest.raises(InputError, match=message):
        read()


def test_a_mask_head_makes_it_a_mask_rcnn_whose_last_convolution_is_a_layer(state):
    head = "roi_heads.mask_head"
    tensors = {f"{head}.mask_fcn{i}.weight": torch.full((256, 256, 3, 3), float(i)) for i in range(1, 5)}
    tensors |= {f"{head}.mask_fcn{i}.bias": torch.zeros(256) for i in range(1, 5)}
    tensors |= {f"{head}.deconv.weight": torch.randn(256, 256, 2, 2), f"{head}.deconv.bias": torch.zeros(256)}
    predict = torch.randn(reference.CLASSES, 256, 1, 1)
    tensors |= {f"{head}.predictor.weight": predict, f"{head}.predictor.bias": torch.zeros(reference.CLASSES)}
    masked = state | tensors
    recipe = detectron2_recipe(Recipe(), detectron2_layout(masked))
    with torch.device("meta"):
        wanted = make_detector(recipe, num_detectron2_classes(masked)).state_dict()
    found = convert_detectron2_weights(masked, wanted)
    assert recipe.model.kind == "mask_rcnn"
    assert torch.equal(found["mask_head.logits.weight"], predict[:, :, 0, 0])
    assert found["mask_head.convolutions.2.weight"].unique().tolist() == [3.0]
    assert torch.equal(found["mask_head.upsample.weight"], tensors[f"{head}.deconv.weight"])


def test_a_retinanet_has_its_anchors_ratio_by_ratio_here_and_size_by_size_there(state):
    shapes = {
        **{f"backbone.top_block.p{i}.weight": (256, {6: 2048, 7: 256}[i], 3, 3) for i in (6, 7)},
        **{f"head.{kind}_subnet.{i}.weight": (256, 256, 3, 3) for kind in ("cls", "bbox") for i in (0, 2, 4, 6)},
        "head.cls_score.weight": (9 * 2, 256, 3, 3),
        "head.bbox_pred.weight": (9 * 4, 256, 3, 3),
    }
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors |= {name.replace("weight", "bias"): torch.zeros(shape[0]) for name, shape in shapes.items()}
    tensors["head.cls_score.bias"] = torch.arange(18.0)
    tensors |= {name: tensor for name, tensor in state.items() if name.startswith("backbone") and "fpn_" not in name}
    tensors |= {name: tensor for name, tensor in state.items() if "fpn_" in name and "2." not in name}
    recipe = detectron2_recipe(Recipe(), detectron2_layout(tensors))
    assert num_detectron2_classes(tensors) == 2
    detector = make_detector(recipe, 2)
    found = convert_detectron2_weights(tensors, detector.state_dict())
    # of the second size and the third ratio: the anchor is number 1 * 3 + 2 there and 2 * 3 + 1 here
    assert found["class_tower.predict.bias"].reshape(9, 2)[2 * 3 + 1].tolist() == [(1 * 3 + 2) * 2, (1 * 3 + 2) * 2 + 1]
    levels = detector.anchors((64, 64), [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], torch.float32, torch.device("cpu"))
    size = 32 * 2 ** (1 / 3)
    width, height = size / 2**0.5, size * 2**0.5
    torch.testing.assert_close(levels[0][2 * 3 + 1], torch.tensor([-width, -height, width, height]) / 2)
