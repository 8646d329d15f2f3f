import pytest
import torch
from torch.nn import functional as F

from factories import TINY, TINY_FROZEN, gradients, make_targets, relative, tiny_batch, tiny_detector, with_model
from megdet.architecture_parts import Anchors
from megdet.architecture_parts import Rpn as RpnRecipe
from megdet.distributed.lane import SINGLE_LANE
from megdet.distributed.world import World
from megdet.layers.batch_norm import finish_step
from megdet.layers.convert import norm_factory
from megdet.model.anchors import AnchorGrid
from megdet.model.choice import make_detector
from megdet.model.faster_rcnn import FasterRcnn
from megdet.model.proposals import Proposals
from megdet.model.rpn import Rpn
from megdet.ops.boxes import box_iou
from megdet.ops.roi_align import feature_table

CPU = torch.device("cpu")
SIZES = (8.0, 16.0, 32.0, 48.0, 64.0)


def tiny_pyramid(images: int = 2, channels: int = 4) -> list[torch.Tensor]:
    """P2 to P6 of a canvas of 96 x 64 pixels."""
    return [torch.randn(images, channels, h, w) for h, w in ((24, 16), (12, 8), (6, 4), (3, 2), (2, 1))]


def tiny_anchors(pyramid: list[torch.Tensor]) -> list[torch.Tensor]:
    return AnchorGrid(Anchors(sizes=SIZES))(
        (96, 64), [(level.shape[2], level.shape[3]) for level in pyramid], torch.float32, CPU
    )


def make_rpn(recipe: RpnRecipe, bn_size: int = 0, channels: int = 4) -> Rpn:
    torch.manual_seed(0)
    return Rpn(recipe, channels, 3, norm_factory(recipe.norm, SINGLE_LANE if bn_size else None))


def test_outputs_are_ordered_as_the_anchors_are():
    rpn = make_rpn(RpnRecipe())
    pyramid = tiny_pyramid()
    logits, deltas = rpn(pyramid)
    anchors = tiny_anchors(pyramid)
    assert [level.shape for level in logits] == [(2, len(level)) for level in anchors]
    hidden = F.relu(rpn.conv(pyramid[1]))
    y, x, ratio = 7, 3, 2
    place = (y * 8 + x) * 3 + ratio
    assert anchors[1][place].tolist()[0] == 8 * x - round(16 / 2**0.5 / 2)
    torch.testing.assert_close(logits[1][1, place], rpn.objectness(hidden)[1, ratio, y, x])
    torch.testing.assert_close(deltas[1][1, place], rpn.deltas(hidden)[1, 4 * ratio : 4 * ratio + 4, y, x])


def propose(recipe: RpnRecipe, seed: int = 0, spread: float = 0.3):
    torch.manual_seed(seed)
    pyramid = tiny_pyramid()
    anchors = tiny_anchors(pyramid)
    logits = [torch.randn(2, len(level)) for level in anchors]
    deltas = [torch.randn(2, len(level), 4) * spread for level in anchors]
    sizes = torch.tensor([[96, 64], [70, 50]])
    return make_rpn(recipe).propose(logits, deltas, anchors, sizes), logits, deltas, anchors


def test_proposals_lie_in_their_image_best_first_and_do_not_overlap_within_a_level():
    recipe = RpnRecipe(train_proposals_before_nms=60, train_proposals=60, nms_iou=0.4)
    proposals, logits, _, anchors = propose(recipe)
    level_of = torch.cat([torch.full((len(level),), i) for i, level in enumerate(anchors)])
    assert proposals.is_valid.sum(1).tolist() == [60, 60]
    for image, (height, width) in enumerate(((96, 64), (70, 50))):
        boxes, identities = proposals.boxes[image], proposals.identities[image]
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width
        assert boxes[:, 3].max() <= height
        assert len(identities.unique()) == 60
        scores = torch.cat(logits, 1)[image, identities]
        assert (scores.diff() <= 0).all()
        iou = box_iou(boxes, boxes) - torch.eye(60)
        same_level = level_of[identities].unsqueeze(0) == level_of[identities].unsqueeze(1)
        assert iou[same_level].max() <= recipe.nms_iou
        assert iou[~same_level].max() > recipe.nms_iou  # levels do not suppress each other


def test_training_and_testing_have_their_own_numbers_of_proposals():
    recipe = RpnRecipe(train_proposals=9, test_proposals=5)
    rpn = make_rpn(recipe)
    pyramid = tiny_pyramid()
    anchors = tiny_anchors(pyramid)
    sizes = torch.tensor([[96, 64]] * 2)
    assert rpn.propose(*rpn(pyramid), anchors, sizes).boxes.shape == (2, 9, 4)
    assert rpn.eval().propose(*rpn(pyramid), anchors, sizes).boxes.shape == (2, 5, 4)


def test_boxes_outside_the_image_are_dropped_and_leave_empty_rows():
    pyramid = tiny_pyramid()
    anchors = tiny_anchors(pyramid)
    logits, deltas = zip(*[(torch.zeros(2, len(a)), torch.zeros(2, len(a), 4)) for a in anchors], strict=True)
    recipe = RpnRecipe(train_proposals=2000)
    proposals = make_rpn(recipe).propose(list(logits), list(deltas), anchors, torch.tensor([[96, 64], [4, 4]]))
    counts = proposals.is_valid.sum(1)
    assert 0 < counts[1] < counts[0]
    for image in range(2):
        assert proposals.is_valid[image, : counts[image]].all()
        assert proposals.boxes[image, counts[image] :].eq(0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_diverged_becomes_no_proposal_and_no_number(poison):
    pyramid = tiny_pyramid()
    anchors = tiny_anchors(pyramid)
    logits = [torch.randn(2, len(a)) for a in anchors]
    deltas = [torch.zeros(2, len(a), 4) for a in anchors]
    logits[0][0] = poison
    deltas[1][0] = float("nan")
    recipe = RpnRecipe(train_proposals_before_nms=5000, train_proposals=5000)
    proposals = make_rpn(recipe).propose(logits, deltas, anchors, torch.tensor([[96, 64]] * 2))
    assert proposals.boxes.isfinite().all()
    kept = proposals.identities[0][proposals.is_valid[0]]
    assert kept.min() >= len(anchors[0]) + len(anchors[1])
    assert proposals.is_valid[1].sum() > proposals.is_valid[0].sum() > 0


@pytest.mark.parametrize(("samples", "convolutions"), [(32, 1), (5000, 1), (32, 2), (5000, 2), (32, 3)])
def test_the_sparse_loss_equals_the_dense_one_with_all_its_gradients(samples, convolutions):
    batch = tiny_batch(3)
    found = {}
    for sparse in (True, False):
        recipe = with_model(TINY_FROZEN, rpn={"sparse_loss": sparse, "samples": samples, "convolutions": convolutions})
        detector = tiny_detector(recipe).double()
        losses = detector(batch)
        sum(losses[name].sum() for name in FasterRcnn.loss_names).backward()
        found[sparse] = {name: loss.detach() for name, loss in losses.items()} | gradients(detector)
    assert found[True].keys() == found[False].keys()
    assert min(found[True]["rpn_positive"]) > 0
    for name, value in found[False].items():
        assert relative(value, found[True][name]) < 1e-12, name
    layers = (*("conv", "conv2", "conv3")[:convolutions], "objectness", "deltas")
    assert all(found[True][f"rpn.{layer}.weight"].abs().max() > 0 for layer in layers)


def test_the_sparse_loss_gives_the_dense_pass_no_gradient():
    detector = tiny_detector()
    pixels = detector.normalized(tiny_batch(2).pixels, tiny_batch(2).sizes)
    assert detector.rpn.is_sparse
    pyramid = detector.fpn(detector.backbone(pixels))
    calls = []
    detector.rpn.conv.register_forward_hook(lambda *args: calls.append(args[2].requires_grad))
    detector(tiny_batch(2))
    assert calls == [False] * 5
    assert all(level.requires_grad for level in pyramid)


def test_a_norm_in_the_head_makes_the_loss_dense():
    assert not make_rpn(RpnRecipe(norm="group")).is_sparse
    assert not make_rpn(RpnRecipe(sparse_loss=False)).is_sparse


def test_losses_of_hand_made_logits_are_those_of_hand_arithmetic():
    recipe = RpnRecipe(sparse_loss=False, samples=4, positive_fraction=0.5, smooth_l1_beta=1.0)
    rpn = make_rpn(recipe)
    anchors = [torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 60.0, 10.0], [0.0, 50.0, 10.0, 60.0]])]
    targets = make_targets([([1.0, 0.0, 11.0, 10.0], 0)])  # IoU 9 / 11 with the first anchor; deltas 0.1, 0, 0, 0
    logits, deltas = [torch.tensor([[2.0, -1.0, 0.5]])], [torch.tensor([[[0.4, 0.0, 2.0, 0.0]] * 3])]
    losses = rpn.losses(logits, deltas, anchors, targets, feature_table([torch.zeros(1, 4, 1, 1)]))
    entropy = F.softplus(torch.tensor([-2.0, -1.0, 0.5])).sum() / 3
    torch.testing.assert_close(losses["rpn_objectness"], entropy.reshape(1))
    torch.testing.assert_close(losses["rpn_box"], torch.tensor([(0.3**2 / 2 + 1.5) / 3]))
    assert losses["rpn_positive"].tolist() == [1.0]


def test_batch_statistics_of_the_head_are_those_of_all_levels_together():
    rpn = make_rpn(RpnRecipe(norm="batch"), bn_size=2)
    pyramid = tiny_pyramid()
    rpn(pyramid)
    finish_step(rpn.modules(), 1, World(0, 1, CPU))
    values = torch.cat([rpn.conv(level).flatten(2) for level in pyramid], 2).transpose(0, 1).flatten(1).detach()
    torch.testing.assert_close(rpn.norm.running_mean, 0.1 * values.mean(1))
    torch.testing.assert_close(rpn.norm.running_var, 0.9 + 0.1 * values.var(1))
    trained = rpn(pyramid)[0]
    finish_step(rpn.modules(), 1, World(0, 1, CPU))
    rpn.norm.running_mean.copy_(values.mean(1))
    rpn.norm.running_var.copy_(values.var(1, correction=0))
    for a, b in zip(trained, rpn.eval()(pyramid)[0], strict=True):
        torch.testing.assert_close(a, b)  # what was trained is what is tested


def test_each_convolution_has_a_norm_of_its_own_over_all_levels():
    rpn = make_rpn(RpnRecipe(norm="batch", convolutions=2), bn_size=2)
    pyramid = tiny_pyramid()
    logits, _ = rpn(pyramid)

    @torch.no_grad()
    def by_hand(norm: torch.nn.Module, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        values = torch.cat([level.flatten(2) for level in levels], 2)
        mean, var = values.mean((0, 2)), values.var((0, 2), correction=0)
        return [
            F.relu(F.batch_norm(level, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)) for level in levels
        ]

    hidden = by_hand(rpn.norm, [rpn.conv(level) for level in pyramid])
    hidden = by_hand(rpn.norm2, [rpn.conv2(level) for level in hidden])
    for level, found in zip(hidden, logits, strict=True):
        expected = rpn.objectness(level).permute(0, 2, 3, 1).flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_boxes_themselves_are_compared_where_the_recipe_asks_for_giou():
    rpn = make_rpn(RpnRecipe(sparse_loss=False, samples=4, box_loss="giou"))
    anchors = [torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 60.0, 10.0]])]
    targets = make_targets([([1.0, 0.0, 11.0, 10.0], 0)])
    logits, deltas = [torch.zeros(1, 2)], [torch.zeros(1, 2, 4)]  # the anchors as they are
    losses = rpn.losses(logits, deltas, anchors, targets, feature_table([torch.zeros(1, 4, 1, 1)]))
    torch.testing.assert_close(losses["rpn_box"], torch.tensor([(1 - 9 / 11) / 2]))  # the hull is the union


def test_the_sample_of_an_image_does_not_depend_on_its_neighbours():
    detector = tiny_detector(TINY_FROZEN).double()
    batch = tiny_batch(3)
    joint = detector(batch)
    for i in range(3):
        for name, value in detector(batch[i : i + 1]).items():
            assert relative(value, joint[name][i : i + 1]) < 1e-12, name


def test_no_images_pass_through():
    rpn = make_rpn(RpnRecipe())
    pyramid = tiny_pyramid(images=0)
    logits, deltas = rpn(pyramid)
    anchors = tiny_anchors(pyramid)
    assert deltas[0].shape == (0, len(anchors[0]), 4)
    assert rpn.propose(logits, deltas, anchors, torch.zeros(0, 2, dtype=torch.int64)).boxes.shape[0] == 0


def test_the_detector_gives_its_rpn_the_recipes_anchors():
    detector = make_detector(with_model(TINY, anchors={"ratios": (0.5, 2.0)}), 3)
    assert detector.rpn.objectness.out_channels == 2
    detector(tiny_batch(2))


@pytest.mark.parametrize(("valid", "width"), [([2, 3], 3), ([0, 0], 2), ([5, 1], 5)])
def test_proposals_are_shortened_to_the_fullest_image_and_not_below_the_least(valid, width):
    is_valid = torch.arange(5) < torch.tensor(valid).unsqueeze(1)
    proposals = Proposals(torch.rand(2, 5, 4), torch.arange(10).reshape(2, 5), is_valid)
    short = proposals.shortened(least=2)
    assert short.boxes.shape == (2, width, 4)
    assert torch.equal(short.boxes, proposals.boxes[:, :width])
    assert torch.equal(short.identities, proposals.identities[:, :width])
    assert int(short.is_valid.sum()) == sum(valid)
