import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from factories import random_boxes
from megdet.ops.nms import segmented_nms


def test_a_worse_box_of_the_same_segment_falls_and_of_another_stays():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 9.0], [50.0, 0.0, 60.0, 9.0]])
    keep = segmented_nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([0, 0, 1, 0]), 0.5)
    assert keep.tolist() == [True, False, True, True]


def test_an_overlap_of_exactly_the_threshold_stays():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0]])
    assert segmented_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), 0.5).all()


def test_between_equal_scores_the_lower_index_stays():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(5, 1)
    keep = segmented_nms(boxes, torch.full((5,), 0.5), torch.tensor([3, 1, 3, 1, 3]), 0.5)
    assert keep.tolist() == [True, True, False, False, False]


@given(st.lists(st.integers(-2, 4), max_size=60), st.sampled_from([0.3, 0.5, 0.7]), st.integers(0, 2**32))
def test_every_segment_is_thinned_as_torchvision_would_alone_and_negative_ones_vanish(segments, threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    count = len(segments)
    boxes = random_boxes(count, canvas=30, generator=generator)
    scores = torch.randint(-5, 5, (count,), generator=generator).float()  # with many ties
    segment = torch.tensor(segments, dtype=torch.int64)
    keep = segmented_nms(boxes, scores, segment, threshold)
    expected = torch.zeros(count, dtype=torch.bool)
    for own in segment.unique():
        if own >= 0:
            places = (segment == own).nonzero().flatten()
            expected[places[torchvision.ops.nms(boxes[places], scores[places], threshold)]] = True
    assert torch.equal(keep, expected)


def test_a_segment_far_from_the_origin_is_not_changed_by_its_number():
    boxes, scores = random_boxes(200), torch.rand(200)
    first = segmented_nms(boxes, scores, torch.zeros(200, dtype=torch.int64), 0.5)
    last = segmented_nms(boxes, scores, torch.full((200,), 10**9), 0.5)
    assert torch.equal(first, last)


def test_no_candidates_leave_none():
    assert segmented_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5).shape == (0,)
