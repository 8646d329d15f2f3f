import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from factories import random_boxes
from megdet.ops import box_voting
from megdet.ops.box_voting import fused_boxes, soft_nms, voted_boxes, voters

ROW = torch.tensor([[0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 12.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
"""The first two overlap by 8 / 12."""
SCORES = torch.tensor([0.9, 0.6, 0.3])
ONE = torch.zeros(3, dtype=torch.int64)


def overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def ranked(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))


def mean_of(boxes: list[list[float]], weights: list[float]) -> list[float]:
    return [sum(w * box[edge] for w, box in zip(weights, boxes, strict=True)) / sum(weights) for edge in range(4)]


def softened(boxes: list[list[float]], scores: list[float], iou: float, sigma: float | None) -> list[float]:
    """Soft-NMS of one segment, box after box."""
    left, found = dict(enumerate(scores)), [0.0] * len(scores)
    while left:
        best = min(left, key=lambda place: (-left[place], -scores[place], place))
        found[best] = left.pop(best)
        for place in left:
            o = overlap(boxes[best], boxes[place])
            left[place] *= math.exp(-o * o / sigma) if sigma else 1 - o if o > iou else 1
    return found


def clustered(boxes: list[list[float]], scores: list[float], iou: float) -> list[tuple[int, list[float]]]:
    """Weighted boxes fusion of one segment: the first box of each one's cluster, and the fused box."""
    clusters: list[list[int]] = []
    for place in ranked(scores):
        fused = [mean_of([boxes[p] for p in own], [scores[p] for p in own]) for own in clusters]
        overlaps = [overlap(boxes[place], box) for box in fused]
        if overlaps and max(overlaps) > iou:
            clusters[overlaps.index(max(overlaps))].append(place)
        else:
            clusters.append([place])
    found = {}
    for own in clusters:
        fused = mean_of([boxes[p] for p in own], [scores[p] for p in own])
        found |= dict.fromkeys(own, (own[0], fused))
    return [found[place] for place in range(len(boxes))]


@st.composite
def crowds(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and segments, in which many scores are equal."""
    segments = torch.tensor(draw(st.lists(st.integers(0, 4), max_size=40)), dtype=torch.int64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    boxes = random_boxes(len(segments), canvas=30, generator=generator, dtype=torch.float64)
    scores = torch.randint(1, 12, (len(segments),), generator=generator).double() / 12
    return boxes, scores, segments


def test_soft_nms_by_hand():
    linear = soft_nms(ROW, SCORES, ONE, 0.5)
    assert linear.tolist() == pytest.approx([0.9, 0.6 * (1 - 8 / 12), 0.3])
    gaussian = soft_nms(ROW, SCORES, ONE, 0.5, sigma=0.5)
    assert gaussian.tolist() == pytest.approx([0.9, 0.6 * math.exp(-((8 / 12) ** 2) / 0.5), 0.3])
    assert soft_nms(ROW, SCORES, ONE, 0.7).tolist() == pytest.approx(SCORES.tolist())


def test_a_vote_by_hand():
    voted = voted_boxes(ROW, SCORES, ONE, 0.5)
    x = (0.6 * 2) / 1.5
    assert voted[0].tolist() == pytest.approx([x, 0.0, 10 + x, 10.0])
    assert torch.equal(voted[2], ROW[2])
    assert torch.equal(voted_boxes(ROW, SCORES, ONE, 0.7), ROW)
    assert torch.equal(voted_boxes(ROW, SCORES, torch.tensor([0, 1, 0]), 0.5), ROW)
    assert torch.equal(voted_boxes(ROW, torch.zeros(3), ONE, 0.5), ROW)


def test_a_fusion_by_hand():
    owner, fused = fused_boxes(ROW, SCORES, ONE, 0.55)
    assert owner.tolist() == [0, 0, 2]
    x = (0.6 * 2) / 1.5
    assert fused[0].tolist() == pytest.approx([x, 0.0, 10 + x, 10.0])
    assert fused_boxes(ROW, SCORES, ONE, 0.7)[0].tolist() == [0, 1, 2]


@given(crowds(), st.sampled_from([0.3, 0.5]), st.sampled_from([None, 0.5]))
def test_soft_nms_of_many_segments_is_that_of_each_alone_box_after_box(crowd, iou, sigma):
    boxes, scores, segments = crowd
    found = soft_nms(boxes, scores, segments, iou, sigma)
    for own in segments.unique():
        places = (segments == own).nonzero().flatten()
        expected = softened(boxes[places].tolist(), scores[places].tolist(), iou, sigma)
        assert found[places].tolist() == pytest.approx(expected, rel=1e-12)


@given(crowds(), st.sampled_from([0.3, 0.5]))
def test_votes_are_counted_as_one_by_one(crowd, iou):
    boxes, scores, segments = crowd
    voted = voted_boxes(boxes, scores, segments, iou)
    winners = torch.arange(len(boxes)) % 2 == 0
    pairs = set(zip(*(side.tolist() for side in voters(boxes, scores, segments, winners, iou)), strict=True))
    expected = set()
    for place in range(len(boxes)):
        own = [
            other
            for other in range(len(boxes))
            if segments[other] == segments[place]
            and (other == place or overlap(boxes[place].tolist(), boxes[other].tolist()) >= iou)
        ]
        assert voted[place].tolist() == pytest.approx(mean_of(boxes[own].tolist(), scores[own].tolist()), rel=1e-12)
        expected |= {(place, other) for other in own if winners[place]}
    assert pairs == expected


@given(crowds(), st.sampled_from([0.3, 0.55]))
def test_fusion_of_many_segments_is_that_of_each_alone_box_after_box(crowd, iou):
    boxes, scores, segments = crowd
    owner, fused = fused_boxes(boxes, scores, segments, iou)
    for own in segments.unique():
        places = (segments == own).nonzero().flatten()
        expected = clustered(boxes[places].tolist(), scores[places].tolist(), iou)
        assert owner[places].tolist() == [int(places[first]) for first, _ in expected]
        for place, (first, box) in zip(places.tolist(), expected, strict=True):
            assert fused[places[first]].tolist() == pytest.approx(box, rel=1e-12)
            if owner[place] == place:
                assert fused[place].tolist() == pytest.approx(box, rel=1e-12)


def test_a_segment_gives_the_same_bits_alone_and_among_longer_ones(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    boxes, scores = random_boxes(300, canvas=40, generator=generator), torch.rand(300, generator=generator)
    segments = torch.arange(300) % 7 * (torch.arange(300) % 5 > 1)
    for pairs in (1 << 21, 200):
        monkeypatch.setattr(box_voting, "_MOST_PAIRS", pairs)
        voted, (_, fused) = voted_boxes(boxes, scores, segments, 0.5), fused_boxes(boxes, scores, segments, 0.5)
        soft = soft_nms(boxes, scores, segments, 0.5, 0.5)
        for own in segments.unique():
            at = segments == own
            alone = boxes[at], scores[at], segments[at]
            assert torch.equal(voted[at], voted_boxes(*alone, 0.5))
            assert torch.equal(fused[at], fused_boxes(*alone, 0.5)[1])
            assert torch.equal(soft[at], soft_nms(*alone, 0.5, 0.5))


def test_nothing_gives_nothing():
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert voted_boxes(*nothing, 0.5).shape == (0, 4)
    assert soft_nms(*nothing, 0.5).shape == (0,)
    assert fused_boxes(*nothing, 0.5)[0].shape == (0,)
    assert voters(*nothing, torch.zeros(0, dtype=torch.bool), 0.5)[0].shape == (0,)
