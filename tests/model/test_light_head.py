from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import ps_roi_align

from factories import TINY, gradients, random_boxes, relative, tiny_batch
from megdet.architecture import Rfcn
from megdet.architecture_heads import PositionSensitiveHead
from megdet.architecture_parts import AtrousBackbone, SingleLevelAnchors
from megdet.bounds import faults_of
from megdet.distributed.lane import SINGLE_LANE
from megdet.layers.convert import norm_factory
from megdet.model.choice import make_detector
from megdet.model.light_head import LightHead

HEAD = PositionSensitiveHead(
    light_kernel=5,
    light_channels=6,
    thin_channels=2,
    layer_channels=12,
    pool_size=3,
    samples=16,
    detections=10,
    score_threshold=0.01,
)
LIGHT = replace(
    TINY,
    model=Rfcn(
        backbone=AtrousBackbone(name="test_resnet"),
        anchors=SingleLevelAnchors(sizes=(12.0, 24.0, 48.0)),
        rpn=TINY.model.rpn,
        box_head=HEAD,
    ),
)
LIGHT_FROZEN = replace(LIGHT, bn_size=0, group_size=2)


def test_a_look_is_the_layers_over_torchvisions_pooling_of_the_thin_map():
    torch.manual_seed(0)
    head = LightHead(HEAD, 4, 16, 3, norm_factory("none")).double()
    (thin,) = head(torch.randn(2, 4, 6, 8, dtype=torch.float64))
    assert thin.shape == (2, 9 * 2, 6, 8)
    assert (thin >= 0).all()
    rois = random_boxes(10, dtype=torch.float64).reshape(2, 5, 4)
    logits, deltas = head.vote([thin], rois)
    flat = torch.cat([torch.arange(2.0).double().repeat_interleave(5).unsqueeze(1), rois.flatten(0, 1)], 1)
    theirs = thin.unflatten(1, (9, 2)).transpose(1, 2).flatten(1, 2)  # torchvision: the channels of a kind first
    pooled = ps_roi_align(theirs, flat, 3, 1 / 16, HEAD.sampling_ratio).permute(0, 2, 3, 1).flatten(1)
    hidden = F.relu(pooled @ head.fc.weight.T + head.fc.bias)
    assert relative(head.classes(hidden), logits.flatten(0, 1)) < 1e-10
    assert relative(head.deltas(hidden), deltas.flatten(0, 2)) < 1e-10


def test_its_map_is_thin_and_does_not_grow_with_the_classes():
    few, many = (LightHead(HEAD, 4, 16, classes, norm_factory("none")) for classes in (3, 80))
    assert [few(torch.zeros(1, 4, 2, 2))[0].shape, many(torch.zeros(1, 4, 2, 2))[0].shape] == [(1, 18, 2, 2)] * 2


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_every_weight_is_trained_and_a_recomputed_step_has_the_same_bits(norm):
    found = []
    for plan in ("none", "block"):
        torch.manual_seed(0)
        recipe = replace(LIGHT, recompute=plan, model=LIGHT.model.with_norms({"box_head": norm}))
        detector = make_detector(recipe, 3, SINGLE_LANE)
        assert isinstance(detector.box_head, LightHead)
        losses = detector(tiny_batch(2))
        assert losses.keys() == set(detector.reported())
        sum(losses[name].sum() for name in detector.loss_names).backward()
        found.append(gradients(detector))
    plain, again = found
    assert all(torch.equal(value, again[name]) for name, value in plain.items())
    own = {name: value for name, value in plain.items() if name.startswith("box_head")}
    assert own.keys() == {f"box_head.{name}" for name, _ in detector.box_head.named_parameters()}
    assert all(value.any() and value.isfinite().all() for value in own.values())


def test_its_detections_are_those_of_its_own_logits():
    torch.manual_seed(0)
    detector, batch = make_detector(LIGHT_FROZEN, 3).eval(), tiny_batch(2)
    with torch.no_grad():
        detector.box_head.classes.weight.mul_(50)
        images = detector.normalized(batch.pixels, batch.sizes)
        c4, thin = detector.features(images)
        proposals = detector.propose(c4, images, batch.sizes).proposals
        logits, _ = detector.box_head.vote([thin], proposals.boxes)
        found = detector.detect(images, batch.sizes)
    best = (logits.softmax(2)[..., :3] * proposals.is_valid.unsqueeze(2)).flatten(1).amax(1)
    assert relative(best, found.scores[:, 0]) < 1e-6


def test_a_kernel_without_a_middle_is_refused():
    model = replace(LIGHT.model, box_head=replace(HEAD, light_kernel=4))
    assert list(faults_of(model, "model.")) == [
        ("model.box_head.light_kernel", "it must be an odd number from 3 on, or 0")
    ]
