"""Detectors whose box heads look at more than the RoI, in every norm and precision."""

from dataclasses import replace

import pytest
import torch

from factories import TINY, TINY_FROZEN, gradients, masked_batch, of_kind, relative, tiny_detector, with_model
from megdet.architecture import CascadeRcnn
from megdet.model.detector import Detector
from megdet.ops.roi_align import feature_table
from megdet.precision import arithmetic
from megdet.precision import backward as precise_backward
from megdet.recipe import Recipe
from megdet.structures import Batch

EVERYTHING = {
    "convolutions": 2,
    "convolution_channels": 32,
    "block": "inception",
    "maxout": True,
    "regions": ("enlarged", "left"),
    "global_context": True,
    "pool_size": 3,
}


def with_everything(recipe: Recipe, **keys: object) -> Recipe:
    return with_model(recipe, backbone={"name": "test_resnet"}, box_head=EVERYTHING | keys)


RECIPES = {
    "frozen": with_everything(TINY_FROZEN),
    "batch": with_everything(TINY, norm="batch"),
    "group": with_everything(TINY, norm="group"),
    "batch, hard": with_everything(TINY, norm="batch", sampling="hard", hard_nms_iou=0.7),
    "recompute, hard": replace(with_everything(TINY, norm="batch", sampling="hard"), recompute="block"),
    "cascade": of_kind(with_everything(TINY_FROZEN), CascadeRcnn),
}


def total(detector: Detector, batch: Batch) -> torch.Tensor:
    losses = detector(batch)
    return sum(losses[name].sum() for name in detector.loss_names)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_part_of_every_stream_learns(recipe):
    detector = tiny_detector(recipe).double()
    total(detector, masked_batch(2)).backward()
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert all(own.isfinite().all() for own in found.values())
    assert [name for name, own in found.items() if name.startswith("box_head") and own.eq(0).all()] == []
    total(detector, masked_batch(2)[0:0]).backward()
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert all(own.eq(0).all() for own in found.values())


@pytest.mark.parametrize("recipe", [RECIPES["frozen"], RECIPES["cascade"]], ids=["faster", "cascade"])
def test_images_apart_train_and_are_looked_at_as_together(recipe):
    detector = tiny_detector(recipe).double()
    batch = masked_batch(2)
    total(detector, batch).backward()
    joint = gradients(detector)
    for i in range(2):
        total(detector, batch[i : i + 1]).backward()
    added = gradients(detector)
    assert max(relative(own, added[name]) for name, own in joint.items()) < 1e-12
    detector.eval()
    images = detector.normalized(batch.pixels, batch.sizes)
    whole = detector.detect(images, batch.sizes)
    for i in range(2):
        own = detector.detect(images[i : i + 1], batch.sizes[i : i + 1])
        torch.testing.assert_close(own.boxes, whole.boxes[i : i + 1])
        torch.testing.assert_close(own.scores, whole.scores[i : i + 1])
    assert (whole.labels >= 0).sum() > 3


def test_the_stages_of_a_cascade_look_each_at_the_regions_of_the_last_boxes():
    detector = tiny_detector(RECIPES["cascade"]).double().eval()
    batch = masked_batch(2)
    with torch.no_grad():
        maps = detector.features(detector.normalized(batch.pixels, batch.sizes))
        table = feature_table(maps)
        proposals = detector.propose(maps, (64, 64), batch.sizes).proposals
        found = detector.roi_detections(table, proposals, batch.sizes)
        for head in detector.heads[:2]:
            _, deltas = detector.refine(table, batch.sizes, proposals.boxes, proposals.is_valid, head)
            moved = detector.moved(head, deltas, proposals.boxes, proposals.is_valid, batch.sizes)
            proposals = replace(proposals, boxes=moved[0], is_valid=moved[1])
        looks = [
            detector.refine(table, batch.sizes, proposals.boxes, proposals.is_valid, head) for head in detector.heads
        ]
        scores = torch.stack([logits.softmax(2) for logits, _ in looks]).mean(0)
        wanted = detector.heads[2].detections(scores, looks[2][1], proposals, batch.sizes)
    torch.testing.assert_close(found.scores, wanted.scores)
    torch.testing.assert_close(found.boxes, wanted.boxes)
    assert len({name for name in detector.state_dict() if "around.image.fc1" in name}) == 3


def test_bfloat16_stays_near_float32():
    batch = masked_batch(2)
    found = []
    for precision in ("float32", "bfloat16"):
        detector = tiny_detector(RECIPES["batch, hard"])
        with arithmetic(precision, torch.device("cpu")):
            loss = total(detector, batch)
        precise_backward(loss, precision)
        assert all(own.isfinite().all() for own in gradients(detector).values())
        found.append(float(loss.detach()))
    assert found[1] == pytest.approx(found[0], rel=0.1)
