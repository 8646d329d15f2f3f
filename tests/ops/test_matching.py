import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from factories import make_targets, random_boxes
from megdet.ops.matching import Matches, Sample, match_boxes, sample_matches

BOX = [0.0, 0.0, 10.0, 10.0]


def test_candidates_are_positive_negative_or_neither_by_overlap():
    candidates = torch.tensor(
        [BOX, [0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 2.0], [20.0, 20.0, 30.0, 30.0]]
    )  # 1, .5, .2
    targets = make_targets([(BOX, 0)])
    matches = match_boxes(candidates.unsqueeze(0), targets.boxes, targets.is_box, 0.7, 0.3, keep_best=False)
    assert matches.is_positive.tolist() == [[True, False, False, False]]
    assert matches.is_negative.tolist() == [[False, False, True, True]]


def test_overlaps_of_exactly_the_thresholds_are_positive_and_not_negative():
    candidates = torch.tensor([[0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 2.5]])  # 0.5 and 0.25 without rounding
    targets = make_targets([(BOX, 0)])
    matches = match_boxes(candidates.unsqueeze(0), targets.boxes, targets.is_box, 0.5, 0.25, keep_best=False)
    assert matches.is_positive.tolist() == [[True, False]]
    assert matches.is_negative.tolist() == [[False, False]]


def test_the_best_candidates_of_a_box_are_positive_however_little_they_overlap():
    candidates = torch.tensor([[[0.0, 0.0, 10.0, 2.0], [0.0, 8.0, 10.0, 10.0], [0.0, 0.0, 10.0, 1.0]]])
    targets = make_targets([(BOX, 0), ([90.0, 90.0, 91.0, 91.0], 1)])  # nothing overlaps the second
    matches = match_boxes(candidates, targets.boxes, targets.is_box, 0.7, 0.3, keep_best=True)
    assert matches.is_positive.tolist() == [[True, True, False]]  # both of a tie
    assert matches.is_negative.tolist() == [[False, False, True]]


def test_a_candidate_that_is_best_for_one_box_belongs_to_the_box_it_overlaps_most():
    # the candidate is the only one that touches the second box, but overlaps the first more
    targets = make_targets([(BOX, 0), ([8.0, 0.0, 18.0, 10.0], 1)])
    candidates = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]])
    matches = match_boxes(candidates, targets.boxes, targets.is_box, 0.7, 0.3, keep_best=True)
    assert matches.box_index[0, 0] == 0


def test_ties_belong_to_the_first_box():
    targets = make_targets([(BOX, 0), (BOX, 1)])
    candidates = random_boxes(20).unsqueeze(0)
    matches = match_boxes(candidates, targets.boxes, targets.is_box, 0.7, 0.3, keep_best=True)
    assert matches.box_index.eq(0).all()


def test_an_image_without_boxes_has_negatives_only():
    candidates = random_boxes(20).unsqueeze(0)
    for targets in (make_targets([], width=0), make_targets([], width=3)):
        for keep_best in (False, True):
            matches = match_boxes(candidates, targets.boxes, targets.is_box, 0.7, 0.3, keep_best=keep_best)
            assert not matches.is_positive.any()
            assert matches.is_negative.all()


def test_no_images_and_no_candidates_match_nothing():
    targets = make_targets()
    none = match_boxes(random_boxes(5).unsqueeze(0), targets.boxes, targets.is_box, 0.7, 0.3, keep_best=True)
    assert none.box_index.shape == (0, 5)
    targets = make_targets([(BOX, 0)])
    none = match_boxes(torch.zeros(1, 0, 4), targets.boxes, targets.is_box, 0.7, 0.3, keep_best=True)
    assert none.is_positive.shape == (1, 0)


def test_matches_equal_torchvisions():
    generator = torch.Generator().manual_seed(0)
    matcher = torchvision.models.detection._utils.Matcher(0.7, 0.3, allow_low_quality_matches=True)
    for _ in range(20):
        candidates, boxes = random_boxes(200, generator=generator), random_boxes(6, generator=generator)
        theirs = matcher(torchvision.ops.box_iou(boxes, candidates))
        ours = match_boxes(
            candidates.unsqueeze(0), boxes.unsqueeze(0), torch.ones(1, 6, dtype=torch.bool), 0.7, 0.3, keep_best=True
        )
        assert torch.equal(ours.is_positive[0], theirs >= 0)
        assert torch.equal(ours.is_negative[0], theirs == -1)
        assert torch.equal(ours.box_index[0][theirs >= 0], theirs[theirs >= 0])


@st.composite
def matched(draw) -> tuple[Matches, torch.Tensor, torch.Tensor]:
    """Matches of 1 or 2 images, identities and seeds."""
    images, candidates = draw(st.integers(1, 2)), draw(st.integers(0, 25))
    kinds = st.lists(st.sampled_from([0, 1, 2]), min_size=candidates, max_size=candidates)
    kind = torch.tensor([draw(kinds) for _ in range(images)], dtype=torch.int64).reshape(images, candidates)
    identities = torch.stack([torch.randperm(1000)[:candidates] for _ in range(images)])
    seeds = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(images)])
    return Matches(torch.zeros_like(kind), kind == 1, kind == 2), identities, seeds


@given(matched(), st.integers(1, 30), st.floats(0, 1))
def test_a_sample_keeps_its_limits_and_takes_what_there_is(case, samples, fraction):
    matches, identities, seeds = case
    sample = sample_matches(matches, identities, seeds, samples, fraction)
    assert sample.index.shape == (len(seeds), samples)
    for image in range(len(seeds)):
        positives = min(int(samples * fraction), int(matches.is_positive[image].sum()))
        negatives = min(samples - positives, int(matches.is_negative[image].sum()))
        assert int(sample.is_positive[image].sum()) == positives
        assert int(sample.is_valid[image].sum()) == positives + negatives
        chosen = sample.index[image][sample.is_valid[image]]
        assert len(chosen.unique()) == len(chosen)
        assert matches.is_positive[image][sample.index[image][sample.is_positive[image]]].all()
        is_negative = sample.is_valid[image] & ~sample.is_positive[image]
        assert matches.is_negative[image][sample.index[image][is_negative]].all()
        assert sample.index[image][~sample.is_valid[image]].eq(0).all()


def chosen_identities(sample: Sample, identities: torch.Tensor) -> list[list[tuple[int, bool]]]:
    return [
        [(int(identities[i, j]), bool(p)) for j, p, v in zip(*rows, strict=True) if v]
        for i, rows in enumerate(zip(sample.index, sample.is_positive, sample.is_valid, strict=True))
    ]


@given(matched(), st.integers(1, 30), st.floats(0, 1), st.randoms(use_true_random=False))
def test_listing_the_candidates_in_another_order_samples_the_same_ones(case, samples, fraction, random):
    matches, identities, seeds = case
    order = list(range(identities.shape[1]))
    random.shuffle(order)
    shuffled = Matches(matches.box_index[:, order], matches.is_positive[:, order], matches.is_negative[:, order])
    first = sample_matches(matches, identities, seeds, samples, fraction)
    second = sample_matches(shuffled, identities[:, order], seeds, samples, fraction)
    assert chosen_identities(first, identities) == chosen_identities(second, identities[:, order])


def test_an_image_is_sampled_alike_alone_and_among_others():
    identities = torch.arange(100).unsqueeze(0)
    is_positive = torch.rand(3, 100) < 0.3
    matches = Matches(torch.zeros(3, 100, dtype=torch.int64), is_positive, ~is_positive)
    seeds = torch.tensor([5, 6, 7])
    together = sample_matches(matches, identities, seeds, 20, 0.5)
    for i in range(3):
        own = Matches(matches.box_index[i : i + 1], is_positive[i : i + 1], ~is_positive[i : i + 1])
        assert torch.equal(sample_matches(own, identities, seeds[i : i + 1], 20, 0.5).index[0], together.index[i])


def test_another_seed_samples_other_candidates_each_as_often_as_any():
    images, candidates, samples = 2000, 20, 5
    matches = Matches(
        torch.zeros(images, candidates, dtype=torch.int64),
        torch.zeros(images, candidates, dtype=torch.bool),
        torch.ones(images, candidates, dtype=torch.bool),
    )
    sample = sample_matches(matches, torch.arange(candidates).unsqueeze(0), torch.arange(images) * 104729, samples, 0.5)
    counts = sample.index.flatten().bincount(minlength=candidates)
    assert (counts - images * samples / candidates).abs().max() < 5 * (images * 0.25 * 0.75) ** 0.5
