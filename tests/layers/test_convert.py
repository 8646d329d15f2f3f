import copy

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from factories import relative
from megdet import layers as megdet_layers
from megdet.distributed.local_ranks import run_in_ranks
from megdet.errors import InputError
from megdet.layers.batch_norm import (
    BatchNormAct,
    CrossDeviceBatchNorm,
    FrozenBatchNorm,
    FrozenBatchNormAct,
    finish_step,
)
from megdet.layers.convert import exchange_norms, norm_factory

MODELS = ["resnet18", "mobilenetv2_100", "efficientnet_b0"]


def features(name: str) -> nn.Module:
    """A timm backbone whose running statistics and weights are not trivial."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, features_only=True)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.2)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.mark.parametrize("bn_size", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_what_it_computed(name, bn_size):
    model = features(name).eval()
    old_norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    keys = [key for key in model.state_dict() if bn_size or not key.endswith("num_batches_tracked")]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        converted = exchange_norms(copy.deepcopy(model), "batch", bn_size)
        after = converted(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(b.std() > 0 for b in before)
    kind = CrossDeviceBatchNorm if bn_size else FrozenBatchNorm
    assert sum(isinstance(module, kind) for module in converted.modules()) == old_norms > 0
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in converted.modules())
    assert list(converted.state_dict()) == keys


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_a_converted_model_trains_as_it_trained(name):
    model = features(name).double().train()
    converted = exchange_norms(copy.deepcopy(model), "batch", 2)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for a, b in zip(model(x), converted(x), strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize(("bn_size", "kind"), [(2, BatchNormAct), (0, FrozenBatchNormAct)])
def test_a_fused_activation_is_kept(bn_size, kind):
    old = BatchNormAct2d(4, eps=1e-3, act_layer=nn.ReLU6)
    new = exchange_norms(old, "batch", bn_size)
    assert type(new) is kind
    assert new.eps == 1e-3
    out = new(torch.randn(8, 4, 5, 5) * 50)
    assert out.min() == 0
    assert out.max() <= 6


@pytest.mark.parametrize("kind", ["group", "none"])
def test_a_fused_activation_outlives_its_norm(kind):
    new = exchange_norms(BatchNormAct2d(4, act_layer=nn.ReLU6), kind, 0)
    out = new(torch.randn(8, 4, 5, 5) * 50)
    assert out.min() == 0
    assert out.max() == 6 if kind == "none" else out.max() <= 6


def test_group_norm_takes_over_weights_and_eps():
    old = nn.BatchNorm2d(48, eps=1e-3)
    nn.init.uniform_(old.weight, 0, 2)
    nn.init.uniform_(old.bias, 0, 2)
    new = exchange_norms(old, "group", 0)
    assert isinstance(new, nn.GroupNorm)
    assert (new.num_groups, new.eps) == (24, 1e-3)  # the most up to 32 that divide 48
    assert torch.equal(new.weight, old.weight)
    assert torch.equal(new.bias, old.bias)


def test_the_mode_of_a_layer_is_kept():
    for training in (False, True):
        assert exchange_norms(nn.BatchNorm2d(3).train(training), "batch", 2).training is training


def test_a_batch_norm_of_an_unknown_class_is_refused_by_name():
    class ClippedBatchNorm(nn.BatchNorm2d):
        pass

    with pytest.raises(InputError, match="ClippedBatchNorm"):
        exchange_norms(nn.Sequential(nn.Sequential(ClippedBatchNorm(3))), "batch", 2)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_a_batch_norm_without_all_its_tensors_is_refused(options):
    with pytest.raises(InputError, match="without weights or without running statistics"):
        exchange_norms(nn.BatchNorm2d(3, **options), "batch", 2)


def test_norm_layers_are_made_by_name():
    assert isinstance(norm_factory("batch", 2)(8), CrossDeviceBatchNorm)
    assert isinstance(norm_factory("batch", 0)(8), FrozenBatchNorm)
    assert isinstance(norm_factory("frozen", 2)(8), FrozenBatchNorm)
    assert isinstance(norm_factory("none", 2)(8), nn.Identity)
    for channels, groups in ((64, 32), (8, 8), (80, 20), (7, 7), (37, 1)):
        assert norm_factory("group", 2)(channels).num_groups == groups


def test_three_lines_convert_a_model_of_anybody():
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b0", num_classes=3).train()
    converted = megdet_layers.convert_batch_norm(copy.deepcopy(model), bn_size=4, images_per_device=4)
    for seed in range(3):
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            torch.manual_seed(1)  # the same paths are dropped
            expected = model(x)
            torch.manual_seed(1)
            assert relative(expected, converted(x)) < 1e-3
    state, reference = converted.state_dict(), model.state_dict()
    assert list(state) == list(reference)
    for name in state:  # each forward is folded at once, with the model's own momentum
        torch.testing.assert_close(state[name], reference[name], rtol=1e-3, atol=1e-4, msg=name)
    assert state["bn1.num_batches_tracked"] == 3


def test_the_layers_own_momentum_and_number_format_are_kept():
    old = nn.BatchNorm2d(3, momentum=0.25).double()
    new = megdet_layers.convert_batch_norm(copy.deepcopy(old), bn_size=2, images_per_device=2)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    old(x), new(x)
    torch.testing.assert_close(new.state_dict(), old.state_dict())


def test_a_bn_size_of_0_freezes_your_model():
    assert isinstance(
        megdet_layers.convert_batch_norm(nn.BatchNorm2d(3), bn_size=0, images_per_device=2), FrozenBatchNorm
    )


@pytest.mark.parametrize(("bn_size", "images", "message"), [(3, 2, "no multiple"), (4, 2, "does not divide the 1")])
def test_images_that_make_no_whole_groups_are_refused(bn_size, images, message):
    with pytest.raises(InputError, match=message):
        megdet_layers.convert_batch_norm(nn.BatchNorm2d(3), bn_size=bn_size, images_per_device=images)


def test_a_cumulative_average_cannot_be_folded():
    with pytest.raises(InputError, match="momentum None"):
        megdet_layers.convert_batch_norm(nn.BatchNorm2d(3, momentum=None), bn_size=2, images_per_device=2)


def learn(world, side_by_side):
    """Running statistics after two forwards of two groups of two images, side by side or on one process in turn."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    groups = torch.randn(2, 2, 2, 3, 4, 4, dtype=torch.float64)  # step, group, image
    if side_by_side:  # four processes of one image, two groups
        norm = megdet_layers.convert_batch_norm(norm, bn_size=2, images_per_device=1)
        for step in groups:
            norm(step.flatten(0, 1)[world.rank : world.rank + 1])
        megdet_layers.average_running_statistics(norm)
        return norm.state_dict()
    norm = exchange_norms(norm, "batch", 2)
    for step in groups:
        for group in step:
            norm(group)
        finish_step([norm], 2, world)
    megdet_layers.average_running_statistics(norm)  # alone it changes nothing
    return norm.state_dict()


@pytest.mark.distributed
def test_averaged_statistics_of_groups_side_by_side_are_those_of_folding_the_groups_mean():
    (reference,) = run_in_ranks(learn, 1, False)
    for state in run_in_ranks(learn, 4, True):
        torch.testing.assert_close(state, reference, rtol=1e-12, atol=1e-12)
