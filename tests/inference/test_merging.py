"""Candidates of several members and images become one list."""

import pytest
import torch

from factories import random_boxes
from megdet.inference.merging import Candidates, merge


def candidates(*rows: tuple[int, int, list[float], float, int], weights: list[list[float]] | None = None) -> Candidates:
    """Rows of (image, label, box, score, member)."""
    images, labels, boxes, scores, members = zip(*rows, strict=True)
    count = 1 + max(members)
    return Candidates(
        torch.tensor(images),
        torch.tensor(labels),
        torch.tensor(boxes, dtype=torch.float64),
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(members),
        torch.tensor(weights or [[1.0] * 3] * count, dtype=torch.float64),
    )


A, B, FAR = [0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 12.0, 10.0], [50.0, 50.0, 60.0, 60.0]
"""A and B overlap by 8 / 12."""


def test_fusion_has_the_published_scores_by_hand():
    three = candidates((0, 1, A, 0.9, 0), (0, 1, B, 0.6, 1), (0, 1, FAR, 0.6, 2), (0, 2, A, 0.4, 1))
    found = merge(three, "wbf", 0.55, 0.5, 100)
    # (0.9 + 0.6) / 2 * min(3, 2) / 3, and 0.6 * 1 / 3, 0.4 * 1 / 3
    assert found.scores.tolist() == pytest.approx([0.5, 0.2, 0.4 / 3])
    assert found.index.tolist() == [0, 2, 3]
    assert found.boxes[0].tolist() == pytest.approx([0.8, 0, 10.8, 10])
    assert found.row.tolist() == [0, 0, 1, 2]
    assert found.voter.tolist() == [0, 1, 2, 3]
    weighted = candidates((0, 1, A, 0.9, 0), (0, 1, B, 0.6, 1), weights=[[2.0] * 3, [1.0] * 3])
    found = merge(weighted, "wbf", 0.55, 0.5, 100)
    assert found.scores.tolist() == pytest.approx([(1.8 + 0.6) / 2 * 2 / 3])
    assert found.boxes[0, 0].item() == pytest.approx(0.6 * 2 / 2.4)
    many = candidates((0, 1, A, 0.9, 0), (0, 1, A, 0.6, 0), (0, 1, A, 0.3, 1))  # more boxes than members
    assert merge(many, "wbf", 0.55, 0.5, 100).scores.tolist() == pytest.approx([0.6])


def test_a_weight_moves_ranks_and_votes_but_no_score_above_its_own():
    rows = ((0, 1, A, 0.6, 0), (0, 1, B, 0.8, 1))
    found = merge(candidates(*rows), "vote", 0.5, 0.5, 100)
    assert found.index.tolist() == [1]
    assert found.scores.tolist() == pytest.approx([0.8])
    assert found.boxes[0, 0].item() == pytest.approx(2 * 0.8 / 1.4)
    found = merge(candidates(*rows, weights=[[1.0, 2.0, 1.0], [1.0, 1.0, 1.0]]), "vote", 0.5, 0.5, 100)
    assert found.index.tolist() == [0]
    assert found.scores.tolist() == pytest.approx([0.6])
    assert found.boxes[0, 0].item() == pytest.approx(2 * 0.8 / 2.0)
    assert found.weight.tolist() == pytest.approx([1.2, 0.8])
    without = merge(candidates(*rows, weights=[[1.0] * 3, [0.0] * 3]), "vote", 0.5, 0.5, 100)
    assert without.boxes.tolist() == [A]


def test_nms_and_its_soft_forms_keep_boxes_as_they_are():
    rows = candidates((0, 1, B, 0.6, 1), (0, 1, A, 0.9, 0), (1, 1, A, 0.5, 0), (0, 1, FAR, 0.3, 0))
    found = merge(rows, "nms", 0.5, 0.5, 100)
    assert found.index.tolist() == [1, 3, 2]
    assert found.boxes.tolist() == [A, FAR, A]
    soft = merge(rows, "soft-nms", 0.5, 0.5, 100)
    assert soft.index.tolist() == [1, 3, 0, 2]
    assert soft.scores.tolist() == pytest.approx([0.9, 0.3, 0.6 * 4 / 12, 0.5])
    assert soft.row.tolist() == [0, 1, 2, 3]
    gaussian = merge(rows, "gaussian-soft-nms", 0.5, 0.5, 2)
    assert gaussian.index.tolist() == [1, 3, 2]


def test_equal_scores_go_to_the_earlier_member_and_the_most_are_of_each_image():
    rows = candidates((0, 1, A, 0.5, 0), (0, 1, FAR, 0.5, 1), (0, 2, B, 0.5, 1), (1, 2, B, 0.1, 1))
    found = merge(rows, "nms", 0.5, 0.5, 2)
    assert found.index.tolist() == [0, 1, 3]


@pytest.mark.parametrize("kind", ["nms", "vote", "soft-nms", "gaussian-soft-nms", "wbf"])
def test_an_image_is_merged_as_it_would_be_alone(kind):
    generator = torch.Generator().manual_seed(0)
    count = 200
    every = Candidates(
        torch.randint(0, 4, (count,), generator=generator),
        torch.randint(0, 2, (count,), generator=generator),
        random_boxes(count, canvas=40, generator=generator, dtype=torch.float64),
        torch.rand(count, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (count,), generator=generator),
        torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.5, 1.0]], dtype=torch.float64),
    )
    found = merge(every, kind, 0.5, 0.5, 15)
    for image in range(4):
        own = every.images == image
        columns = (every.images[own], every.labels[own], every.boxes[own], every.scores[own], every.members[own])
        alone = merge(Candidates(*columns, every.weights), kind, 0.5, 0.5, 15)
        rows = every.images[found.index] == image
        assert torch.equal(alone.boxes, found.boxes[rows])
        assert torch.equal(alone.scores, found.scores[rows])
        assert torch.equal(own.nonzero().flatten()[alone.voter], found.voter[rows[found.row]])
    assert (found.scores[1:] <= found.scores[:-1])[
        every.images[found.index][1:] == every.images[found.index][:-1]
    ].all()


def test_no_candidate_gives_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    for kind in ("vote", "wbf", "soft-nms"):
        found = merge(
            Candidates(nothing, nothing, torch.zeros(0, 4), torch.zeros(0), nothing, torch.ones(2, 3)),
            kind,
            0.5,
            0.5,
            9,
        )
        assert found.boxes.shape == (0, 4)
