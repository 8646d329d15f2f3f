"""What heads share is tested with the box head's; here what a head needs that has one box for all classes."""

from dataclasses import replace

import torch

from factories import make_targets
from megdet.architecture_heads import RoiHead as RoiHeadRecipe
from megdet.model.proposals import Proposals
from megdet.model.roi_head import DELTA_WEIGHTS, RoiHead
from megdet.ops.boxes import decode_boxes

RECIPE = RoiHeadRecipe(samples=4, smooth_l1_beta=1.0, detections=6)
HEAD = RoiHead(RECIPE, 3, is_class_agnostic=True)


def make_proposals(boxes: torch.Tensor) -> Proposals:
    images, count = boxes.shape[:2]
    return Proposals(boxes, torch.arange(count).expand(images, -1), torch.ones(images, count, dtype=torch.bool))


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
