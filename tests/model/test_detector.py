from dataclasses import replace

import pytest
import torch

from factories import TINY, TINY_FROZEN, gradients, make_targets, relative, tiny_batch, tiny_detector
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.model.detector import Detector
from megdet.model.faster_rcnn import FasterRcnn
from megdet.recipe import Recipe
from megdet.structures import Batch, Targets

NORMED = replace(
    TINY,
    model=TINY.model.with_norms({"fpn": "batch", "rpn": "batch", "box_head": "batch"}),
)
RECIPES = {"frozen": TINY_FROZEN, "batch": TINY, "all_batch": NORMED}


def backward(detector: Detector, batch: Batch) -> dict[str, torch.Tensor]:
    losses = detector(batch)
    sum(losses[name].sum() for name in FasterRcnn.loss_names).backward()
    return {name: loss.detach() for name, loss in losses.items()}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_loss_is_there_for_every_image_and_reaches_every_parameter(recipe):
    detector = tiny_detector(recipe)
    losses = backward(detector, tiny_batch(2))
    assert set(FasterRcnn.loss_names) < set(losses)
    for name in FasterRcnn.loss_names:
        assert losses[name].shape == (2,)
        assert losses[name].isfinite().all()
        assert (losses[name] > 0).all()
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in found.values())


def test_two_separate_batches_are_the_halves_of_the_joint_one():
    detector = tiny_detector(TINY_FROZEN).double()
    batch = tiny_batch(4)
    joint, joint_gradients = backward(detector, batch), gradients(detector)
    first = backward(detector, batch[0:1])
    rest = backward(detector, batch[1:4])  # gradients add up
    added = gradients(detector)
    for name in joint:
        assert relative(joint[name], torch.cat([first[name], rest[name]])) < 1e-12, name
    for name, gradient in joint_gradients.items():
        assert relative(gradient, added[name]) < 1e-12, name


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_more_rows_of_padding_change_no_bit(recipe):
    batch = tiny_batch(3)
    targets = batch.targets
    wider = Targets(
        torch.cat([targets.boxes, torch.zeros(3, 5, 4)], 1),
        torch.cat([targets.labels, torch.full((3, 5), -1)], 1),
        targets.image_seeds,
    )
    found = []
    for own in (targets, wider):
        detector = tiny_detector(recipe)
        found.append(backward(detector, replace(batch, targets=own)) | gradients(detector))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("width", [0, 2])
def test_images_without_boxes_give_finite_losses_and_gradients(width):
    batch = tiny_batch(2)
    detector = tiny_detector()
    losses = backward(detector, replace(batch, targets=make_targets([], [], width=width)))
    for name in ("rpn_box", "box_head_box", "rpn_positive", "box_head_positive"):
        assert losses[name].eq(0).all()
    for name in ("rpn_objectness", "box_head_class"):
        assert (losses[name] > 0).all()
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["box_head.deltas.weight"].eq(0).all()


def test_boxes_without_area_give_finite_losses_and_gradients():
    batch = tiny_batch(2)
    flat = make_targets([([5.0, 5.0, 30.0, 5.0], 0), ([7.0, 7.0, 7.0, 7.0], 1)], [([5.0, 5.0, 30.0, 5.0], 0)])
    detector = tiny_detector()
    losses = backward(detector, replace(batch, targets=flat))
    assert all(loss.isfinite().all() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients(detector).values())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_no_images_give_empty_losses_and_gradients_of_zero_for_every_parameter(recipe):
    detector = tiny_detector(recipe)
    losses = backward(detector, tiny_batch(2)[0:0])
    assert all(loss.shape == (0,) for loss in losses.values())
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert all(gradient.eq(0).all() for gradient in found.values())
    assert all(m.step_var.isfinite().all() for m in detector.modules() if isinstance(m, CrossDeviceBatchNorm))


def test_weights_of_nan_give_losses_of_nan_and_no_crash():
    detector = tiny_detector(TINY_FROZEN)
    with torch.no_grad():
        detector.rpn.conv.weight.fill_(float("nan"))
    losses = detector(tiny_batch(2))
    assert losses["rpn_objectness"].isnan().all()
    detector.eval()
    batch = tiny_batch(2)
    found = detector.detect(detector.normalized(batch.pixels, batch.sizes), batch.sizes)
    assert found.labels.eq(-1).all()


def test_pixels_are_normalized_and_the_canvas_outside_an_image_is_zero():
    detector = tiny_detector()
    batch = tiny_batch(2)
    images = detector.normalized(batch.pixels, torch.tensor([[64, 64], [40, 50]]))
    mean, std = Recipe().model.mean, Recipe().model.std
    for channel in range(3):
        expected = (batch.pixels[:, channel].float() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(images[0, channel], expected[0])
        torch.testing.assert_close(images[1, channel, :40, :50], expected[1, :40, :50])
    assert images[1, :, 40:].eq(0).all()
    assert images[1, :, :, 50:].eq(0).all()
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_what_stands_outside_an_image_changes_nothing():
    detector = tiny_detector(TINY_FROZEN)
    batch = tiny_batch(2)
    other = batch.pixels.clone()
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        other[i, :, height:] = 255
        other[i, :, :, width:] = 255
    assert not torch.equal(other, batch.pixels)
    changed = replace(batch, pixels=other)
    for name, value in detector(batch).items():
        assert torch.equal(value, detector(changed)[name])


def test_detections_are_padded_and_lie_in_their_image():
    detector = tiny_detector(TINY_FROZEN).eval()
    batch = tiny_batch(3)
    found = detector.detect(detector.normalized(batch.pixels, batch.sizes), batch.sizes)
    assert found.boxes.shape == (3, 10, 4)
    assert (found.labels >= 0).any(dim=1).all()
    assert found.labels.max() < 3
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        assert found.boxes[i, :, 2].max() <= width
        assert found.boxes[i, :, 3].max() <= height
        alone = batch[i : i + 1]
        own = detector.detect(detector.normalized(alone.pixels, alone.sizes), alone.sizes)
        torch.testing.assert_close(own.boxes[0], found.boxes[i], rtol=1e-4, atol=1e-4)


def test_no_images_have_no_detections():
    detector = tiny_detector().eval()
    batch = tiny_batch(2)[0:0]
    assert detector.detect(detector.normalized(batch.pixels, batch.sizes), batch.sizes).labels.shape == (0, 10)


def test_another_seed_of_an_image_samples_other_rois_and_only_for_that_image():
    detector = tiny_detector(TINY_FROZEN).double()
    batch = tiny_batch(2)
    targets = batch.targets
    other = replace(targets, image_seeds=targets.image_seeds + torch.tensor([0, 12345]))
    before, after = detector(batch), detector(replace(batch, targets=other))
    assert relative(before["rpn_objectness"][:1], after["rpn_objectness"][:1]) < 1e-12
    assert relative(before["rpn_objectness"][1:], after["rpn_objectness"][1:]) > 1e-6


def test_bfloat16_losses_are_those_of_float32_within_its_precision():
    detector = tiny_detector(TINY_FROZEN)
    batch = tiny_batch(2)
    exact = detector(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = detector(batch)
    for name in FasterRcnn.loss_names:
        assert rough[name].dtype == torch.float32
        assert relative(exact[name], rough[name]) < 0.2, name
    sum(rough[name].sum() for name in FasterRcnn.loss_names).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(detector).values())
