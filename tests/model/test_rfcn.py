"""R-FCN as a whole; that it depends on no devices is a case of the tests of `verify`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import ps_roi_align

from factories import TINY, gradients, make_targets, relative, tiny_batch
from megdet.architecture import Rfcn
from megdet.architecture_heads import PositionSensitiveHead
from megdet.architecture_parts import AtrousBackbone, SingleLevelAnchors
from megdet.contract.verify import verify
from megdet.inference.fold import fold_batch_norms
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.deformable import DeformableConv2d
from megdet.model import rfcn
from megdet.model.choice import make_detector
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.structures import Batch

SMALL = replace(
    TINY,
    model=Rfcn(
        backbone=AtrousBackbone(name="test_resnet"),
        anchors=SingleLevelAnchors(sizes=(12.0, 24.0, 48.0)),
        rpn=TINY.model.rpn,
        box_head=PositionSensitiveHead(channels=24, pool_size=3, samples=16, detections=10, score_threshold=0.01),
    ),
)
FROZEN = replace(SMALL, bn_size=0, group_size=2)
DEFORMABLE = replace(
    SMALL, model=replace(SMALL.model, backbone=replace(SMALL.model.backbone, deformable_stages=(4, 5)))
)
NORMED = replace(SMALL, model=SMALL.model.with_norms({"rpn": "batch", "box_head": "batch"}))
RECIPES = {"frozen": FROZEN, "batch": SMALL, "all_batch": NORMED, "deformable": DEFORMABLE}


def detector_of(recipe: Recipe = FROZEN) -> rfcn.Rfcn:
    """A detector whose every layer counts."""
    torch.manual_seed(0)
    detector = make_detector(recipe, 3)
    assert isinstance(detector, rfcn.Rfcn)
    with torch.no_grad():
        for name, tensor in detector.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bias")):
                tensor.normal_(0, 0.1)
            elif not tensor.any() and tensor.dim() == 1:  # the last norm of a block, which silences it
                tensor.uniform_(0.2, 0.5)
        for layer, factor in detector.small_start.items():
            detector.get_parameter(f"{layer}.weight").mul_(factor)
        for module in detector.modules():
            if isinstance(module, DeformableConv2d):
                nn.init.normal_(module.offsets.weight, std=0.02)
    return detector


def backward(detector: rfcn.Rfcn, batch: Batch) -> dict[str, torch.Tensor]:
    losses = detector(batch)
    sum(losses[name].sum() for name in detector.loss_names).backward()
    return {name: loss.detach() for name, loss in losses.items()}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_loss_is_there_for_every_image_and_reaches_every_parameter(recipe):
    detector = detector_of(recipe)
    losses = backward(detector, tiny_batch(2))
    assert losses.keys() == set(detector.reported())
    assert all(losses[name].shape == (2,) and (losses[name] > 0).all() for name in detector.loss_names)
    found = gradients(detector)
    assert found.keys() == {name for name, p in detector.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert [name for name, gradient in found.items() if not gradient.any()] == []


def test_two_separate_batches_are_the_halves_of_the_joint_one():
    detector, batch = detector_of().double(), tiny_batch(4)
    joint, joint_gradients = backward(detector, batch), gradients(detector)
    first, rest = backward(detector, batch[0:1]), backward(detector, batch[1:4])  # gradients add up
    added = gradients(detector)
    for name in joint:
        assert relative(joint[name], torch.cat([first[name], rest[name]])) < 1e-12, name
    for name, gradient in joint_gradients.items():
        assert relative(gradient, added[name]) < 1e-12, name


@pytest.mark.parametrize("recipe", [FROZEN, DEFORMABLE], ids=["frozen", "deformable"])
@pytest.mark.parametrize("plan", ["block", "stage", "sqrt"])
def test_a_recomputed_forward_gives_the_same_bits(recipe, plan):
    found = []
    for own in (recipe, replace(recipe, recompute=plan)):
        detector = detector_of(own)
        found.append(backward(detector, tiny_batch(2)) | gradients(detector) | dict(detector.named_buffers()))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("width", [0, 2])
def test_images_without_boxes_and_shares_without_images_have_gradients_of_every_parameter(width):
    detector, batch = detector_of(SMALL), tiny_batch(2)
    losses = backward(detector, replace(batch, targets=make_targets([], [], width=width)))
    assert losses["box_head_box"].eq(0).all()
    assert (losses["box_head_class"] > 0).all()
    found = gradients(detector)
    assert found["box_head.deltas.weight"].eq(0).all()
    assert backward(detector, batch[0:0])["box_head_class"].shape == (0,)
    empty = gradients(detector)
    assert found.keys() == empty.keys() == dict(detector.named_parameters()).keys()
    assert all(gradient.eq(0).all() for gradient in empty.values())


def test_the_sparse_loss_of_its_rpn_is_the_dense_one():
    _, change = rfcn.Rfcn.equal_variants["dense-rpn"]
    dense = detector_of(replace(FROZEN, model=change(FROZEN.model))).double()
    sparse = detector_of().double()
    assert (sparse.rpn.is_sparse, dense.rpn.is_sparse) == (True, False)
    expected, found = (backward(detector, tiny_batch(2)) | gradients(detector) for detector in (dense, sparse))
    assert all(relative(value, found[name]) < 1e-10 for name, value in expected.items())


def test_the_rpn_sees_c4_and_the_maps_are_those_of_an_atrous_c5():
    detector = detector_of()
    assert detector.backbone.strides == (4, 8, 16, 16)
    c4, classes, deltas = detector.features(torch.randn(1, 3, 64, 96))
    assert c4.shape == (1, detector.backbone.channels[2], 4, 6)
    assert classes.shape == (1, 9 * 4, 4, 6)
    assert deltas.shape == (1, 9 * 4, 4, 6)
    found = detector.propose(c4, torch.zeros(1, 3, 64, 96), torch.tensor([[64, 96]]))
    assert [anchors.shape for anchors in found.anchors] == [(4 * 6 * 9, 4)]
    assert found.proposals.boxes.shape == (1, 30, 4)


def test_its_logits_are_those_of_torchvisions_operator_and_its_detections_follow_from_them():
    detector, batch = detector_of().eval(), tiny_batch(1)
    images = detector.normalized(batch.pixels, batch.sizes)
    head = detector.box_head
    with torch.no_grad():
        c4, classes, deltas = detector.features(images)
        *_, c5 = detector.backbone(images)
        hidden = F.relu(head.conv(c5))
        proposals = detector.propose(c4, images, batch.sizes).proposals
        rois = torch.cat([torch.zeros(30, 1), proposals.boxes[0]], 1)
        voted = []
        for layer, channels in ((head.classes, 4), (head.deltas, 4)):
            maps = layer(hidden).unflatten(1, (9, channels)).transpose(1, 2).flatten(1, 2)  # torchvision: classes first
            voted.append(ps_roi_align(maps, rois, 3, 1 / 16, 2).mean((2, 3)))
        logits, boxes = head.vote([classes, deltas], proposals.boxes)
        assert relative(voted[0], logits[0]) < 1e-5
        assert relative(voted[1], boxes[0, :, 0]) < 1e-5
        found = detector.detect(images, batch.sizes)
    best = (logits[0].softmax(1)[:, :3] * proposals.is_valid[0].unsqueeze(1)).max()
    assert relative(best, found.scores[0, 0]) < 1e-6
    assert (found.labels >= 0).any()


def test_bfloat16_losses_are_those_of_float32_within_its_precision():
    batch = tiny_batch(2)
    plain = detector_of(DEFORMABLE)(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = detector_of(DEFORMABLE)(batch)
    for name in ("rpn_objectness", "rpn_box"):  # the proposals, and so the RoIs, may be others
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], plain[name], rtol=0.05, atol=0.02)
    assert all(loss.isfinite().all() for loss in half.values())


def test_with_its_norms_folded_it_finds_the_same():
    detector, batch = detector_of(DEFORMABLE).double().eval(), tiny_batch(2)
    images = detector.normalized(batch.pixels, batch.sizes)
    before, found = detector.features(images), detector.detect(images, batch.sizes)
    folded = fold_batch_norms(detector)
    norms = [module for module in detector.modules() if isinstance(module, CrossDeviceBatchNorm)]
    assert folded > len(norms) == 0
    assert all(relative(a, b) < 1e-10 for a, b in zip(before, detector.features(images), strict=True))
    assert relative(found.boxes, detector.detect(images, batch.sizes).boxes) < 1e-9


def test_new_classes_start_only_the_maps_of_classes_anew():
    detector = detector_of()
    assert detector.class_layers == ("box_head.classes",)
    shapes = [{k: v.shape for k, v in make_detector(FROZEN, n).state_dict().items()} for n in (3, 7)]
    changed = {name.rpartition(".")[0] for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert changed == set(detector.class_layers)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("verify", ("rfcn",)),
        ("verify-rfcn", ("base", "lane-2", "recompute-block", "head-norms", "dense-rpn", "resume")),
    ],
)
def test_the_result_of_a_deformable_rfcn_does_not_depend_on_the_devices(name, cases, tmp_path: Path) -> None:
    places = {
        "data.train_annotations": tmp_path / "annotations/train.json",
        "data.train_images": tmp_path / "train",
        "data.val_annotations": tmp_path / "annotations/val.json",
        "data.val_images": tmp_path / "val",
    }
    recipe = load_recipe(name, {key: str(path) for key, path in places.items()})
    verdict = verify(recipe, (1, 2), cases=cases, steps=2)
    assert verdict.passes, verdict.sentence()
    assert verdict.worst.difference < 1e-9
    assert {row.case for row in verdict.rows} == set(cases)
    assert verdict.count("another layout") >= len({*cases} - {"dense-rpn"})  # dense-rpn on one device, to save time
