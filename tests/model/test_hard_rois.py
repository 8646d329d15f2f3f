"""Hard RoIs beside a double loop over images and RoIs, each looked at alone, and beside hand arithmetic."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from factories import (
    SMALL_MASKS,
    TINY,
    TINY_FROZEN,
    gradients,
    make_targets,
    masked_batch,
    of_kind,
    random_boxes,
    tiny_batch,
    tiny_detector,
    with_model,
)
from megdet.architecture import CascadeMaskRcnn, Rfcn
from megdet.architecture_heads import BoxHead, PositionSensitiveHead
from megdet.architecture_parts import AtrousBackbone, SingleLevelAnchors
from megdet.bounds import faults_of
from megdet.distributed.world import World
from megdet.layers.batch_norm import finish_step
from megdet.layers.recompute import plainly
from megdet.model.choice import make_detector
from megdet.model.detector import Detector
from megdet.model.hard_rois import choose_rois, hardest
from megdet.model.roi_head import SampledRois
from megdet.ops.boxes import encode_boxes
from megdet.ops.roi_align import feature_table
from megdet.recipe import Recipe
from megdet.structures import Batch


def rois_of(boxes: Tensor, is_positive: Tensor, is_valid: Tensor) -> SampledRois:
    nothing = torch.zeros(boxes.shape[:2], dtype=torch.int64)
    return SampledRois(boxes, nothing, torch.zeros_like(boxes), nothing, is_positive, is_valid)


def apart(count: int) -> Tensor:
    """Boxes that do not touch."""
    return torch.tensor([[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(count)]).unsqueeze(0)


def test_the_hardest_come_positives_first_and_ties_go_to_the_lower_place():
    losses = torch.tensor([[1.0, 5.0, 3.0, 3.0, 9.0, 3.0]])
    is_positive = torch.tensor([[False, False, True, False, True, True]])
    is_valid = torch.tensor([[True, True, True, True, False, True]])
    index, valid = hardest(losses, rois_of(apart(6), is_positive, is_valid), 3, 1.0)
    assert index.tolist() == [[2, 1, 3]]  # 5, 3 and 3; of the three of loss 3 the last one is left out
    assert valid.tolist() == [[True, True, True]]
    index, valid = hardest(losses, rois_of(apart(6), is_positive, is_valid), 9, 1.0)
    assert index[0, :5].tolist() == [2, 5, 1, 3, 0]
    assert valid.tolist() == [[True] * 5 + [False]]


def test_a_loss_that_is_not_a_number_is_chosen_and_not_hidden():
    losses = torch.tensor([[1.0, float("nan"), 3.0]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    for iou in (1.0, 0.7):
        index, valid = hardest(losses, rois_of(apart(3), ~everything, everything), 2, iou)
        assert index.tolist() == [[1, 2]]
        assert valid.all()


def test_rois_that_overlap_a_harder_one_are_left_out():
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [3.0, 0.0, 13.0, 10.0]]])  # 9/11, 7/13, 8/12
    everything = torch.ones(1, 3, dtype=torch.bool)
    rois = rois_of(boxes, ~everything, everything)
    index, valid = hardest(torch.tensor([[1.0, 2.0, 3.0]]), rois, 3, 0.6)
    assert (index[valid].tolist(), valid.sum()) == ([2, 0], 2)  # 2 takes 1 (8/12), which no longer takes 0
    index, valid = hardest(torch.tensor([[1.0, 2.0, 3.0]]), rois, 3, 0.7)
    assert (index[valid].tolist(), valid.sum()) == ([2, 1], 2)


@given(st.integers(0, 2**32), st.sampled_from([1.0, 0.7, 0.3]), st.integers(1, 14))
def test_the_hardest_are_those_of_a_double_loop(seed, iou, count):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(24, canvas=40, generator=generator).reshape(2, 12, 4)
    losses = torch.randint(0, 6, (2, 12), generator=generator).float()  # many ties
    is_valid, is_positive = (torch.rand(2, 12, generator=generator) < part for part in (0.8, 0.4))
    index, valid = hardest(losses, rois_of(boxes, is_positive & is_valid, is_valid), count, iou)
    for image in range(2):
        chosen: list[int] = []
        left = [i for i in range(12) if is_valid[image, i]]
        for i in sorted(left, key=lambda i: -losses[image, i]):  # a stable sort
            overlaps = box_iou(boxes[image, i].reshape(1, 4), boxes[image, chosen].reshape(-1, 4))
            if not chosen or overlaps.max() <= iou:
                chosen.append(i)
        chosen = sorted(chosen[:count], key=lambda i: not is_positive[image, i])
        assert index[image][valid[image]].tolist() == chosen


def test_a_limit_of_overlap_without_hard_sampling_is_refused():
    assert [key for key, _ in faults_of(BoxHead(hard_nms_iou=0.7))] == ["hard_nms_iou"]
    assert [key for key, _ in faults_of(PositionSensitiveHead(hard_nms_iou=0.7))] == ["hard_nms_iou"]
    assert not [*faults_of(BoxHead(sampling="hard", hard_nms_iou=0.7))]


def hard(recipe: Recipe, **keys: object) -> Recipe:
    return with_model(recipe, box_head={"sampling": "hard", "samples": 12, "positive_iou": 0.3} | keys)


def rfcn(recipe: Recipe) -> Recipe:
    own = PositionSensitiveHead(channels=16, pool_size=3, samples=16, detections=10)
    model = Rfcn(
        backbone=AtrousBackbone(name="resnet18"),
        anchors=SingleLevelAnchors(sizes=(12.0, 24.0, 48.0)),
        rpn=recipe.model.rpn,
        box_head=own,
    )
    return replace(recipe, model=model)


RECIPES = {
    "faster": hard(TINY_FROZEN),
    "faster, thinned": hard(TINY_FROZEN, hard_nms_iou=0.5),
    "cascade": hard(of_kind(TINY_FROZEN, CascadeMaskRcnn, mask_head=replace(SMALL_MASKS, norm="none"))),
    "rfcn": hard(rfcn(TINY_FROZEN), hard_nms_iou=0.7),
}


def made(recipe: Recipe) -> Detector:
    """A detector in float64 whose losses differ from RoI to RoI."""
    if recipe.model.kind != "rfcn":
        return tiny_detector(recipe).double()
    torch.manual_seed(0)
    detector = make_detector(recipe, 3).double()
    with torch.no_grad():
        detector.box_head.classes.weight.mul_(10)
        detector.rpn.objectness.weight.mul_(20)
    return detector


def looks(detector: Detector, batch: Batch):
    """Proposals, and a function from boxes to what the (first) head says."""
    images = detector.normalized(batch.pixels, batch.sizes)
    maps = detector.features(images)
    if detector.architecture.kind == "rfcn":
        proposals = detector.propose(maps[0], images, batch.sizes).proposals
        return proposals, lambda boxes, _: detector.box_head.vote(maps[1:], boxes)
    proposals = detector.propose(maps, (64, 64), batch.sizes).proposals
    return proposals, partial(detector.refine, feature_table(maps), batch.sizes)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_loss_is_that_of_the_hardest_of_a_loop_over_images_and_rois(recipe):
    detector = made(recipe)
    own = detector.architecture.box_head
    batch = masked_batch(3)
    targets = replace(batch.targets, boxes=batch.targets.boxes.double())
    with torch.no_grad():
        found = detector(batch)
        proposals, look = looks(detector, batch)
        positives = 0
        for i in range(3):
            truth, labels = targets.boxes[i][targets.is_box[i]], targets.labels[i][targets.is_box[i]]
            boxes = torch.cat([proposals.boxes[i][proposals.is_valid[i]], truth])
            assert len(boxes) > own.samples
            terms = []
            for box in boxes:
                rois = torch.zeros(3, 1, 4, dtype=torch.float64)
                rois[i, 0] = box
                logits, deltas = (part[i, 0] for part in look(rois, torch.ones(3, 1, dtype=torch.bool)))
                overlap, place = box_iou(box.reshape(1, 4), truth)[0].max(0)
                is_positive = bool(overlap >= own.positive_iou)
                label = int(labels[place]) if is_positive else 3
                class_loss, box_loss = float(-logits.log_softmax(0)[label]), 0.0
                if is_positive:
                    wanted = encode_boxes(truth[place], box, (10.0, 10.0, 5.0, 5.0))
                    row = deltas[label] if len(deltas) > 1 else deltas[0]
                    box_loss = float(F.smooth_l1_loss(row, wanted, beta=1 / 9, reduction="sum"))
                terms.append((class_loss, box_loss, is_positive))
            chosen: list[int] = []
            for j in sorted(range(len(boxes)), key=lambda j: -sum(terms[j][:2])):
                overlaps = box_iou(boxes[j].reshape(1, 4), boxes[chosen].reshape(-1, 4))
                if not chosen or overlaps.max() <= own.hard_nms_iou:
                    chosen.append(j)
            chosen = chosen[: own.samples]
            for name, place in (("class", 0), ("box", 1), ("positive", 2)):
                mean = sum(terms[j][place] for j in chosen) / len(chosen)
                assert float(found[f"box_head_{name}"][i]) == pytest.approx(mean, rel=1e-9)
            positives += sum(terms[j][2] for j in chosen)
        assert positives > 3


@pytest.mark.parametrize("recipe", [RECIPES["faster, thinned"], RECIPES["cascade"]], ids=["faster", "cascade"])
def test_one_look_at_all_rois_and_a_second_look_at_the_hard_ones_train_alike(recipe):
    found = []
    for shared in (False, True):
        detector = made(recipe)
        detector.box_head.rois_share_statistics = shared
        losses = detector(masked_batch(3))
        sum(losses[name].sum() for name in detector.loss_names).backward()
        found.append((losses, gradients(detector)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert found[0][1]["box_head.fc1.weight"].abs().max() > 0


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_batch_statistics_are_those_of_all_rois_and_are_updated_once(recompute):
    recipe = hard(with_model(replace(TINY, recompute=recompute), box_head={"norm": "batch"}))
    detector = tiny_detector(recipe).double()
    before = detector.box_head.norm1.running_mean.clone()
    batch = tiny_batch(2)
    with torch.no_grad():
        proposals, _ = looks(detector, batch)
        targets = replace(batch.targets, boxes=batch.targets.boxes.double())
        candidates = detector.box_head.candidates(proposals, targets)
        maps = detector.features(detector.normalized(batch.pixels, batch.sizes))
        pooled = detector.pooling(feature_table(maps), candidates.boxes).flatten(1)[candidates.is_valid.flatten()]
        plain = nn.BatchNorm1d(32, momentum=0.1).double()
        plain.running_mean.copy_(before)
        plain(F.linear(pooled, detector.box_head.fc1.weight))
    for norm in detector.modules():  # what the looks above left behind
        if hasattr(norm, "step_mean"):
            norm.step_mean.zero_()
            norm.step_var.zero_()
    losses = detector(batch)
    sum(losses[name].sum() for name in detector.loss_names).backward()
    finish_step(detector.modules(), 1, World(0, 1, torch.device("cpu")))
    assert len(pooled) > 2 * recipe.model.box_head.samples
    torch.testing.assert_close(detector.box_head.norm1.running_mean, plain.running_mean)
    assert detector.box_head.norm1.num_batches_tracked == 1


def test_a_recomputed_forward_and_images_alone_have_the_same_losses():
    recipe = RECIPES["faster, thinned"]
    batch = tiny_batch(3)
    with torch.no_grad():
        whole = made(recipe)(batch)
        again = made(replace(recipe, recompute="block"))(batch)
        alone = [made(recipe)(batch[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(again, whole, rtol=1e-12, atol=0)
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([own[name] for own in alone]), values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_images_without_boxes_and_shares_without_images_pass_through(norm):
    recipe = hard(with_model(TINY, box_head={"norm": norm}))
    detector = tiny_detector(recipe)
    empty = replace(tiny_batch(2), targets=make_targets([], []))
    for batch in (empty, empty[:0]):
        losses = detector(batch)
        assert all(own.isfinite().all() and own.shape == (len(batch.sizes),) for own in losses.values())
        assert losses["box_head_positive"].sum() == 0
        sum(losses[name].sum() for name in detector.loss_names).backward()


def test_the_mask_branch_learns_from_every_positive_that_was_chosen():
    recipe = hard(RECIPES["cascade"], samples=16, positive_iou=0.1)
    detector = made(recipe)
    batch = masked_batch(3)
    with torch.no_grad():
        found = detector(batch)["mask_head"]
        proposals, look = looks(detector, batch)
        targets = replace(batch.targets, boxes=batch.targets.boxes.double())
        sampled, _ = choose_rois(detector.box_head, look, proposals, targets)
        counts = sampled.is_positive.sum(1).tolist()
        assert max(counts) > 16 * recipe.model.box_head.positive_fraction
        table = feature_table(detector.features(detector.normalized(batch.pixels, batch.sizes)))
        sums = torch.zeros(3, dtype=torch.float64)
        for row in range(max(counts)):  # each RoI as the only one of its image
            place = torch.full((3, 1), row)
            alone = sampled.at(place, sampled.is_positive.gather(1, place))
            masks = detector.mask_head.losses(table, alone, batch.targets.masks, batch.sizes, plainly)
            sums += masks["mask_head"]
    torch.testing.assert_close(found, sums / torch.tensor(counts).clamp(min=1))
