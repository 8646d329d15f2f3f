"""Torchvision's Mask R-CNN is the reference; what Faster R-CNN's tests ask of every image is asked here with masks."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from factories import (
    SMALL_MASKS,
    TINY,
    TINY_FROZEN,
    ellipses,
    gradients,
    make_masks,
    make_targets,
    masked_batch,
    of_kind,
    relative,
    tiny_detector,
    with_model,
)
from megdet.architecture import MaskRcnn as MaskRcnnRecipe
from megdet.layers.batch_norm import CrossDeviceBatchNorm, finish_step
from megdet.model.choice import make_detector
from megdet.model.mask_rcnn import MaskRcnn
from megdet.model.torchvision_weights import convert_torchvision_weights, torchvision_recipe
from megdet.recipe import Recipe
from megdet.structures import Batch, Targets
from small_runs import ALONE
from torchvision_models import CLASSES, their_detector

CANVAS = (160, 224)
BOXES = torch.tensor([[50.0, 60.0, 150.0, 150.0], [10.0, 10.0, 60.0, 90.0], [100.0, 20.0, 200.0, 80.0]])
LABELS = torch.tensor([3, 1, 5])
PROPOSALS = 200


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return their_detector(1e-5, has_masks=True)


def our_detector(theirs: nn.Module, recipe: Recipe) -> MaskRcnn:
    ours = make_detector(recipe, CLASSES)
    assert isinstance(ours, MaskRcnn)
    ours.load_state_dict(convert_torchvision_weights(theirs.state_dict(), ours.state_dict()))
    return ours.eval()


def noise() -> torch.Tensor:
    return torch.randn(1, 3, *CANVAS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_the_same_weights_detect_the_same_boxes_and_masks(theirs, name):
    if name.endswith("v2"):
        theirs = their_detector(1e-5, has_masks=True, make=maskrcnn_resnet50_fpn_v2)
    ours = our_detector(theirs, torchvision_recipe(Recipe(), 1e-5, name))
    x = noise()
    with torch.no_grad():
        features = theirs.backbone(x)
        proposals, _ = theirs.rpn(ImageList(x, [CANVAS]), features)
        (expected,), _ = theirs.roi_heads(features, proposals, [CANVAS])
    found = ours.detect(x, torch.tensor([CANVAS]))
    count = len(expected["boxes"])
    assert count >= 20
    assert torch.equal(found.labels[0, :count], expected["labels"] - 1)
    assert (found.scores[0, :count] - expected["scores"]).abs().max() < 1e-4
    assert (found.boxes[0, :count] - expected["boxes"]).abs().max() < 1e-2
    assert found.masks.shape == (1, 100, 28, 28)
    assert expected["masks"].std() > 0.05
    assert (found.masks[0, :count] - expected["masks"][:, 0]).abs().max() < 1e-4
    assert found.masks[0, count:].eq(0).all()


def test_the_same_weights_have_the_same_losses_and_gradients(theirs):
    recipe = torchvision_recipe(Recipe(), 1e-5, "maskrcnn_resnet50_fpn")
    sampling = {"samples": 2 * PROPOSALS, "positive_fraction": 0.5}
    recipe = with_model(recipe, rpn={"samples": 10_000, "train_proposals": PROPOSALS}, box_head=sampling)
    ours = our_detector(theirs, recipe).train()
    masks = ellipses(BOXES, CANVAS)
    targets = Targets(BOXES[None], LABELS[None] - 1, torch.tensor([5]), make_masks(masks))
    found = ours.losses(noise(), torch.tensor([CANVAS]), targets)
    sum(found[name].sum() for name in MaskRcnn.loss_names).backward()

    theirs.train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for sampler in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = 10**6, 0.5
    theirs.rpn._post_nms_top_n["training"] = PROPOSALS
    features = theirs.backbone(noise())
    truth = [{"boxes": BOXES, "labels": LABELS, "masks": masks}]
    proposals, losses = theirs.rpn(ImageList(noise(), [CANVAS]), features, truth)
    losses |= theirs.roi_heads(features, proposals, [CANVAS], truth)[1]
    sum(losses.values()).backward()
    names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
    assert found["box_head_positive"] > len(BOXES) / (PROPOSALS + len(BOXES))
    for name, expected in zip(MaskRcnn.loss_names, names, strict=True):
        assert relative(losses[expected].reshape(1), found[name]) < 1e-4, name
    upsample = theirs.roi_heads.mask_predictor.conv5_mask.weight.grad
    logits = theirs.roi_heads.mask_predictor.mask_fcn_logits.weight.grad[1:].flatten(1)
    for name, a, b in (
        ("logits", logits, ours.mask_head.logits.weight.grad),
        ("upsample", upsample, ours.mask_head.upsample.weight.grad),
        ("first", theirs.roi_heads.mask_head[0][0].weight.grad, ours.mask_head.convolutions[0].weight.grad),
        ("fpn.output", theirs.backbone.fpn.layer_blocks[1][0].weight.grad, ours.fpn.output[1][0].weight.grad),
    ):
        assert a.abs().max() > 0
        assert relative(a, b) < 1e-3, name


def test_files_from_before_the_inner_index_are_read_too(theirs):
    tensors = theirs.state_dict()
    wanted = make_detector(torchvision_recipe(Recipe(), 1e-5, "maskrcnn_resnet50_fpn"), CLASSES).state_dict()
    old = {}
    for name, tensor in tensors.items():
        for i in range(4):
            name = name.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
        old[name] = tensor
    assert old.keys() != tensors.keys()
    expected = convert_torchvision_weights(tensors, wanted)
    for name, tensor in convert_torchvision_weights(old, wanted).items():
        assert torch.equal(tensor, expected[name]), name


def with_masks(recipe: Recipe, **mask_head: object) -> Recipe:
    return of_kind(recipe, MaskRcnnRecipe, mask_head=replace(SMALL_MASKS, **mask_head))


NORMED = with_masks(TINY, norm="batch")
RECIPES = {
    "frozen": with_masks(TINY_FROZEN),
    "batch": NORMED,
    "group": with_masks(TINY, norm="group"),
    "recompute": replace(NORMED, recompute="block"),
}


def tiny_mask_rcnn(recipe: Recipe) -> MaskRcnn:
    detector = tiny_detector(recipe)
    assert isinstance(detector, MaskRcnn)
    with torch.no_grad():
        detector.mask_head.logits.weight.mul_(200)
    return detector


def backward(detector: MaskRcnn, batch: Batch) -> dict[str, torch.Tensor]:
    losses = detector(batch)
    sum(losses[name].sum() for name in MaskRcnn.loss_names).backward()
    return {name: loss.detach() for name, loss in losses.items()}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_mask_loss_is_there_for_every_image_and_reaches_every_parameter(recipe):
    detector = tiny_mask_rcnn(recipe)
    losses = backward(detector, masked_batch(2))
    assert losses["mask_head"].shape == (2,)
    assert (losses["mask_head"] > 0).all()
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert [name for name, own in found.items() if not own.isfinite().all() or own.eq(0).all()] == []


def test_a_recomputed_head_has_the_bits_of_a_kept_one():
    results = []
    for recompute in ("none", "block"):
        detector = tiny_mask_rcnn(replace(NORMED, recompute=recompute))
        results.append(backward(detector, masked_batch(2)) | gradients(detector))
        results[-1] |= {name: norm.step_mean for name, norm in detector.named_modules() if hasattr(norm, "step_mean")}
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)


def test_two_separate_batches_are_the_halves_of_the_joint_one():
    detector = tiny_mask_rcnn(with_masks(TINY_FROZEN)).double()
    batch = masked_batch(4)
    joint, joint_gradients = backward(detector, batch), gradients(detector)
    first, rest = backward(detector, batch[0:1]), backward(detector, batch[1:4])
    added = gradients(detector)
    for name in joint:
        assert relative(joint[name], torch.cat([first[name], rest[name]])) < 1e-12, name
    for name, gradient in joint_gradients.items():
        assert relative(gradient, added[name]) < 1e-12, name


def test_padded_columns_stay_out_of_loss_gradients_and_statistics(monkeypatch):
    """As on a GPU, where all columns that could be positive are computed."""
    results = []
    for is_padded in (False, True):
        if is_padded:
            monkeypatch.setattr("megdet.model.mask_head.filled_columns", lambda is_valid, **_least: is_valid.shape[1])
        detector = tiny_mask_rcnn(NORMED).double()
        results.append(backward(detector, masked_batch(3)) | gradients(detector))
        results[-1] |= {f"mean {i}": norm.step_mean for i, norm in enumerate(detector.mask_head.norms)}
    for name, value in results[0].items():
        assert relative(value, results[1][name]) < 1e-9, name


def test_images_without_boxes_or_without_masks_have_a_mask_loss_of_zero():
    batch = masked_batch(2)
    empty = make_targets([], [], width=0)
    empty.masks = make_masks(torch.zeros(0, 64, 64), torch.zeros(0, 64, 64))
    blind = replace(batch.targets, masks=make_masks(*[torch.zeros(2, 64, 64)] * 2, width=batch.targets.boxes.shape[1]))
    for recipe in (RECIPES["frozen"], NORMED):
        for targets in (empty, blind):
            detector = tiny_mask_rcnn(recipe)
            losses = backward(detector, replace(batch, targets=targets))
            assert losses["mask_head"].eq(0).all()
            found = gradients(detector)
            assert found.keys() == dict(detector.named_parameters()).keys()
            assert all(gradient.isfinite().all() for gradient in found.values())
            assert all(found[name].eq(0).all() for name in found if name.startswith("mask_head."))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_no_images_give_empty_losses_and_gradients_of_zero_for_every_parameter(recipe):
    detector = tiny_mask_rcnn(recipe)
    losses = backward(detector, masked_batch(2)[0:0])
    assert all(loss.shape == (0,) for loss in losses.values())
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert all(gradient.eq(0).all() for gradient in found.values())


def test_a_group_without_positives_leaves_the_running_statistics_of_the_mask_head():
    detector = tiny_mask_rcnn(NORMED)
    blind = replace(masked_batch(2).targets, masks=make_masks(*[torch.zeros(2, 64, 64)] * 2))
    backward(detector, replace(masked_batch(2), targets=blind))
    norms = [norm for norm in detector.mask_head.norms if isinstance(norm, CrossDeviceBatchNorm)]
    before = [norm.running_var.clone() for norm in norms]
    finish_step(norms, 1, ALONE)
    for norm, var in zip(norms, before, strict=True):
        torch.testing.assert_close(norm.running_var, var)


def test_detections_have_the_masks_of_their_own_classes_whoever_else_is_detected():
    detector = tiny_mask_rcnn(RECIPES["frozen"]).eval()
    batch = masked_batch(3)
    found = detector.detect(detector.normalized(batch.pixels, batch.sizes), batch.sizes)
    assert found.masks.shape == (3, 10, 10, 10)
    is_found = found.labels >= 0
    assert is_found.any(1).all()
    assert found.masks[~is_found].eq(0).all()
    assert (found.masks[is_found] > 0).all()
    assert found.masks[is_found].std() > 0.01
    for i in range(3):
        alone = batch[i : i + 1]
        own = detector.detect(detector.normalized(alone.pixels, alone.sizes), alone.sizes)
        torch.testing.assert_close(own.masks[0], found.masks[i], rtol=1e-4, atol=1e-4)
    nothing = batch[0:0]
    none = detector.detect(detector.normalized(nothing.pixels, nothing.sizes), nothing.sizes)
    assert none.masks.shape == (0, 10, 10, 10)


def test_bfloat16_losses_are_those_of_float32_within_its_precision():
    detector = tiny_mask_rcnn(RECIPES["frozen"])
    exact = detector(masked_batch(2))
    with torch.autocast("cpu", torch.bfloat16):
        rough = backward(detector, masked_batch(2))
    assert rough["mask_head"].dtype == torch.float32
    assert relative(exact["mask_head"], rough["mask_head"]) < 0.2
