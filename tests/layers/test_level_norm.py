import torch
from torch import nn
from torch.nn import functional as F

from factories import relative
from megdet.layers.convert import norm_factory
from megdet.layers.level_norm import normalized_levels


def pyramid() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [(3 + torch.randn(2, 4, *edges)).requires_grad_() for edges in ((5, 6), (3, 3), (2, 1))]


def pixels(levels: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([level.flatten(2) for level in levels], 2).unsqueeze(3)


def test_batch_statistics_are_those_of_all_levels_together():
    norm, reference = norm_factory("batch")(4), nn.BatchNorm2d(4)
    ours, theirs = pyramid(), pyramid()
    found, expected = normalized_levels(norm, ours), F.relu(reference(pixels(theirs)))
    assert relative(expected, pixels(found)) < 1e-5
    assert [level.shape for level in found] == [level.shape for level in ours]
    weights = torch.randn(2, 4, 41, 1)
    (pixels(found) * weights).sum().backward()
    (expected * weights).sum().backward()
    for own, other in zip(ours, theirs, strict=True):
        assert relative(other.grad, own.grad) < 1e-4


def test_in_evaluation_each_level_has_the_running_statistics():
    norm = norm_factory("batch")(4)
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(4.0)
    levels = pyramid()
    for own, found in zip(levels, normalized_levels(norm.eval(), levels), strict=True):
        assert relative(F.relu((own - 2) / (4 + norm.eps) ** 0.5), found) < 1e-6


def test_without_a_norm_the_levels_are_cut_at_0():
    levels = [level.detach() - 3 for level in pyramid()]
    expected = [level.clamp(min=0) for level in levels]
    for own, found in zip(expected, normalized_levels(norm_factory("none")(4), levels), strict=True):
        assert torch.equal(own, found)
