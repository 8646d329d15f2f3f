from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from factories import TINY, make_targets, random_boxes
from megdet.architecture_heads import BoxHead as BoxHeadRecipe
from megdet.distributed.lane import SINGLE_LANE
from megdet.distributed.world import World
from megdet.layers.batch_norm import finish_step
from megdet.layers.convert import norm_factory
from megdet.layers.recompute import plainly, recompute
from megdet.model.box_head import BoxHead
from megdet.model.pooling import RoiPooling
from megdet.model.proposals import Proposals
from megdet.ops.boxes import box_iou
from megdet.ops.roi_align import feature_table

RECIPE = BoxHeadRecipe(channels=8, samples=12, canonical_size=56.0, pool_size=3, smooth_l1_beta=1.0, detections=6)
TRUTH = [([10.0, 10.0, 40.0, 40.0], 2), ([50.0, 5.0, 60.0, 25.0], 0)]


POOLING = RoiPooling(RECIPE.pool_size, RECIPE.sampling_ratio, RECIPE.aligned, RECIPE.canonical_size)


def make_head(recipe: BoxHeadRecipe = RECIPE, num_classes: int = 3, bn_size: int = 0) -> BoxHead:
    torch.manual_seed(0)
    return BoxHead(recipe, 4, num_classes, norm_factory(recipe.norm, SINGLE_LANE if bn_size else None))


def make_proposals(boxes: torch.Tensor, invalid: int = 0) -> Proposals:
    """The same proposals for each image; the last `invalid` stand for nothing."""
    images, count = boxes.shape[:2]
    is_valid = (torch.arange(count) < count - invalid).expand(images, -1)
    return Proposals(boxes, torch.arange(count).expand(images, -1), is_valid)


def test_losses_are_those_of_hand_arithmetic():
    head = make_head(replace(RECIPE, samples=4), num_classes=2)
    near = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]])
    targets = make_targets([([1.0, 0.0, 11.0, 10.0], 1)])
    sampled = head.sample(make_proposals(near), targets)  # a quarter of 4: one positive
    assert sampled.is_valid.tolist() == [[True, True, False, False]]
    logits = torch.tensor([[[0.0, 1.0, 2.0]] * 4])
    deltas = torch.zeros(1, 4, 2, 4)
    deltas[..., 0, :] = 100.0  # the class it is not
    deltas[..., 1, :] = sampled.deltas[0, 0] + torch.tensor([0.5, 0.0, 3.0, 0.0])
    losses = head.losses(logits, deltas, sampled)
    total = torch.logsumexp(torch.tensor([0.0, 1.0, 2.0]), 0)
    torch.testing.assert_close(losses["box_head_class"], ((total - 1 + total - 2) / 2).reshape(1))
    torch.testing.assert_close(losses["box_head_box"], torch.tensor([(0.125 + 2.5) / 2]))
    assert losses["box_head_positive"].tolist() == [0.5]


def test_the_forward_is_two_layers_on_the_bins_of_each_roi():
    head = make_head()
    table = feature_table([torch.full((2, 4, 64 // s, 64 // s), 0.5) for s in (4, 8, 16, 32)])
    rois = random_boxes(10, canvas=50).reshape(2, 5, 4)
    logits, deltas = head(lambda: POOLING(table, rois), torch.ones(2, 5, dtype=torch.bool))
    hidden = F.relu(head.fc2(F.relu(head.fc1(torch.full((1, 36), 0.5)))))
    torch.testing.assert_close(logits, head.classes(hidden).expand(2, 5, 4))
    torch.testing.assert_close(deltas, head.deltas(hidden).reshape(1, 1, 3, 4).expand(2, 5, 3, 4))


def test_padded_rois_stay_out_of_batch_statistics():
    torch.manual_seed(1)
    table = feature_table([torch.randn(1, 4, 64 // s, 64 // s) for s in (4, 8, 16, 32)])
    rois = random_boxes(9, canvas=50).unsqueeze(0)
    states = []
    for count in (9, 6):
        head = make_head(replace(RECIPE, norm="batch"), bn_size=2)
        logits, _ = head(partial(POOLING, table, rois[:, :count]), torch.arange(count).unsqueeze(0) < 6)
        finish_step(head.modules(), 1, World(0, 1, torch.device("cpu")))
        states.append((head.state_dict(), logits[:, :6]))
    torch.testing.assert_close(states[0], states[1])
    assert states[0][0]["norm1.running_mean"].abs().max() > 0


CONVOLVED = replace(RECIPE, convolutions=2, convolution_channels=6, layers=1)


def test_convolutions_come_before_the_fully_connected_layers_as_in_torchvisions_head():
    head = make_head(replace(CONVOLVED, norm="batch"), bn_size=2)
    norm = partial(torch.nn.BatchNorm2d, momentum=1.0)
    theirs = FastRCNNConvFCHead((4, 3, 3), [6, 6], [8], norm_layer=norm)
    with torch.no_grad():
        for block, own in zip(head.convolutions, theirs, strict=False):
            own[0].weight.copy_(block[0].weight)
        theirs[3].weight.copy_(head.fc1.weight.reshape(8, 9, 6).transpose(1, 2).flatten(1))
        theirs[3].bias.copy_(head.fc1.bias)
    pooled = torch.randn(10, 9, 4)
    logits, deltas = head(lambda: pooled, torch.ones(2, 5, dtype=torch.bool))
    hidden = theirs(pooled.transpose(1, 2).reshape(10, 4, 3, 3))
    torch.testing.assert_close(logits.flatten(0, 1), head.classes(hidden))
    torch.testing.assert_close(deltas.reshape(10, -1), head.deltas(hidden))
    finish_step(head.modules(), 1, World(0, 1, torch.device("cpu")))
    mean = theirs[1][1].running_mean  # momentum 1: the group's own
    torch.testing.assert_close(head.convolutions[1][1].running_mean, 0.1 * mean)
    assert isinstance(head.norm1, torch.nn.Identity)


def test_padded_rois_stay_out_of_the_statistics_of_convolutions():
    torch.manual_seed(1)
    pooled = torch.randn(9, 9, 4)
    found = []
    for count in (9, 6):
        head = make_head(replace(CONVOLVED, norm="batch"), bn_size=2)
        rows = pooled[:count].clone()
        rows[6:] *= 1000
        logits, _ = head(lambda rows=rows: rows, torch.arange(count).unsqueeze(0) < 6)
        logits[:, :6].square().sum().backward()
        finish_step(head.modules(), 1, World(0, 1, torch.device("cpu")))
        found.append((head.state_dict(), logits[:, :6], [p.grad for p in head.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][0]["convolutions.1.1.running_mean"].abs().max() > 0


INCEPTION = replace(RECIPE, convolutions=1, convolution_channels=8, block="inception")
AROUND = replace(CONVOLVED, regions=("left", "enlarged"), global_context=True)


def with_all_streams(head: BoxHead, pooled: torch.Tensor, *others: torch.Tensor, plan=plainly):
    """What a head with regions says of RoIs whose features, and those around, are these."""
    is_valid = torch.arange(5).expand(2, -1) < 4
    around = {name: lambda rows=rows: rows for name, rows in zip(head.around, others, strict=True)}
    return head(lambda: pooled, is_valid, plan, around)


def test_features_around_a_roi_and_of_its_image_join_its_own_before_the_first_layer():
    head = make_head(replace(RECIPE, regions=("left", "enlarged"), global_context=True))
    pooled, left, enlarged, images = (
        torch.randn(10, 9, 4),
        torch.randn(10, 9, 4),
        torch.randn(10, 9, 4),
        torch.randn(2, 9, 4),
    )
    logits, deltas = with_all_streams(head, pooled, left, enlarged, images)
    joined = torch.cat([pooled, left, enlarged, images.repeat_interleave(5, 0)], 1).flatten(1)
    weight = torch.cat([head.fc1.weight, *(stream.fc1.weight for stream in head.around.values())], 1)
    hidden = F.relu(head.fc2(F.relu(F.linear(joined, weight, head.fc1.bias))))
    torch.testing.assert_close(logits.flatten(0, 1), head.classes(hidden))
    torch.testing.assert_close(deltas.reshape(10, -1), head.deltas(hidden))
    bound = (3 / weight.shape[1]) ** 0.5  # as one layer of all inputs starts
    assert 0.9 * bound < weight.abs().max() <= bound


def test_convolutions_around_a_roi_have_weights_of_their_own():
    head, plain = make_head(AROUND), make_head(CONVOLVED)
    plain.load_state_dict({name: own for name, own in head.state_dict().items() if not name.startswith("around.")})
    rows = [torch.randn(10, 9, 4), torch.randn(10, 9, 4), torch.randn(10, 9, 4), torch.randn(2, 9, 4)]
    logits, _ = with_all_streams(head, *rows)
    captured = []
    plain.norm1.register_forward_hook(lambda _module, given, _result: captured.append(given[0]))
    plain(lambda: rows[0], torch.ones(2, 5, dtype=torch.bool))
    for stream, pooled in zip(head.around.values(), rows[1:], strict=True):
        own = make_head(CONVOLVED)
        own.convolutions, own.fc1.weight = stream.convolutions, stream.fc1.weight
        torch.nn.init.zeros_(own.fc1.bias)
        own.norm1.register_forward_hook(lambda _module, given, _result: captured.append(given[0]))
        own(lambda pooled=pooled: pooled, torch.ones(2, len(pooled) // 2, dtype=torch.bool))
    total = captured[0] + captured[1] + captured[2] + captured[3].repeat_interleave(5, 0)
    torch.testing.assert_close(logits.flatten(0, 1), head.classes(F.relu(total)))


@pytest.mark.parametrize("recipe", [RECIPE, CONVOLVED, INCEPTION], ids=["layers", "convolutions", "inception"])
def test_of_two_scales_the_larger_value_remains_behind_the_first_convolution(recipe):
    head, plain = make_head(replace(recipe, maxout=True)), make_head(recipe)
    plain.load_state_dict(head.state_dict())
    pooled = torch.randn(20, 9, 4)
    logits, _ = head(lambda: pooled, torch.ones(2, 5, dtype=torch.bool))
    if not recipe.convolutions:
        wanted, _ = plain(lambda: torch.maximum(pooled[:10], pooled[10:]), torch.ones(2, 5, dtype=torch.bool))
    else:
        maps = pooled.transpose(1, 2).reshape(20, 4, 3, 3)
        maps = head.convolutions[0](maps, torch.ones(4, 5, dtype=torch.bool))
        maps = torch.maximum(maps[:10], maps[10:])
        for convolution in head.convolutions[1:]:
            maps = convolution(maps, torch.ones(2, 5, dtype=torch.bool))
        hidden = F.relu(head.fc1(maps.permute(0, 2, 3, 1).flatten(1)))
        hidden = F.relu(head.fc2(hidden)) if recipe.layers > 1 else hidden
        wanted = head.classes(hidden).reshape(2, 5, 4)
    torch.testing.assert_close(logits, wanted)
    halves = [plain(lambda rows=rows: rows, torch.ones(2, 5, dtype=torch.bool))[0] for rows in pooled.chunk(2)]
    assert all((logits - half).abs().max() > 1e-4 for half in halves)


@pytest.mark.parametrize(
    ("recipe", "norm"),
    [
        *((recipe, norm) for recipe in (RECIPE, CONVOLVED, replace(RECIPE, layers=3)) for norm in ("batch", "none")),
        (CONVOLVED, "group"),
        (INCEPTION, "batch"),
        (replace(INCEPTION, maxout=True), "batch"),
    ],
)
def test_a_recomputed_head_has_the_same_results_gradients_and_statistics(recipe, norm):
    torch.manual_seed(1)
    start = torch.randn(10, 9, 4)
    found = []
    for plan in (plainly, recompute):
        head = make_head(replace(recipe, norm=norm), bn_size=2)
        pooled = start.repeat(head.scales, 1, 1).requires_grad_()
        logits, deltas = head(lambda pooled=pooled: pooled * 2, torch.arange(5).expand(2, -1) < 4, plan)
        (logits.square().sum() + deltas.sum()).backward()
        finish_step(head.modules(), 1, World(0, 1, torch.device("cpu")))
        found.append((head.state_dict(), logits, pooled.grad, [p.grad for p in head.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[0][2].abs().max() > 0


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_recomputed_streams_have_the_same_results_gradients_and_statistics(norm):
    torch.manual_seed(1)
    start = [torch.randn(count, 9, 4) for count in (20, 20, 20, 2)]
    found = []
    for plan in (plainly, recompute):
        head = make_head(replace(AROUND, norm=norm, maxout=True), bn_size=2)
        rows = [own.clone().requires_grad_() for own in start]
        logits, deltas = with_all_streams(head, *rows, plan=plan)
        (logits.square().sum() + deltas.sum()).backward()
        finish_step(head.modules(), 1, World(0, 1, torch.device("cpu")))
        found.append((head.state_dict(), logits, [r.grad for r in rows], [p.grad for p in head.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert min(float(own.abs().max()) for own in found[0][2]) > 0


def test_a_head_of_no_rois_passes_through():
    head = make_head(replace(CONVOLVED, norm="batch"), bn_size=2)
    pooled = torch.zeros(0, 9, 4, requires_grad=True)
    logits, deltas = head(lambda: pooled, torch.ones(0, 5, dtype=torch.bool))
    assert (logits.shape, deltas.shape) == ((0, 5, 4), (0, 5, 3, 4))
    (logits.sum() + deltas.sum()).backward()


def test_the_boxes_themselves_are_compared_where_the_recipe_asks_for_giou():
    head = make_head(replace(RECIPE, samples=4, box_loss="giou"), num_classes=2)
    near = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]])
    sampled = head.sample(make_proposals(near), make_targets([([1.0, 0.0, 11.0, 10.0], 1)]))
    deltas = torch.full((1, 4, 2, 4), 7.0)
    deltas[..., 1, :] = 0.0  # of its own class: the RoI as it is
    losses = head.losses(torch.zeros(1, 4, 3), deltas, sampled)
    overlap = float(box_iou(sampled.boxes[0, :1], torch.tensor([[1.0, 0.0, 11.0, 10.0]])))
    torch.testing.assert_close(losses["box_head_box"], torch.tensor([(1 - overlap) / 2]))


def detect(
    logits: torch.Tensor, proposals: Proposals, recipe: BoxHeadRecipe = RECIPE, deltas: torch.Tensor | None = None
):
    deltas = torch.zeros(*logits.shape[:2], 3, 4) if deltas is None else deltas
    return make_head(recipe).detections(logits.softmax(2), deltas, proposals, torch.tensor([[64, 64]] * len(logits)))


def test_detections_are_thinned_within_a_class_and_sorted_by_score():
    boxes = torch.tensor([[[0.0, 0.0, 20.0, 20.0], [1.0, 0.0, 21.0, 20.0], [40.0, 40.0, 60.0, 60.0]]])
    probabilities = torch.tensor([[[0.6, 0.01, 0.01, 0.38], [0.5, 0.3, 0.01, 0.19], [0.04, 0.9, 0.01, 0.05]]])
    found = detect(probabilities.log(), make_proposals(boxes))
    assert found.labels.tolist() == [[1, 0, 1, -1, -1, -1]]
    torch.testing.assert_close(found.scores, torch.tensor([[0.9, 0.6, 0.3, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(found.boxes[0, :3], boxes[0, [2, 0, 1]])
    assert found.boxes[0, 3:].eq(0).all()


def test_no_more_than_the_asked_number_is_detected_and_invalid_proposals_never():
    boxes = torch.tensor([[[4.0 * i, 0.0, 4.0 * i + 3, 9.0] for i in range(10)]])
    logits = torch.zeros(1, 10, 4)
    logits[:, :, 1] = torch.arange(10.0) / 10
    found = detect(logits, make_proposals(boxes, invalid=2))
    assert found.labels.shape == (1, 6)
    assert found.labels.eq(1).sum() == 6
    assert found.boxes[0, 0, 0] == 28  # the best of the eight that are valid


def test_tiny_boxes_and_scores_at_the_threshold_are_dropped():
    boxes = torch.tensor([[[0.0, 0.0, 20.0, 0.005], [0.0, 0.0, 20.0, 20.0]]])
    probabilities = torch.tensor([[[0.9, 0.03, 0.03, 0.04], [0.25, 0.25, 0.25, 0.25]]])
    found = detect(probabilities.log(), make_proposals(boxes), replace(RECIPE, score_threshold=0.25))
    assert found.labels.eq(-1).all()


def test_detections_lie_in_the_image_and_poison_is_no_detection():
    boxes = random_boxes(8, canvas=60).unsqueeze(0)
    deltas = torch.randn(1, 8, 3, 4) * 5
    deltas[0, :4] = float("nan")
    logits = torch.randn(1, 8, 4)
    logits[0, 7] = float("nan")
    found = detect(logits, make_proposals(boxes), replace(RECIPE, detections=50), deltas)
    assert found.boxes.isfinite().all()
    assert found.scores.isfinite().all()
    assert 0 < (found.labels >= 0).sum() <= 9
    assert found.boxes.min() >= 0
    assert found.boxes.max() <= 64


def test_the_recipe_says_whether_layers_have_a_norm_or_a_bias():
    assert make_head().fc1.bias is not None
    assert make_head(replace(TINY.model.box_head, norm="group")).fc1.bias is None
