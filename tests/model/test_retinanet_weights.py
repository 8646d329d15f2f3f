"""Torchvision's RetinaNet is the reference: same weights, same image, same detections, losses and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from factories import relative
from megdet.errors import InputError
from megdet.model.choice import make_detector
from megdet.model.retinanet import RetinaNet
from megdet.model.torchvision_weights import (
    convert_torchvision_weights,
    layout_of,
    num_torchvision_classes,
    torchvision_recipe,
)
from megdet.recipe import Recipe
from megdet.structures import Targets
from torchvision_models import CLASSES, their_retinanet

CANVAS = (160, 224)  # P5 is 5 x 7, P6 3 x 4, P7 2 x 2: some strides are no powers of two
MODELS = {"retinanet_resnet50_fpn": retinanet_resnet50_fpn, "retinanet_resnet50_fpn_v2": retinanet_resnet50_fpn_v2}
BOXES = torch.tensor(
    [
        [[50.0, 60.0, 150.0, 150.0], [10.0, 10.0, 60.0, 90.0], [100.0, 20.0, 200.0, 80.0]],
        [[20.0, 30.0, 90.0, 99.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
    ]
)
LABELS = torch.tensor([[3, 1, 5], [2, 0, 0]])
Pair = tuple[Any, RetinaNet]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Pair:
    theirs = their_retinanet(MODELS[request.param])
    ours = make_detector(torchvision_recipe(Recipe(), 1e-5, request.param), CLASSES)
    assert isinstance(ours, RetinaNet)
    ours.load_state_dict(convert_torchvision_weights(theirs.state_dict(), ours.state_dict()))
    return theirs, ours.eval()


def images(count: int, canvas: tuple[int, int]) -> torch.Tensor:
    return torch.randn(count, 3, *canvas, generator=torch.Generator().manual_seed(1))


def heads_and_anchors(theirs: Any, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], list[int]]:
    """What torchvision's heads say, its anchors for each image, and their number on each level."""
    features = list(theirs.backbone(x).values())
    anchors = theirs.anchor_generator(ImageList(x, [tuple(x.shape[2:])] * len(x)), features)
    return theirs.head(features), anchors, [9 * level.shape[2] * level.shape[3] for level in features]


@pytest.mark.parametrize("canvas", [CANVAS, (192, 256)], ids=["odd levels", "even levels"])
def test_the_same_weights_detect_the_same(pair: Pair, canvas: tuple[int, int]) -> None:
    theirs, ours = pair
    x = images(1, canvas)
    with torch.no_grad():
        heads, anchors, lengths = heads_and_anchors(theirs, x)
        split = {name: list(output.split(lengths, 1)) for name, output in heads.items()}
        (expected,) = theirs.postprocess_detections(split, [list(anchors[0].split(lengths))], [canvas])
    found = ours.detect(x, torch.tensor([canvas]))
    count = len(expected["boxes"])
    assert count >= 50
    assert expected["scores"].std() > 0.04
    assert len(expected["labels"].unique()) > 1
    assert (found.labels[0] >= 0).sum() == count
    assert torch.equal(found.labels[0, :count], expected["labels"] - 1)
    assert (found.scores[0, :count] - expected["scores"]).abs().max() < 1e-4
    assert (found.boxes[0, :count] - expected["boxes"]).abs().max() < 1e-2


def test_the_same_weights_have_the_same_losses_and_gradients(pair: Pair) -> None:
    theirs, ours = pair
    x = images(2, CANVAS)
    heads, anchors, _ = heads_and_anchors(theirs, x)
    truth = [
        {"boxes": boxes[label > 0], "labels": label[label > 0]} for boxes, label in zip(BOXES, LABELS, strict=True)
    ]
    expected = theirs.compute_loss(truth, heads, anchors)
    sum(expected.values()).backward()
    found = ours.losses(x, torch.tensor([CANVAS, CANVAS]), Targets(BOXES, LABELS - 1, torch.tensor([5, 6])))
    (found["class_focal"].mean() + found["anchor_box"].mean()).backward()
    for name, other in (("class_focal", "classification"), ("anchor_box", "bbox_regression")):
        assert expected[other] > 1e-2
        assert relative(expected[other], found[name].mean()) < 1e-4, name
    theirs_head = theirs.head.classification_head
    assert relative(theirs_head.conv[0][0].weight.grad, ours.class_tower.convolutions[0].weight.grad) < 1e-3
    own = theirs_head.cls_logits.weight.grad.unflatten(0, (9, CLASSES + 1))[:, 1:].flatten(0, 1)
    assert relative(own, ours.class_tower.predict.weight.grad) < 1e-3
    for name, a, b in (
        ("deltas", theirs.head.regression_head.bbox_reg.weight, ours.delta_tower.predict.weight),
        ("P7", theirs.backbone.fpn.extra_blocks.p7.weight, ours.fpn.p7.weight),
        ("P6", theirs.backbone.fpn.extra_blocks.p6.weight, ours.fpn.p6.weight),
        ("P4", theirs.backbone.fpn.layer_blocks[1][0].weight, ours.fpn.output[1][0].weight),
        ("layer3", theirs.backbone.body.layer3[0].conv2.weight, ours.backbone.body.layer3[0].conv2.weight),
    ):
        assert relative(a.grad, b.grad) < 1e-3, name
    assert ours.backbone.body.layer1[0].conv1.weight.grad is None
    for model in pair:
        model.zero_grad(set_to_none=True)


def test_an_image_without_boxes_costs_what_it_costs_with_torchvision(pair: Pair) -> None:
    theirs, ours = pair
    x = images(1, CANVAS)
    with torch.no_grad():
        heads, anchors, _ = heads_and_anchors(theirs, x)
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        expected = theirs.compute_loss([nothing], heads, anchors)
        for width in (0, 2):
            targets = Targets(torch.zeros(1, width, 4), torch.full((1, width), -1), torch.tensor([5]))
            found = ours.losses(x, torch.tensor([CANVAS]), targets)
            assert relative(expected["classification"], found["class_focal"][0]) < 1e-4
            assert found["anchor_box"].eq(0).all()
            assert found["anchor_positive"].eq(0).all()


@pytest.fixture(scope="module", params=MODELS)
def tensors_and_wanted(request: pytest.FixtureRequest) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    theirs: nn.Module = MODELS[request.param](weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    recipe = torchvision_recipe(Recipe(), 1e-5, request.param)
    assert layout_of(theirs.state_dict()).recipe(Recipe(), 1e-5) == recipe
    return theirs.state_dict(), make_detector(recipe, CLASSES).state_dict()


def test_every_tensor_of_ours_comes_from_theirs(tensors_and_wanted) -> None:
    tensors, wanted = tensors_and_wanted
    converted = convert_torchvision_weights(tensors, wanted)
    assert list(converted) == list(wanted)
    assert num_torchvision_classes(tensors) == CLASSES
    theirs = tensors["head.classification_head.cls_logits.bias"]
    assert torch.equal(converted["class_tower.predict.bias"], theirs.reshape(9, CLASSES + 1)[:, 1:].flatten())


def test_files_from_before_the_inner_indices_are_read_too() -> None:
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    for tensor in theirs.parameters():
        nn.init.normal_(tensor)
    tensors = theirs.state_dict()
    wanted = make_detector(torchvision_recipe(Recipe(), 1e-5, "retinanet_resnet50_fpn"), CLASSES).state_dict()
    old = {}
    for name, tensor in tensors.items():
        for number in range(4):
            name = name.replace(f"_blocks.{number}.0.", f"_blocks.{number}.")
            name = name.replace(f"_head.conv.{number}.0.", f"_head.conv.{2 * number}.")
        old[name] = tensor
    assert {"head.regression_head.conv.6.weight", "backbone.fpn.inner_blocks.2.weight"} < set(old)
    expected = convert_torchvision_weights(tensors, wanted)
    for name, tensor in convert_torchvision_weights(old, wanted).items():
        assert torch.equal(tensor, expected[name])


def without_p7(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["backbone.fpn.extra_blocks.p7.bias"]


def with_a_fifth_convolution(tensors: dict[str, torch.Tensor]) -> None:
    tensors["head.regression_head.conv.8.weight"] = torch.zeros(1)


def with_three_anchors(tensors: dict[str, torch.Tensor]) -> None:
    tensors["head.regression_head.bbox_reg.weight"] = torch.zeros(12, 256, 3, 3)


def with_a_thin_classifier(tensors: dict[str, torch.Tensor]) -> None:
    tensors["head.classification_head.cls_logits.weight"] = torch.zeros(54, 128, 3, 3)


def with_half_a_class(tensors: dict[str, torch.Tensor]) -> None:
    tensors["head.classification_head.cls_logits.weight"] = torch.zeros(55, 256, 3, 3)


def with_the_background_alone(tensors: dict[str, torch.Tensor]) -> None:
    tensors["head.classification_head.cls_logits.weight"] = torch.zeros(9, 256, 3, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_p7, "no tensor for fpn.p7.bias"),
        (with_a_fifth_convolution, "head.regression_head.conv.8.weight has no place in a retinanet_resnet50_fpn"),
        (with_three_anchors, r"delta_tower.predict.weight has shape \(12, 256, 3, 3\), not \(36, 256, 3, 3\)"),
        (with_a_thin_classifier, r"\(54, 128, 3, 3\), not \(9 \* \(classes \+ 1\), 256, 3, 3\)"),
        (with_half_a_class, r"has shape \(55, 256, 3, 3\), not \(9 \* "),
        (with_the_background_alone, r"has shape \(9, 256, 3, 3\), not \(9 \* "),
    ],
)
def test_weights_of_another_detector_are_refused_with_the_first_tensor_that_does_not_fit(
    damage: Callable[[dict[str, torch.Tensor]], None], message: str, tensors_and_wanted: Any
) -> None:
    tensors, wanted = dict(tensors_and_wanted[0]), tensors_and_wanted[1]
    damage(tensors)
    with pytest.raises(InputError, match=message):
        convert_torchvision_weights(tensors, wanted)
