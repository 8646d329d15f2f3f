from dataclasses import replace
from typing import get_args

import pytest
import timm
import torch
from torch import nn

from factories import TINY, gradients, tiny_batch, tiny_detector
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.layers.batch_norm import CrossDeviceBatchNorm, finish_step
from megdet.layers.convert import exchange_norms
from megdet.layers.recompute import RecomputedBlocks, recompute, saved_bytes, sublinear_segments
from megdet.model.backbone import recompute_blocks
from megdet.model.faster_rcnn import FasterRcnn
from megdet.recipe import RecomputePlan

ALONE = World(0, 1, torch.device("cpu"))
PLANS = [plan for plan in get_args(RecomputePlan) if plan != "none"]
NORMED = replace(
    TINY,
    model=TINY.model.with_norms({"fpn": "batch", "rpn": "batch", "box_head": "batch"}),
)


def trained_step(recipe):
    """Losses, gradients and buffers of one step."""
    detector = tiny_detector(recipe)
    losses = detector(tiny_batch(2))
    sum(losses[name].sum() for name in FasterRcnn.loss_names).backward()
    finish_step(detector.modules(), 1, ALONE)
    return losses, gradients(detector), dict(detector.named_buffers())


@pytest.mark.parametrize("recipe", [TINY, NORMED], ids=["plain_heads", "normed_heads"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_recomputed_step_is_the_plain_one_to_the_bit(plan, recipe):
    for plain, recomputed in zip(trained_step(recipe), trained_step(replace(recipe, recompute=plan)), strict=True):
        assert plain.keys() == recomputed.keys()
        assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("plan", PLANS)
def test_recompute_keeps_less_for_the_backward(plan):
    def kept(recipe):
        detector = tiny_detector(recipe)
        return saved_bytes(lambda: sum(detector(tiny_batch(2, 128)).values()), list(detector.parameters()))

    assert kept(replace(TINY, recompute=plan)) < 0.6 * kept(TINY)


@pytest.mark.parametrize("plan", PLANS)
def test_recompute_leaves_the_state_dict_as_it_is(plan):
    plain, recomputed = tiny_detector(TINY), tiny_detector(replace(TINY, recompute=plan))
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    assert any(isinstance(module, RecomputedBlocks) for module in recomputed.modules())


def test_every_plan_cuts_where_it_says():
    lengths = {}
    for plan in PLANS:
        body = timm.create_model("resnet50", features_only=True)
        recompute_blocks(body, plan, "resnet50")
        stages = [module for module in body.modules() if isinstance(module, RecomputedBlocks)]
        assert [len(stage) for stage in stages] == [3, 4, 6, 3]
        for stage in stages:
            assert [i for segment in stage.segments for i in segment] == list(range(len(stage)))
        lengths[plan] = [[len(segment) for segment in stage.segments] for stage in stages]
    assert lengths["block"] == [[1] * 3, [1] * 4, [1] * 6, [1] * 3]
    assert lengths["stage"] == [[3], [4], [6], [3]]
    assert 4 < sum(len(stage) for stage in lengths["sqrt"]) < 16


@pytest.mark.parametrize("name", ["mobilenetv2_100", "efficientnet_b0", "resnext26ts"])
def test_other_backbones_recompute_to_the_bit_too(name):
    found = []
    for plan in ("none", "sqrt"):
        torch.manual_seed(0)
        body = exchange_norms(timm.create_model(name, features_only=True), "batch").train()
        if plan != "none":
            recompute_blocks(body, plan, name)
        features = body(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
        sum(feature.square().mean() for feature in features).backward()
        finish_step(body.modules(), 1, ALONE)
        found.append({**gradients(body), **dict(body.named_buffers())})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("body", [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), timm.create_model("regnetx_002")])
def test_a_network_that_is_no_sequence_of_blocks_is_refused(body):
    with pytest.raises(InputError, match="recompute stage: flat has no sequence of blocks"):
        recompute_blocks(body, "stage", "flat")


def test_masked_norms_are_told_once_and_recompute_their_bits():
    found = []
    for function in (lambda f, *a: f(*a), recompute):
        torch.manual_seed(0)
        norms = nn.ModuleList([CrossDeviceBatchNorm(4), CrossDeviceBatchNorm(4)])
        mask = torch.tensor([True, True, False, True, True, True])
        x = torch.randn(6, 4, 3, requires_grad=True)
        y = function(lambda x, norms=norms, mask=mask: norms[1](norms[0](x, mask).relu(), mask).sin(), x)
        y.square().sum().backward()
        finish_step(norms, 1, ALONE)
        found.append({"x": x.grad, **gradients(norms), **dict(norms.named_buffers())})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_second_backward_replays_from_the_start():
    norm = CrossDeviceBatchNorm(3)
    mask = torch.ones(4, dtype=torch.bool)
    x = torch.randn(4, 3, 5, requires_grad=True)
    y = recompute(lambda x: norm(norm(x, mask), mask).sin(), x).sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    y.backward()
    assert torch.equal(first, x.grad)


def test_inside_another_recompute_and_without_gradients_it_is_a_plain_call():
    calls = []

    def inner(x):
        calls.append(1)
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert not recompute(inner, x).requires_grad
    assert len(calls) == 1
    recompute(lambda x: recompute(inner, x).cos(), x).sum().backward()
    assert len(calls) == 3  # first forward and one recomputation, not two


@pytest.mark.parametrize(
    ("inside", "kept", "ends", "lengths"),
    [
        ([1] * 16, [1] * 16, [], [4, 4, 4, 4]),  # sqrt(16) segments of sqrt(16) blocks
        ([1] * 4, [0] * 4, [], [1, 1, 1, 1]),  # what costs nothing to keep is kept
        ([1] * 4, [9] * 4, [], [4]),
        ([1] * 6, [9] * 6, [2], [2, 4]),
        ([8, 1, 1, 1, 1], [2] * 5, [], [1, 4]),  # a large first block is a segment of its own
        ([5], [1], [], [1]),
    ],
)
def test_the_planner_balances_what_is_kept_and_what_is_computed_again(inside, kept, ends, lengths):
    assert [len(segment) for segment in sublinear_segments(inside, kept, ends)] == lengths


def test_saved_bytes_counts_every_storage_once_and_no_parameter():
    weight = torch.ones(100, requires_grad=True)
    x = torch.ones(100, requires_grad=True)
    assert saved_bytes(lambda: x * weight, [weight]) == x.nbytes
    assert saved_bytes(lambda: (x * x).sin().sum()) == 2 * x.nbytes
