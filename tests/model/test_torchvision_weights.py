"""Torchvision's own detector is the reference: same weights, same image, same detections, losses and gradients."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from factories import relative, with_model
from megdet.errors import InputError
from megdet.model.choice import make_detector
from megdet.model.detector import Detector
from megdet.model.faster_rcnn import FasterRcnn
from megdet.model.torchvision_weights import (
    convert_torchvision_weights,
    layout_of,
    num_torchvision_classes,
    torchvision_recipe,
)
from megdet.recipe import Recipe
from megdet.structures import Targets
from torchvision_models import CLASSES, their_detector

CANVAS = (160, 224)  # P5 is 5 x 7 and P6 3 x 4: 160 // 3 and 224 // 4 are no powers of two
THEIR_LOSSES = dict(
    zip(FasterRcnn.loss_names, ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"), strict=True)
)
BOXES = torch.tensor([[50.0, 60.0, 150.0, 150.0], [10.0, 10.0, 60.0, 90.0], [100.0, 20.0, 200.0, 80.0]])
LABELS = torch.tensor([3, 1, 5])
PROPOSALS = 200
ALL = 10**6
"""More samples than there are candidates."""


def our_detector(theirs: nn.Module, recipe: Recipe) -> Detector:
    ours = make_detector(recipe, CLASSES)
    ours.load_state_dict(convert_torchvision_weights(theirs.state_dict(), ours.state_dict()))
    return ours.eval()


@dataclass
class Pair:
    """A detector of theirs, and the recipe of the same in ours with frozen statistics."""

    theirs: Any
    recipe: Recipe

    @property
    def first_layer(self) -> nn.Module:
        """The first fully connected layer of their box head."""
        head = self.theirs.roi_heads.box_head
        return head.fc6 if hasattr(head, "fc6") else head[5]


_PAIRS: dict[str, tuple[Callable[..., Any], float]] = {
    "eps 0": (fasterrcnn_resnet50_fpn, 0.0),
    "eps 1e-5": (fasterrcnn_resnet50_fpn, 1e-5),
    "v2": (fasterrcnn_resnet50_fpn_v2, 1e-5),
}


@pytest.fixture(scope="module", params=list(_PAIRS))
def pair(request: pytest.FixtureRequest) -> Pair:
    make, eps = _PAIRS[request.param]
    theirs = their_detector(eps, make=make)
    return Pair(theirs, replace(layout_of(theirs.state_dict()).recipe(Recipe(), eps), bn_size=0))


@pytest.mark.parametrize("canvas", [CANVAS, (192, 256)], ids=["odd P6", "even P6"])
def test_the_same_weights_detect_the_same(pair, canvas):
    theirs, ours = pair.theirs, our_detector(pair.theirs, pair.recipe)
    x = torch.randn(1, 3, *canvas, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = theirs.backbone(x)
        proposals, _ = theirs.rpn(ImageList(x, [canvas]), features)
        (expected,), _ = theirs.roi_heads(features, proposals, [canvas])
    found = ours.detect(x, torch.tensor([canvas]))
    count = len(expected["boxes"])
    assert count >= 20
    assert expected["scores"].std() > 0.04
    assert len(expected["labels"].unique()) > 1
    assert (found.labels[0] >= 0).sum() == count
    assert torch.equal(found.labels[0, :count], expected["labels"] - 1)
    assert (found.scores[0, :count] - expected["scores"]).abs().max() < 1e-4
    assert (found.boxes[0, :count] - expected["boxes"]).abs().max() < 1e-2


def losses_of(theirs: Any) -> dict[str, Tensor]:
    """Losses with sampling that takes everything; their gradients are left in the model."""
    theirs.zero_grad()
    for sampler in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = ALL, 0.5
    theirs.rpn._post_nms_top_n["training"] = PROPOSALS
    x = torch.randn(1, 3, *CANVAS, generator=torch.Generator().manual_seed(1))
    features = theirs.backbone(x)
    truth = [{"boxes": BOXES, "labels": LABELS}]
    proposals, rpn_losses = theirs.rpn(ImageList(x, [CANVAS]), features, truth)
    _, head_losses = theirs.roi_heads(features, proposals, [CANVAS], truth)
    losses = rpn_losses | head_losses
    sum(losses.values()).backward()
    theirs.eval()
    return {ours: losses[name].detach().reshape(1) for ours, name in THEIR_LOSSES.items()}


@pytest.fixture(scope="module")
def their_losses(pair: Pair) -> dict[str, Tensor]:
    """With the running statistics."""
    pair.theirs.train()
    for module in pair.theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return losses_of(pair.theirs)


def sampled_all(recipe: Recipe, **rpn: Any) -> Recipe:
    """The recipe with sampling that takes everything and leaves rows over, which stand for nothing."""
    return with_model(
        recipe,
        rpn={"samples": 10_000, "train_proposals": PROPOSALS} | rpn,
        box_head={"samples": 2 * PROPOSALS, "positive_fraction": 0.5},
    )


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_the_same_weights_have_the_same_losses_and_gradients(pair, their_losses, sparse):
    theirs = pair.theirs
    ours = our_detector(theirs, sampled_all(pair.recipe, sparse_loss=sparse)).train()
    x = torch.randn(1, 3, *CANVAS, generator=torch.Generator().manual_seed(1))
    found = ours.losses(x, torch.tensor([CANVAS]), Targets(BOXES[None], LABELS[None] - 1, torch.tensor([5])))
    sum(found[name].sum() for name in FasterRcnn.loss_names).backward()
    assert found["rpn_positive"] > len(BOXES)
    assert found["box_head_positive"] > len(BOXES) / (PROPOSALS + len(BOXES))  # proposals, not the truth alone
    for name, expected in their_losses.items():
        assert expected > 1e-4
        assert relative(expected, found[name]) < 1e-4, name
    assert ours.rpn.is_sparse == sparse
    fc1 = ours.box_head.fc1.weight.grad.reshape(1024, 49, 256).transpose(1, 2).flatten(1)
    for name, a, b in (
        ("rpn.conv", theirs.rpn.head.conv[0][0].weight.grad, ours.rpn.conv.weight.grad),
        ("rpn.deltas", theirs.rpn.head.bbox_pred.weight.grad, ours.rpn.deltas.weight.grad),
        ("fpn.output", theirs.backbone.fpn.layer_blocks[1][0].weight.grad, ours.fpn.output[1][0].weight.grad),
        ("layer3", theirs.backbone.body.layer3[0].conv2.weight.grad, ours.backbone.body.layer3[0].conv2.weight.grad),
        ("fc1", pair.first_layer.weight.grad, fc1),
    ):
        assert relative(a, b) < 1e-3, name
    assert ours.backbone.body.layer1[0].conv1.weight.grad is None


@pytest.fixture
def v2_in_float64() -> Iterator[Any]:
    theirs = their_detector(1e-5, make=fasterrcnn_resnet50_fpn_v2).double()
    torch.set_default_dtype(torch.float64)  # their anchors and proposals follow it
    yield theirs
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_batch_statistics_of_a_v2_detector_are_torchvisions_while_it_trains(v2_in_float64):
    theirs = v2_in_float64
    recipe = layout_of(theirs.state_dict()).recipe(Recipe(), 1e-5)
    assert recipe.bn_size == 16
    ours = our_detector(theirs, with_model(sampled_all(recipe), backbone={"frozen_stages": 0})).double().train()
    expected = losses_of(theirs.train())
    x = torch.randn(1, 3, *CANVAS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = ours.losses(x, torch.tensor([CANVAS]), Targets(BOXES[None].double(), LABELS[None] - 1, torch.tensor([5])))
    sum(found[name].sum() for name in FasterRcnn.loss_names).backward()
    for name, loss in expected.items():
        assert relative(loss, found[name]) < 1e-8, name
    convolutions = [
        (block[0], own[0]) for block, own in zip(theirs.roi_heads.box_head, ours.box_head.convolutions, strict=False)
    ]
    pairs = [*convolutions, (theirs.rpn.head.conv[0][0], ours.rpn.conv), (theirs.rpn.head.conv[1][0], ours.rpn.conv2)]
    pairs += [(theirs.backbone.fpn.inner_blocks[0][0], ours.fpn.lateral[0][0])]
    pairs += [(theirs.backbone.body.conv1, ours.backbone.body.conv1)]
    for a, b in pairs:
        assert relative(a.weight.grad, b.weight.grad) < 1e-6, a


def test_a_v2_file_gives_counters_too_where_its_statistics_are_trained():
    theirs = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    tensors = theirs.state_dict()
    tensors["backbone.fpn.inner_blocks.0.1.num_batches_tracked"] += 7
    ours = make_detector(torchvision_recipe(Recipe(), 1e-5, "fasterrcnn_resnet50_fpn_v2"), CLASSES)
    converted = convert_torchvision_weights(tensors, ours.state_dict())
    assert list(converted) == list(ours.state_dict())
    assert converted["fpn.lateral.0.1.num_batches_tracked"] == 7


@pytest.fixture(scope="module")
def tensors_and_wanted() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    return theirs.state_dict(), make_detector(torchvision_recipe(Recipe(), 1e-5), CLASSES).state_dict()


def test_every_tensor_of_ours_comes_from_theirs(tensors_and_wanted):
    tensors, wanted = tensors_and_wanted
    converted = convert_torchvision_weights(tensors, wanted)
    assert list(converted) == list(wanted)
    assert num_torchvision_classes(tensors) == CLASSES
    assert torch.equal(converted["box_head.classes.bias"][-1], tensors["roi_heads.box_predictor.cls_score.bias"][0])


def test_files_from_before_the_inner_index_are_read_too(tensors_and_wanted):
    tensors, wanted = tensors_and_wanted
    old = {}
    for name, tensor in tensors.items():
        for new_part, old_part in (("_blocks.{}.0.", "_blocks.{}."), ("rpn.head.conv.0.0.", "rpn.head.conv.")):
            for level in "0123":
                name = name.replace(new_part.format(level), old_part.format(level))
        old[name] = tensor
    assert old.keys() != tensors.keys()
    expected = convert_torchvision_weights(tensors, wanted)
    for name, tensor in convert_torchvision_weights(old, wanted).items():
        assert torch.equal(tensor, expected[name])


def without_fpn(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["backbone.fpn.inner_blocks.3.0.weight"]


def with_a_keypoint_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["roi_heads.keypoint_head.0.weight"] = torch.zeros(1)


def with_a_deeper_stage(tensors: dict[str, torch.Tensor]) -> None:
    tensors["backbone.body.layer3.6.conv1.weight"] = torch.zeros(256, 1024, 1, 1)


def with_a_thinner_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["rpn.head.conv.0.0.weight"] = torch.zeros(1)


def with_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["roi_heads.box_predictor.bbox_pred.bias"] = torch.tensor(1.0)


def with_whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["roi_heads.box_head.fc7.bias"] = torch.zeros(1024, dtype=torch.int64)


def with_a_flat_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["roi_heads.box_head.fc6.weight"] = torch.zeros(7)


def with_other_biases(tensors: dict[str, torch.Tensor]) -> None:
    tensors["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_a_number, r"tensor for box_head.deltas.bias has shape \(\), not \(20,\)"),
        (with_whole_numbers, "tensor for box_head.fc2.bias holds torch.int64, not torch.float32"),
        (with_a_flat_layer, r"tensor for box_head.fc1.weight has shape \(7,\)"),
        (with_other_biases, r"tensor for box_head.classes.bias has shape \(\), not \(6,\)"),
        (without_fpn, "no tensor for fpn.lateral.3.0.weight"),
        (with_a_keypoint_head, "roi_heads.keypoint_head.0.weight has no place"),
        (with_a_deeper_stage, "no place for the file's backbone.body.layer3.6.conv1.weight"),
        (with_a_thinner_layer, "rpn.conv.weight has shape"),
    ],
)
def test_weights_of_another_detector_are_refused_with_the_first_tensor_that_does_not_fit(
    damage, message, tensors_and_wanted
):
    tensors, wanted = dict(tensors_and_wanted[0]), tensors_and_wanted[1]
    damage(tensors)
    with pytest.raises(InputError, match=message):
        convert_torchvision_weights(tensors, wanted)


def test_a_file_without_a_classifier_is_refused():
    with pytest.raises(InputError, match="not a state dict of"):
        num_torchvision_classes({"fc.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"not a state dict of a detector of .*fasterrcnn_resnet50_fpn_v2"):
        layout_of({"fc.weight": torch.zeros(1)})


@pytest.mark.parametrize("shape", [(), (6,), (1, 1024), (6, 1023), (6, 1024, 1), (0, 1024)])
def test_a_classifier_of_another_shape_is_refused(shape):
    layer = "roi_heads.box_head.fc6.weight"  # by which the file is known
    tensors = {layer: torch.zeros(1), "roi_heads.box_predictor.cls_score.weight": torch.zeros(shape)}
    with pytest.raises(InputError, match=r"not \(classes \+ 1, 1024\)"):
        num_torchvision_classes(tensors)
