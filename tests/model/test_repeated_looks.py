"""Iterative box regression and box voting when testing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from factories import TINY_FROZEN, relative, tiny_batch
from megdet.architecture_heads import RoiHead as RoiHeadRecipe
from megdet.model.choice import make_detector
from megdet.model.proposals import Proposals
from megdet.model.repeated_looks import detections_of_looks
from megdet.model.roi_head import DELTA_WEIGHTS, RoiHead
from megdet.ops.boxes import encode_boxes
from megdet.recipe_file import load_recipe
from megdet.structures import BatchDetections

BOXES = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 12.0, 10.0], [50.0, 50.0, 60.0, 60.0]]])
SIZES = torch.tensor([[64, 64]])


def proposals(boxes: Tensor = BOXES) -> Proposals:
    shape = boxes.shape[:2]
    return Proposals(boxes, torch.arange(shape[1]).expand(shape), torch.ones(shape, dtype=torch.bool))


def moved(boxes: Tensor, x: float) -> Tensor:
    """The deltas of a regressor of all classes that moves every box to the right."""
    return encode_boxes(boxes + torch.tensor([x, 0, x, 0]), boxes, DELTA_WEIGHTS).unsqueeze(2)


def head_of(**keys: Any) -> RoiHead:
    return RoiHead(RoiHeadRecipe(detections=4, **keys), 2, is_class_agnostic=True)


def scores_of(*rows: list[float]) -> Tensor:
    return torch.tensor([rows])


def found_by(head: RoiHead, *looks: Callable[[Tensor], tuple[Tensor, Tensor]]) -> BatchDetections:
    rest = list(looks)

    def look(boxes: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
        return rest.pop(0)(boxes)

    found = detections_of_looks(head, look, proposals(), SIZES)
    assert not rest
    return found


def first_look(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return scores_of([0.9, 0.0, 0.1], [0.6, 0.1, 0.3], [0.0, 0.3, 0.7]), moved(boxes, 0)


def test_boxes_that_overlap_a_detection_vote_for_its_place_by_hand():
    plain, voted = found_by(head_of(), first_look), found_by(head_of(vote_iou=0.5), first_look)
    assert plain.labels.tolist() == voted.labels.tolist() == [[0, 1, 1, -1]]
    torch.testing.assert_close(plain.scores, voted.scores)
    torch.testing.assert_close(plain.boxes[0, 0], BOXES[0, 0])
    torch.testing.assert_close(voted.boxes[0, 0], torch.tensor([0.8, 0, 10.8, 10]))  # 0.6 * 2 / (0.9 + 0.6)
    torch.testing.assert_close(voted.boxes[0, 1:], plain.boxes[0, 1:])
    strict = found_by(head_of(vote_iou=0.7), first_look)  # the two overlap by 8 / 12
    torch.testing.assert_close(strict.boxes, plain.boxes)


def second_look(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """At the three detections of the first; the score of a class that a box was not found for does not count."""
    assert boxes.shape[1] == 4
    torch.testing.assert_close(boxes[0, :3], BOXES[0, [0, 2, 1]])
    return scores_of([0.95, 0.9, 0.1], [0.9, 0.2, 0.7], [0.9, 0.04, 0.0], [1.0, 1.0, 1.0]), moved(boxes, 1)


def test_a_second_look_moves_its_own_detections_and_both_looks_vote_by_hand():
    again = found_by(head_of(test_iterations=1), first_look, second_look)
    assert again.labels.tolist() == [[0, 1, 1, -1]]
    assert again.scores[0].tolist() == pytest.approx([0.95, 0.3, 0.1, 0])
    torch.testing.assert_close(again.boxes[0, 0], torch.tensor([1.0, 0, 11, 10]))
    torch.testing.assert_close(again.boxes[0, 1], BOXES[0, 2])
    voted = found_by(head_of(test_iterations=1, vote_iou=0.5), first_look, second_look)
    x = (0.95 * 1 + 0.9 * 0 + 0.6 * 2) / (0.95 + 0.9 + 0.6)
    torch.testing.assert_close(voted.boxes[0, 0], torch.tensor([x, 0, 10 + x, 10]))
    x = 50 + 0.2 * 1 / (0.2 + 0.3)
    torch.testing.assert_close(voted.boxes[0, 1], torch.tensor([x, 50, 10 + x, 60]))


def test_a_third_look_is_at_the_boxes_of_the_second():
    def third_look(boxes: Tensor) -> tuple[Tensor, Tensor]:
        torch.testing.assert_close(boxes[0, 0], torch.tensor([1.0, 0, 11, 10]))
        return scores_of([0.97, 0, 0], [0, 0.9, 0], [0, 0, 1], [0, 0, 1]), moved(boxes, 1)

    found = found_by(head_of(test_iterations=2), first_look, second_look, third_look)
    torch.testing.assert_close(found.boxes[0, 0], torch.tensor([2.0, 0, 12, 10]))
    torch.testing.assert_close(found.boxes[0, 1], torch.tensor([52.0, 50, 62, 60]))


def test_nothing_found_stays_nothing():
    def nothing(boxes: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, boxes.shape[1], 3), moved(boxes, 0)

    found = found_by(head_of(test_iterations=1, vote_iou=0.5), nothing, nothing)
    assert (found.labels == -1).all()
    assert not found.boxes.any()


@pytest.mark.parametrize("name", ["verify", "verify-mask", "verify-cascade", "verify-rfcn"])
def test_every_second_stage_looks_again_and_an_image_is_not_touched_by_others(name):
    model = load_recipe(name).model
    head = replace(model.box_head, score_threshold=0.01, detections=12)
    plain = replace(TINY_FROZEN, model=replace(model, box_head=head))
    recipe = replace(plain, model=replace(model, box_head=replace(head, test_iterations=2, vote_iou=0.5)))
    detectors = []
    for own in (plain, recipe):
        torch.manual_seed(0)
        detector = make_detector(own, 3).double().eval()
        with torch.no_grad():
            for layer, factor in detector.small_start.items():
                detector.get_parameter(f"{layer}.weight").mul_(factor)
        detectors.append(detector)
    batch = tiny_batch(3)
    sizes, images = batch.sizes, detectors[0].normalized(batch.pixels, batch.sizes)
    once, again = (detector.detect(images, sizes) for detector in detectors)
    assert (again.labels >= 0).sum() > 10
    assert again.boxes.shape == once.boxes.shape
    assert not torch.equal(again.boxes, once.boxes)
    assert again.boxes[again.labels >= 0].isfinite().all()
    for row in range(3):
        alone = detectors[1].detect(images[row : row + 1], sizes[row : row + 1])
        assert torch.equal(alone.labels, again.labels[row : row + 1])
        assert relative(alone.boxes, again.boxes[row : row + 1]) < 1e-9
        if again.masks is not None:
            assert alone.masks is not None
            assert relative(alone.masks, again.masks[row : row + 1]) < 1e-9
