import pytest
import torch

from factories import random_boxes, relative
from megdet.architecture_heads import PositionSensitiveHead as HeadRecipe
from megdet.distributed.lane import SINGLE_LANE
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.convert import norm_factory
from megdet.model.position_sensitive_head import PositionSensitiveHead

RECIPE = HeadRecipe(channels=6, pool_size=2, sampling_ratio=1)


def make_head(recipe: HeadRecipe = RECIPE) -> PositionSensitiveHead:
    torch.manual_seed(0)
    return PositionSensitiveHead(recipe, 5, 16, 3, norm_factory(recipe.norm, SINGLE_LANE))


def test_there_are_maps_of_every_class_and_the_background_and_of_a_box_for_each_bin():
    classes, deltas = make_head()(torch.randn(2, 5, 4, 6))
    assert classes.shape == (2, 4 * (3 + 1), 4, 6)
    assert deltas.shape == (2, 4 * 4, 4, 6)


def test_the_vote_is_the_mean_of_what_each_bin_reads_in_its_own_maps_by_hand():
    head = make_head()
    classes = torch.arange(16.0).reshape(1, 16, 1, 1).expand(1, 16, 4, 4)  # bin b has 4 b, 4 b + 1, ...
    deltas = torch.zeros(1, 16, 4, 4)
    deltas[:, 4:8] = 1.0  # the upper right bin alone
    deltas[:, 7, :, :2] = 5.0  # on the left, which it never sees
    logits, boxes = head.vote([classes, deltas], torch.tensor([[[0.0, 0.0, 64.0, 64.0], [16.0, 0.0, 48.0, 32.0]]]))
    assert logits.tolist() == [[[6.0, 7.0, 8.0, 9.0]] * 2]
    assert boxes[0, 0].tolist() == [[0.25] * 4]
    assert boxes[0, 1, 0, :3].tolist() == [0.25] * 3


def test_a_class_is_high_where_the_parts_of_an_object_lie_in_their_bins():
    """What position-sensitive maps are for (Figures 3 and 4 of the paper): a RoI beside the object gets no vote."""
    head = make_head()
    maps = torch.zeros(1, 4, 4, 8, 8)
    for bin_index, (row, column) in enumerate([(2, 2), (2, 4), (4, 2), (4, 4)]):
        maps[0, bin_index, 1, row : row + 2, column : column + 2] = 1.0
    classes = maps.flatten(1, 2)
    rois = torch.tensor([[[32.0, 32.0, 96.0, 96.0], [64.0, 32.0, 128.0, 96.0]]])
    logits, _ = head.vote([classes, torch.zeros(1, 16, 8, 8)], rois)
    assert logits[0, 0, 1] > 0.9
    assert logits[0, 1, 1] < 0.1


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_images_and_no_rois_have_empty_votes_and_gradients_of_zero(shape):
    head = make_head()
    maps = head(torch.randn(shape[0], 5, 4, 4))
    logits, deltas = head.vote(maps, torch.zeros(*shape, 4))
    assert logits.shape == (*shape, 4)
    assert deltas.shape == (*shape, 1, 4)
    (logits.sum() + deltas.sum()).backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in head.parameters())


def test_bfloat16_votes_are_those_of_float32_within_its_precision():
    head = make_head()
    features, rois = torch.randn(2, 5, 6, 6), random_boxes(8, canvas=90).reshape(2, 4, 4)
    exact = head.vote(head(features), rois)
    with torch.autocast("cpu", torch.bfloat16):
        half = head.vote(head(features), rois)
    for a, b in zip(exact, half, strict=True):
        assert b.dtype == torch.float32
        assert relative(a, b) < 0.03


def test_the_recipe_says_whether_the_convolution_has_a_norm_or_a_bias():
    assert make_head().conv.bias is not None
    normed = make_head(HeadRecipe(channels=6, pool_size=2, norm="batch"))
    assert normed.conv.bias is None
    assert isinstance(normed.norm, CrossDeviceBatchNorm)
