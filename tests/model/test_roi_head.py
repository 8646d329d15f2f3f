"""What all heads of the second stage share: sampling, and what one needs that has a box for all classes together."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factories import make_targets, random_boxes
from megdet.architecture_heads import RoiHead as RoiHeadRecipe
from megdet.model.proposals import Proposals
from megdet.model.roi_head import DELTA_WEIGHTS, RoiHead
from megdet.ops.boxes import box_iou, decode_boxes

RECIPE = RoiHeadRecipe(samples=4, smooth_l1_beta=1.0, detections=6)
TRUTH = [([10.0, 10.0, 40.0, 40.0], 2), ([50.0, 5.0, 60.0, 25.0], 0)]
HEAD = RoiHead(RECIPE, 3, is_class_agnostic=True)


def sampler(positive_fraction: float = RECIPE.positive_fraction) -> RoiHead:
    """A head that draws twelve samples an image."""
    return RoiHead(replace(RECIPE, samples=12, positive_fraction=positive_fraction), 3)


def make_proposals(boxes: torch.Tensor, invalid: int = 0) -> Proposals:
    """Proposals of each image; the last `invalid` stand for nothing."""
    images, count = boxes.shape[:2]
    is_valid = (torch.arange(count) < count - invalid).expand(images, -1)
    return Proposals(boxes, torch.arange(count).expand(images, -1), is_valid)


def test_ground_truth_boxes_join_the_proposals_and_find_themselves():
    proposals = make_proposals(torch.zeros(1, 0, 4))
    sampled = sampler().sample(proposals, make_targets(TRUTH))
    assert sampled.is_positive.sum() == sampled.is_valid.sum() == 2
    found = sorted(zip(sampled.boxes[0, :2].tolist(), sampled.labels[0, :2].tolist(), strict=True))
    assert found == sorted(TRUTH)
    assert sampled.deltas[0][sampled.is_positive[0]].eq(0).all()


def test_sampled_rois_carry_the_label_and_deltas_of_the_box_they_overlap_most():
    near = torch.tensor([[[12.0, 8.0, 41.0, 43.0], [51.0, 4.0, 61.0, 24.0], [0.0, 50.0, 30.0, 60.0]]])
    sampled = sampler(1.0).sample(make_proposals(near), make_targets(TRUTH))
    assert sampled.is_valid.sum() == 5
    assert sorted(sampled.labels[0][sampled.is_positive[0]].tolist()) == [0, 0, 2, 2]
    back = decode_boxes(sampled.deltas, sampled.boxes, DELTA_WEIGHTS)
    truth = {label: torch.tensor(box) for box, label in TRUTH}
    for row in range(4):
        torch.testing.assert_close(back[0, row], truth[int(sampled.labels[0, row])])
    assert sampled.labels[0, 4:].eq(3).all()  # background


@given(st.integers(0, 2**32), st.integers(0, 5), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_samples_keep_to_their_numbers_and_never_take_padding(seed, padding, fraction):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(40, canvas=60, generator=generator).reshape(2, 20, 4)
    boxes[:, 17:] = torch.tensor(TRUTH[0][0])  # invalid proposals that would be perfect
    targets = make_targets(TRUTH, TRUTH[:1], width=2 + padding)
    sampled = sampler(fraction).sample(make_proposals(boxes, 3), targets)
    assert sampled.is_positive.sum(1).max() <= 12 * fraction
    assert not (sampled.is_positive & ~sampled.is_valid).any()
    for image in range(2):
        perfect = (sampled.boxes[image] == torch.tensor(TRUTH[0][0])).all(1) & sampled.is_valid[image]
        assert perfect.sum() <= 1  # the ground truth itself
        iou = box_iou(sampled.boxes[image], targets.boxes[image, : 2 - image]).amax(1)
        is_positive, is_valid = sampled.is_positive[image], sampled.is_valid[image]
        assert (iou[is_positive] >= 0.5).all()
        assert (iou[is_valid & ~is_positive] < 0.5).all()
    assert sampled.labels[~sampled.is_positive].eq(3).all()


@pytest.mark.parametrize("width", [0, 2])
def test_an_image_without_boxes_is_all_background(width):
    sampled = sampler().sample(make_proposals(random_boxes(20).unsqueeze(0)), make_targets([], width=width))
    assert not sampled.is_positive.any()
    assert sampled.is_valid.all()
    assert sampled.labels.eq(3).all()
    assert sampled.deltas.isfinite().all()


def test_the_loss_of_one_box_for_all_classes_is_that_of_hand_arithmetic():
    near = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]])
    for label in (0, 2):
        sampled = HEAD.sample(make_proposals(near), make_targets([([1.0, 0.0, 11.0, 10.0], label)]))
        deltas = (sampled.deltas[:, :1] + torch.tensor([0.5, 0.0, 3.0, 0.0])).expand(1, 4, 4).unsqueeze(2)
        losses = HEAD.losses(torch.zeros(1, 4, 4), deltas, sampled)
        torch.testing.assert_close(losses["box_head_box"], torch.tensor([(0.125 + 2.5) / 2]))


def test_all_classes_share_one_box_and_are_thinned_each_for_itself():
    boxes = torch.tensor([[[0.0, 0.0, 20.0, 20.0], [40.0, 40.0, 60.0, 60.0]]])
    deltas = torch.tensor([1.0, -2.0, 0.0, 0.5]).expand(1, 2, 1, 4)
    probabilities = torch.tensor([[[0.4, 0.3, 0.02, 0.28], [0.04, 0.9, 0.01, 0.05]]])
    head = RoiHead(replace(RECIPE, score_threshold=0.1), 3, is_class_agnostic=True)
    found = head.detections(probabilities, deltas, make_proposals(boxes), torch.tensor([[64, 64]]))
    assert found.labels.tolist() == [[1, 0, 1, -1, -1, -1]]
    moved = decode_boxes(deltas[:, :, 0], boxes, DELTA_WEIGHTS).clamp(0, 64)
    torch.testing.assert_close(found.boxes[0, :3], moved[0, [1, 0, 0]])
