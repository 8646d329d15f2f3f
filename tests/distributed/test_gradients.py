import math

import pytest
import torch
from torch import Tensor, nn

from megdet.distributed.gradients import GradientBuckets
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from small_runs import ALONE


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(5 * 36, 2))
    return model.double().to(memory_format=torch.channels_last)


def some_images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losses(model: nn.Module, images: Tensor) -> Tensor:
    return (model(images) ** 2).sum()


def plain_gradients(images: Tensor) -> list[Tensor]:
    model = make_model()
    losses(model, images).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_the_layout_follows_from_the_parameters_last_ones_first():
    layouts = [
        [[p.numel() for p in bucket] for bucket in GradientBuckets(make_model().parameters(), ALONE, 200).buckets]
        for _ in range(2)
    ]
    # 8 bytes a number, and a bucket is closed by the parameter that fills it
    assert layouts[0] == layouts[1] == [[2, 360], [5, 20], [4, 108]]


def test_no_gradient_takes_memory_before_a_backward_and_all_are_there_after_it():
    model = make_model()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    buckets = GradientBuckets([*model.parameters(), unused], ALONE)
    for _ in range(2):
        buckets.zero()
        assert all(parameter.grad is None for parameter in buckets.parameters)
        losses(model, some_images(2)).backward()
        buckets.finish()
        assert torch.equal(unused.grad, torch.zeros(3, dtype=torch.float64))
        assert all(parameter.grad.stride() == parameter.stride() for parameter in model.parameters())
    assert not model[0].weight.grad.is_contiguous()  # channels last, as the weight


def test_parameters_that_are_not_trained_have_no_place():
    model = make_model()
    model[0].requires_grad_(False)
    buckets = GradientBuckets(model.parameters(), ALONE)
    assert {*buckets.parameters} == {*model[2:].parameters()}
    buckets.finish()
    assert model[0].weight.grad is None


def test_several_backwards_add_up_to_one_of_the_whole():
    model = make_model()
    buckets = GradientBuckets(model.parameters(), ALONE)
    images = some_images(5)
    for _ in range(2):  # the second time from gradients that are there
        buckets.zero()
        losses(model, images[:2]).backward()
        buckets.overlap()
        losses(model, images[2:]).backward()
        buckets.finish()
        for parameter, expected in zip(model.parameters(), plain_gradients(images), strict=True):
            assert torch.allclose(parameter.grad, expected, rtol=1e-12, atol=1e-12)


def test_the_norm_is_that_of_all_gradients_together_and_scaling_reaches_all():
    model = make_model()
    buckets = GradientBuckets(model.parameters(), ALONE, bucket_bytes=200)
    losses(model, some_images(3)).backward()
    expected = torch.cat([gradient.flatten() for gradient in plain_gradients(some_images(3))]).norm()
    assert float(buckets.norm()) == pytest.approx(float(expected), rel=1e-12)
    buckets.scale(torch.tensor(0.25, dtype=torch.float64))
    assert float(buckets.norm()) == pytest.approx(float(expected) / 4, rel=1e-12)
    assert torch.allclose(model[0].weight.grad, plain_gradients(some_images(3))[0] / 4)


def test_the_norm_by_hand():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    buckets = GradientBuckets(weights, ALONE, bucket_bytes=1)
    (weights[0] @ torch.tensor([2.0, 3.0]) + 6 * weights[1]).sum().backward()
    assert float(buckets.norm()) == math.sqrt(4 + 9 + 36) == 7


def reduce_shares(world: World, shares: list[list[int]]) -> tuple[list[Tensor], bool]:
    """Gradients after every rank carried its own images, one a backward, in two steps."""
    model = make_model()
    buckets = GradientBuckets(model.parameters(), world, bucket_bytes=200)
    images, own = some_images(4), shares[world.rank]
    was_early = False
    for _ in range(2):
        buckets.zero()
        for number, image in enumerate(own):
            if number == len(own) - 1:
                buckets.overlap()
            losses(model, images[image : image + 1]).backward()
            was_early = buckets._launched > 0
            assert number == len(own) - 1 or not was_early
        buckets.finish()
    for bucket in buckets.buckets:  # a bucket is one tensor, in the memory order of its weights
        assert len({p.grad.untyped_storage().data_ptr() for p in bucket}) == 1
        assert all(p.grad.stride() == p.stride() for p in bucket)
    return [p.grad for p in model.parameters()], was_early


@pytest.mark.distributed
@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0, 1, 2], [3]], [[], [0, 1, 2, 3]]])
def test_every_rank_ends_with_the_sum_over_all_also_one_without_a_backward(shares):
    found = run_in_ranks(reduce_shares, 2, shares)
    for gradients, _was_early in found:
        for gradient, expected in zip(gradients, plain_gradients(some_images(4)), strict=True):
            assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert [early for _, early in found] == [bool(own) for own in shares], "sent while the last backward runs"


def test_what_is_set_aside_is_a_part_of_its_own():
    model = make_model()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    buckets = GradientBuckets([*model.parameters(), unused], ALONE)
    images = some_images(5)
    buckets.zero()
    losses(model, images[:2]).backward()
    first = buckets.set_aside()
    assert all(parameter.grad is None for parameter in buckets.parameters)
    losses(model, images[2:]).backward()
    buckets.finish()
    for part, found in ((images[:2], first), (images[2:], buckets.gradients)):
        assert torch.equal(found[0], torch.zeros(3, dtype=torch.float64))
        for gradient, expected in zip(found[1:], plain_gradients(part)[::-1], strict=True):
            assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-12)


def reduce_halves(world: World, shares: list[tuple[list[int], list[int]]]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of two parts, of each of which every rank carries its own images, in the second of two steps."""
    model = make_model()
    buckets = GradientBuckets(model.parameters(), world, bucket_bytes=200)
    images = some_images(4)
    for _ in range(2):
        buckets.zero()
        parts = []
        for own in shares[world.rank]:
            for number, image in enumerate(own):
                if number == len(own) - 1:
                    buckets.overlap()
                losses(model, images[image : image + 1]).backward()
            parts.append(buckets.set_aside() if not parts else [])
        buckets.finish()
    return parts[0][::-1], [p.grad for p in model.parameters()]


@pytest.mark.distributed
def test_two_parts_are_summed_over_all_ranks_one_after_the_other():
    # images 0 and 1 make the first part, 2 and 3 the second; a rank may have nothing of either
    for shares in ([([0], [2]), ([1], [3])], [([0, 1], []), ([], [2, 3])]):
        found = run_in_ranks(reduce_halves, 2, shares)
        for first, second in found:
            for own, part in ((first, slice(2)), (second, slice(2, 4))):
                for gradient, expected in zip(own, plain_gradients(some_images(4)[part]), strict=True):
                    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-12)
