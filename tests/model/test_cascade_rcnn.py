"""The cascade beside a loop over its stages, images and RoIs one at a time, in plain arithmetic."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from factories import (
    SMALL_MASKS,
    TINY,
    TINY_FROZEN,
    gradients,
    make_masks,
    make_targets,
    masked_batch,
    of_kind,
    relative,
    tiny_detector,
    with_model,
)
from megdet.architecture import CascadeMaskRcnn as CascadeMaskRcnnRecipe
from megdet.architecture import CascadeRcnn as CascadeRcnnRecipe
from megdet.architecture_heads import Cascade as CascadeRecipe
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.model.box_head import BoxHead
from megdet.model.cascade_rcnn import STAGES, CascadeMaskRcnn, CascadeRcnn, stage_weights
from megdet.ops.roi_align import FeatureTable, feature_table
from megdet.recipe import Recipe
from megdet.structures import Batch

EASY = CascadeRecipe(positive_ious=(0.55, 0.6))
"""Overlaps that the boxes of random weights still reach."""


def cascade(recipe: Recipe, cascade: CascadeRecipe = EASY) -> Recipe:
    return of_kind(recipe, CascadeRcnnRecipe, cascade=cascade)


def cascade_with_masks(recipe: Recipe) -> Recipe:
    return of_kind(recipe, CascadeMaskRcnnRecipe, cascade=EASY, mask_head=replace(SMALL_MASKS, norm="none"))


NORMED = replace(TINY, model=TINY.model.with_norms({"fpn": "batch", "box_head": "batch"}))
RECIPES = {
    "frozen": cascade(TINY_FROZEN),
    "batch": cascade(NORMED),
    "recompute": replace(cascade(NORMED), recompute="block"),
    "masks": cascade_with_masks(TINY_FROZEN),
    "masks and batch": cascade_with_masks(NORMED),
}


def tiny_cascade(recipe: Recipe) -> CascadeRcnn:
    detector = tiny_detector(recipe)
    assert isinstance(detector, CascadeRcnn)
    with torch.no_grad():
        for head in detector.heads:
            head.classes.weight.copy_(torch.randn_like(head.classes.weight) * 0.2)
            head.deltas.weight.copy_(torch.randn_like(head.deltas.weight) * 0.1)
    return detector


def backward(detector: CascadeRcnn, batch: Batch) -> dict[str, Tensor]:
    losses = detector(batch)
    sum(losses[name].sum() for name in detector.loss_names).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def test_the_kinds_say_what_they_are_made_of():
    assert CascadeMaskRcnn.loss_names == (
        *("rpn_objectness", "rpn_box", "box_head_class", "box_head_box", "box_head_2_class", "box_head_2_box"),
        *("box_head_3_class", "box_head_3_box", "mask_head"),
    )
    for recipe in (RECIPES["frozen"], RECIPES["masks"]):
        detector = tiny_cascade(recipe)
        assert [name for name, _ in detector.named_children()] == list(detector.parts)
        for layer in (*detector.class_layers, *detector.small_start):
            detector.get_parameter(f"{layer}.weight")
        assert all(len(detector.get_parameter(f"{layer}.weight")) in (3, 4) for layer in detector.class_layers)


def test_the_deltas_of_the_stages_have_the_published_weights_and_one_regressor():
    assert [stage_weights(n) for n in (1, 2, 3)] == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    assert [head.deltas.out_features for head in tiny_cascade(RECIPES["frozen"]).heads] == [4, 4, 4]
    head = tiny_cascade(RECIPES["frozen"]).box_head_2
    sampled = head.match(
        torch.tensor([[[0.0, 0.0, 10.0, 10.0]]]), torch.tensor([[True]]), make_targets([([1.0, 0.0, 11.0, 10.0], 2)])
    )
    assert sampled.labels.tolist() == [[2]]
    torch.testing.assert_close(sampled.deltas, torch.tensor([[[2.0, 0.0, 0.0, 0.0]]]))  # 20 x 1 px of 10


def looked(detector: CascadeRcnn, head: BoxHead, table: FeatureTable, box: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and deltas of one RoI of the only image."""
    rois = box.reshape(1, 1, 4)
    logits, deltas = head(lambda: detector.pooling(table, rois), torch.ones(1, 1, dtype=torch.bool))
    return logits[0, 0], deltas[0, 0, 0]


def moved_by_hand(box: Tensor, deltas: Tensor, weights: tuple[float, ...], size: Tensor) -> Tensor:
    x1, y1, x2, y2 = box.tolist()
    dx, dy, dw, dh = (float(d) / w for d, w in zip(deltas, weights, strict=True))
    x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
    w = (x2 - x1) * math.exp(min(dw, math.log(62.5)))
    h = (y2 - y1) * math.exp(min(dh, math.log(62.5)))
    height, width = size.tolist()
    corners = [(x - w / 2, width), (y - h / 2, height), (x + w / 2, width), (y + h / 2, height)]
    return torch.tensor([min(max(value, 0.0), edge) for value, edge in corners], dtype=torch.float64)


def test_the_losses_are_those_of_a_loop_over_stages_and_rois():
    ious = (0.2, 0.25, 0.3)
    recipe = with_model(TINY_FROZEN, box_head={"samples": 24, "positive_fraction": 0.5, "positive_iou": ious[0]})
    detector = tiny_cascade(cascade(recipe, CascadeRecipe(ious[1:]))).double().requires_grad_(False)
    for head in detector.heads:
        head.deltas.weight *= 2
    batch = masked_batch(3)
    found = detector(batch)
    positives = []
    for i in range(3):
        own = batch[i : i + 1]
        images = detector.normalized(own.pixels, own.sizes)
        pyramid = detector.features(images)
        targets = replace(own.targets, boxes=own.targets.boxes.double())
        proposals = detector.propose(pyramid, (64, 64), own.sizes).proposals
        sampled = detector.box_head.sample(proposals, targets)
        table = feature_table(pyramid)
        truth, labels = targets.boxes[0][targets.is_box[0]], targets.labels[0][targets.is_box[0]]
        boxes = sampled.boxes[0][sampled.is_valid[0]]
        for number, (stage, iou, factor) in enumerate(zip(STAGES, ious, EASY.loss_weights, strict=True), start=1):
            head = getattr(detector, stage)
            weights = [number * w for w in (10, 10, 5, 5)]
            class_loss, box_loss, after = 0.0, 0.0, []
            positives.append(0)
            for box in boxes:
                logits, deltas = looked(detector, head, table, box)
                overlap, place = box_iou(box.reshape(1, 4), truth)[0].max(0)
                is_positive = overlap >= iou
                label = int(labels[place]) if is_positive else 3
                class_loss += float(logits.logsumexp(0) - logits[label])
                if is_positive:
                    positives[-1] += 1
                    x1, y1, x2, y2 = box.tolist()
                    u1, v1, u2, v2 = truth[place].tolist()
                    w, h = x2 - x1, y2 - y1
                    wanted = [
                        ((u1 + u2) / 2 - (x1 + x2) / 2) / w,
                        ((v1 + v2) / 2 - (y1 + y2) / 2) / h,
                        math.log((u2 - u1) / w),
                        math.log((v2 - v1) / h),
                    ]
                    for value, target, weight in zip(deltas.tolist(), wanted, weights, strict=True):
                        d = abs(value - target * weight)
                        box_loss += d - 1 / 18 if d > 1 / 9 else d * d * 4.5
                after.append(moved_by_hand(box, deltas, weights, own.sizes[0]))
            assert float(found[f"{stage}_class"][i]) == pytest.approx(factor * class_loss / len(boxes), rel=1e-9)
            assert float(found[f"{stage}_box"][i]) == pytest.approx(factor * box_loss / len(boxes), rel=1e-9)
            assert float(found[f"{stage}_positive"][i]) == pytest.approx(positives[-1] / len(boxes))
            boxes = torch.stack([box for box in after if min(box[2] - box[0], box[3] - box[1]) >= 1e-3])
    assert min(max(positives[stage::3]) for stage in range(3)) > 1  # every stage has some
    assert len({tuple(positives[stage::3]) for stage in range(3)}) > 1


def test_detections_are_those_of_a_loop_over_proposals():
    recipe = cascade(with_model(TINY_FROZEN, box_head={"score_threshold": 0.2, "detections": 40}))
    detector = tiny_cascade(recipe).double().eval()
    batch = masked_batch(1)
    images = detector.normalized(batch.pixels, batch.sizes)
    found = detector.detect(images, batch.sizes)
    with torch.no_grad():
        pyramid = detector.features(images)
        table = feature_table(pyramid)
        proposals = detector.propose(pyramid, (64, 64), batch.sizes).proposals
        boxes, scores, labels = [], [], []
        for box in proposals.boxes[0][proposals.is_valid[0]]:
            for number, head in enumerate(detector.heads[:2], start=1):
                weights = [number * w for w in (10, 10, 5, 5)]
                box = moved_by_hand(box, looked(detector, head, table, box)[1], weights, batch.sizes[0])
            looks = [looked(detector, head, table, box) for head in detector.heads]
            mean = sum(logits.softmax(0) for logits, _ in looks) / 3
            last = moved_by_hand(box, looks[-1][1], [30, 30, 15, 15], batch.sizes[0])
            for label in range(3):
                if mean[label] > 0.2 and min(last[2] - last[0], last[3] - last[1]) >= 0.01:
                    boxes.append(last)
                    scores.append(mean[label])
                    labels.append(label)
    boxes, scores, labels = torch.stack(boxes), torch.stack(scores), torch.tensor(labels)
    kept = batched_nms(boxes, scores, labels, 0.5)[:40]
    count = int((found.labels[0] >= 0).sum())
    assert count == len(kept) > 3
    assert torch.equal(found.labels[0, :count], labels[kept])
    torch.testing.assert_close(found.scores[0, :count], scores[kept])
    torch.testing.assert_close(found.boxes[0, :count], boxes[kept])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_loss_is_there_for_every_image_and_reaches_every_parameter(recipe):
    detector = tiny_cascade(recipe)
    losses = backward(detector, masked_batch(2))
    assert tuple(sorted(losses)) == tuple(sorted(detector.reported()))
    assert all(losses[name].shape == (2,) and losses[name].isfinite().all() for name in losses)
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert [name for name, own in found.items() if not own.isfinite().all() or own.eq(0).all()] == []


@pytest.mark.parametrize("recipe", [RECIPES["frozen"], RECIPES["masks"]], ids=["boxes", "masks"])
def test_two_separate_batches_are_the_halves_of_the_joint_one(recipe):
    detector = tiny_cascade(recipe).double()
    batch = masked_batch(4)
    joint, joint_gradients = backward(detector, batch), gradients(detector)
    first, rest = backward(detector, batch[0:1]), backward(detector, batch[1:4])
    added = gradients(detector)
    for name in joint:
        assert relative(joint[name], torch.cat([first[name], rest[name]])) < 1e-12, name
    for name, gradient in joint_gradients.items():
        assert relative(gradient, added[name]) < 1e-12, name


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_no_images_give_empty_losses_and_gradients_of_zero_for_every_parameter(recipe):
    detector = tiny_cascade(recipe)
    losses = backward(detector, masked_batch(2)[0:0])
    assert all(loss.shape == (0,) for loss in losses.values())
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert all(gradient.eq(0).all() for gradient in found.values())
    assert all(m.step_var.isfinite().all() for m in detector.modules() if isinstance(m, CrossDeviceBatchNorm))


def test_images_without_boxes_have_box_and_mask_losses_of_zero():
    detector = tiny_cascade(RECIPES["masks and batch"])
    empty = make_targets([], [], width=0)
    empty.masks = make_masks(torch.zeros(0, 64, 64), torch.zeros(0, 64, 64))
    losses = backward(detector, replace(masked_batch(2), targets=empty))
    for name in ("mask_head", *(f"{stage}_box" for stage in STAGES)):
        assert losses[name].eq(0).all()
    for stage in STAGES:
        assert (losses[f"{stage}_class"] > 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients(detector).values())


def test_detections_have_masks_of_the_last_boxes():
    detector = tiny_cascade(RECIPES["masks"]).eval()
    batch = masked_batch(2)
    images = detector.normalized(batch.pixels, batch.sizes)
    found = detector.detect(images, batch.sizes)
    is_found = found.labels >= 0
    assert is_found.any(1).all()
    table = feature_table(detector.features(images))
    torch.testing.assert_close(found.masks, detector.mask_head.masks(table, replace(found, masks=None)))
    assert found.masks[is_found].std() > 1e-4
    assert found.masks[~is_found].eq(0).all()
