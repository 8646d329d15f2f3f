"""The segmentation branch, alone and in every detector that may have it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from factories import (
    SMALL_MASKS,
    TINY,
    TINY_FROZEN,
    gradients,
    make_targets,
    masked_batch,
    of_kind,
    relative,
    tiny_batch,
    tiny_detector,
    with_model,
)
from megdet.architecture import CascadeMaskRcnn, MaskRcnn, Rfcn
from megdet.architecture_heads import Cascade
from megdet.architecture_parts import Segmentation as SegmentationRecipe
from megdet.bounds import faults_of
from megdet.contract.verify import verify
from megdet.layers.convert import norm_factory
from megdet.model.choice import make_detector, mask_use
from megdet.model.segmentation import Segmentation, resized
from megdet.ops.roi_align import feature_table
from megdet.ops.semantic_targets import semantic_targets
from megdet.recipe_file import load_recipe

STRIDES = (4, 8, 16, 32, 64)
ON = {"enabled": True, "convolutions": 1}
BRANCHED = with_model(TINY, segmentation=ON)
FROZEN = with_model(TINY_FROZEN, segmentation=ON)
RECIPES = {
    "frozen": FROZEN,
    "batch": with_model(BRANCHED, segmentation={"norm": "batch"}),
    "group": with_model(BRANCHED, segmentation={"norm": "group"}),
    "atrous": with_model(FROZEN, backbone={"name": "test_resnet", "output_stride": 8}),
    "masks": of_kind(FROZEN, MaskRcnn, mask_head=SMALL_MASKS),
    "cascade": of_kind(FROZEN, CascadeMaskRcnn, mask_head=SMALL_MASKS, cascade=Cascade()),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def branch(channels: int = 4, norm: str = "none", **options: object) -> Segmentation:
    torch.manual_seed(0)
    recipe = SegmentationRecipe(enabled=True, norm=norm, **options)
    return Segmentation(recipe, channels, STRIDES, 3, norm_factory(norm))


def pyramid(height: int, width: int, images: int = 2, channels: int = 4) -> list[torch.Tensor]:
    return [torch.randn(images, channels, -(-height // s), -(-width // s)) for s in STRIDES]


def backward(detector: torch.nn.Module, batch: object) -> dict[str, torch.Tensor]:
    losses = detector(batch)
    sum(losses[name].sum() for name in detector.loss_names).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def test_a_map_is_made_coarser_by_means_and_finer_by_repetition_by_hand():
    row = torch.tensor([1.0, 3.0, 5.0, 9.0, 4.0]).reshape(1, 1, 1, 5)
    assert resized(row, 4, 8, (1, 3)).flatten().tolist() == [2.0, 7.0, 4.0]
    assert resized(row, 4, 16, (1, 2)).flatten().tolist() == [4.5, 4.0]
    assert resized(row, 8, 4, (1, 10)).flatten().tolist() == [1, 1, 3, 3, 5, 5, 9, 9, 4, 4]
    assert resized(row, 8, 8, (1, 5)) is row


@pytest.mark.parametrize("canvas", [(64, 128), (72, 104), (8, 40)])
def test_the_branch_is_its_layers_over_the_mean_of_the_levels(canvas):
    own, levels = branch(convolutions=2), pyramid(*canvas)
    told, logits = own(levels)
    size = levels[1].shape[2:]
    fused = F.avg_pool2d(levels[0], 2, ceil_mode=True, count_include_pad=False) + levels[1]
    for level, factor in zip(levels[2:], (2, 4, 8), strict=True):
        fused = fused + level.repeat_interleave(factor, 2).repeat_interleave(factor, 3)[:, :, : size[0], : size[1]]
    hidden = fused / 5
    for convolution in own.convolutions:
        hidden = F.relu(convolution(hidden))
    assert relative(own.classes(hidden).permute(0, 2, 3, 1), logits) < 1e-5
    seen = own.feedback(hidden)
    assert [level.shape for level in told] == [level.shape for level in levels]
    assert relative(levels[1] + seen, told[1]) < 1e-5
    if canvas == (64, 128):
        assert relative(levels[0] + seen.repeat_interleave(2, 2).repeat_interleave(2, 3), told[0]) < 1e-5
        assert relative(levels[4] + seen.unflatten(3, (-1, 8)).mean((2, 4)).unsqueeze(2), told[4]) < 1e-5


def test_the_loss_is_the_mean_over_the_cells_of_each_image_and_no_others():
    own, batch = branch(loss_weight=0.5), masked_batch(3)
    sizes = torch.tensor([[64, 64], [40, 24], [13, 60]])
    logits = torch.randn(3, 8, 8, 4, dtype=torch.float64)
    targets = replace(batch.targets, boxes=batch.targets.boxes.double())
    wanted = semantic_targets(targets, sizes, (8, 8), 8, 3)
    expected = []
    for image, (height, width) in enumerate([(8, 8), (5, 3), (2, 7)]):  # middles at 4, 12, ... below the edge
        terms = [-logits[image, i, j].log_softmax(0)[wanted[image, i, j]] for i in range(height) for j in range(width)]
        expected.append(0.5 * sum(terms) / len(terms))
    assert relative(torch.stack(expected), own.loss(logits, targets, sizes)) < 1e-12
    assert {-1, 0, 1, 3} <= set(wanted.flatten().tolist())


def test_what_is_added_to_the_pyramid_is_added_to_the_features_of_every_roi():
    """Why the levels take it: pooling is linear."""
    detector, levels = tiny_detector(FROZEN).double(), [level.double() for level in pyramid(64, 64, channels=16)]
    told, _ = detector.segmentation(levels)
    seen = [after - before for after, before in zip(told, levels, strict=True)]
    rois = torch.tensor([[[3.0, 5.0, 30.0, 21.0], [0.0, 0.0, 64.0, 64.0]]] * 2, dtype=torch.float64)
    before, added, after = (detector.pooling(feature_table(own), rois) for own in (levels, seen, told))
    assert relative(before + added, after) < 1e-12


@every_recipe
def test_its_loss_is_there_for_every_image_and_every_weight_is_trained(recipe):
    detector = make_detector(recipe, 3)
    losses = backward(detector, masked_batch(2))
    assert losses.keys() == set(detector.reported())
    assert losses["segmentation"].shape == (2,)
    assert (losses["segmentation"] > 0).all()
    found = gradients(detector)
    own = {name: value for name, value in found.items() if name.startswith("segmentation")}
    assert own.keys() == {name for name, _ in detector.named_parameters() if name.startswith("segmentation")}
    assert all(value.any() and value.isfinite().all() for value in own.values())
    assert list(detector.parts)[-1] == "segmentation"
    assert [name for name, _ in detector.named_children() if name not in detector.parts] == []


@pytest.mark.parametrize("name", ["frozen", "batch", "cascade"])
def test_a_recomputed_step_has_the_same_bits(name):
    found = []
    for plan in ("none", "stage"):
        torch.manual_seed(0)
        detector = make_detector(replace(RECIPES[name], recompute=plan), 3)
        found.append(backward(detector, masked_batch(2)) | gradients(detector) | dict(detector.named_buffers()))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_two_separate_batches_are_the_halves_of_the_joint_one():
    detector, batch = tiny_detector(FROZEN).double(), masked_batch(4)
    joint, expected = backward(detector, batch), gradients(detector)
    first, rest = backward(detector, batch[0:1]), backward(detector, batch[1:4])  # gradients add up
    added = gradients(detector)
    assert relative(joint["segmentation"], torch.cat([first["segmentation"], rest["segmentation"]])) < 1e-12
    assert all(relative(gradient, added[name]) < 1e-12 for name, gradient in expected.items())


def test_images_without_boxes_teach_background_and_a_share_without_images_teaches_nothing():
    detector, batch = tiny_detector(FROZEN), tiny_batch(2)
    assert (backward(detector, replace(batch, targets=make_targets([], [], width=2)))["segmentation"] > 0).all()
    gradients(detector)
    assert backward(detector, batch[0:0])["segmentation"].shape == (0,)
    found = gradients(detector)
    assert found.keys() == {name for name, own in detector.named_parameters() if own.requires_grad}
    assert all(gradient.eq(0).all() for gradient in found.values())


def test_it_learns_from_masks_where_there_are_any_and_from_boxes_where_not():
    detector, batch = tiny_detector(FROZEN).double(), masked_batch(2)
    boxes_alone = replace(batch, targets=replace(batch.targets, masks=None))
    masks, boxes = detector(batch)["segmentation"], detector(boxes_alone)["segmentation"]
    assert relative(masks, boxes) > 1e-3
    emptied = replace(batch.targets.masks, frames=torch.zeros_like(batch.targets.masks.frames))
    without = replace(batch, targets=replace(batch.targets, masks=emptied))
    assert torch.equal(boxes, detector(without)["segmentation"])
    assert [mask_use(own.model) for own in (TINY, FROZEN, RECIPES["masks"])] == ["none", "any", "all"]
    assert mask_use(Rfcn()) == "none"


def test_detections_and_proposals_come_from_the_pyramid_that_the_branch_has_told():
    detector, batch = tiny_detector(FROZEN).eval(), tiny_batch(2)
    images = detector.normalized(batch.pixels, batch.sizes)
    with torch.no_grad():
        before, found = detector.features(images), detector.detect(images, batch.sizes)
        detector.segmentation.feedback.weight.zero_()
        detector.segmentation.feedback.bias.zero_()
        after, others = detector.features(images), detector.detect(images, batch.sizes)
        plain = detector.fpn(detector.backbone(images))
    assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True))
    assert all(relative(a, b) > 1e-3 for a, b in zip(before, after, strict=True))
    assert not torch.equal(found.scores, others.scores)


def test_bfloat16_losses_are_those_of_float32_within_its_precision():
    batch = masked_batch(2)
    plain = tiny_detector(FROZEN)(batch)["segmentation"]
    with torch.autocast("cpu", torch.bfloat16):
        half = tiny_detector(FROZEN)(batch)["segmentation"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.02)


def test_without_it_a_detector_is_what_it_was_and_new_classes_start_its_layer_of_classes_anew():
    assert tiny_detector().segmentation is None
    assert "segmentation" not in tiny_detector().reported()
    shapes = [{k: v.shape for k, v in make_detector(FROZEN, n).state_dict().items()} for n in (3, 7)]
    changed = {name.rpartition(".")[0] for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert changed == set(make_detector(FROZEN, 3).class_layers)
    assert "segmentation.classes" in changed


def test_keys_of_a_branch_that_is_not_there_are_refused():
    why = "no branch would use it: set model.segmentation.enabled true"
    model = with_model(TINY, segmentation={"norm": "batch", "loss_weight": 0.5}).model
    assert list(faults_of(model, "model.")) == [
        ("model.segmentation.norm", why),
        ("model.segmentation.loss_weight", why),
    ]
    assert "segmentation" not in model.norms
    assert RECIPES["group"].model.norms["segmentation"] == "group"
    assert list(faults_of(RECIPES["group"].model, "model.")) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_the_result_of_the_features_and_of_a_light_head_does_not_depend_on_the_devices(tmp_path: Path) -> None:
    places = {
        "data.train_annotations": tmp_path / "annotations/train.json",
        "data.train_images": tmp_path / "train",
        "data.val_annotations": tmp_path / "annotations/val.json",
        "data.val_images": tmp_path / "val",
    }
    recipe = load_recipe("verify", {key: str(path) for key, path in places.items()})
    verdict = verify(recipe, (1, 2), cases=("features", "light-head"), steps=2)
    assert verdict.passes, verdict.sentence()
    assert verdict.worst.difference < 1e-9
    assert verdict.count("another layout") >= 2
