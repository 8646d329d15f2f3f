import threading

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from factories import random_boxes
from megdet.ops import nms
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


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_segments_that_threads_share_are_thinned_as_one_after_another(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    used = set()
    monkeypatch.setattr(nms, "nms", lambda *given: used.add(threading.get_ident()) or torchvision.ops.nms(*given))
    generator = torch.Generator().manual_seed(0)
    boxes, scores = random_boxes(3000, canvas=200, generator=generator), torch.rand(3000, generator=generator)
    segments = torch.randint(-1, 6, (3000,), generator=generator)
    with torch.inference_mode():
        keep = segmented_nms(boxes, scores, segments, 0.5)
    for own in range(6):
        places = (segments == own).nonzero().flatten()
        assert len(places) >= nms._LARGE
        expected = places[torchvision.ops.nms(boxes[places], scores[places], 0.5)].sort().values
        assert torch.equal(places[keep[places]], expected)
    assert not keep[segments < 0].any()
    assert (used == {threading.get_ident()}) == (threads == 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_half_formats_are_thinned_as_float32(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    boxes, scores = random_boxes(800).bfloat16(), torch.rand(800).bfloat16()
    segments = torch.arange(800) % 2
    expected = segmented_nms(boxes.float(), scores.float(), segments, 0.5)
    assert torch.equal(segmented_nms(boxes, scores, segments, 0.5), expected)
    assert not expected.all()


def test_no_candidates_leave_none():
    assert segmented_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5).shape == (0,)
