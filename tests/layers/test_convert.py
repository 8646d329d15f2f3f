import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.torch_version import TorchVersion

from factories import relative
from megdet import layers as megdet_layers
from megdet.distributed import lane
from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.layers.batch_norm import BatchNormAct, CrossDeviceBatchNorm, finish_step
from megdet.layers.convert import exchange_norms, norm_factory
from megdet.layers.frozen_norm import FrozenBatchNorm, FrozenBatchNormAct

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


@pytest.mark.parametrize("lane", [None, SINGLE_LANE], ids=["fixed", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_what_it_computed(name, lane):
    model = features(name).eval()
    old_norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    keys = [key for key in model.state_dict() if lane is not None or not key.endswith("num_batches_tracked")]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        converted = exchange_norms(copy.deepcopy(model), "batch", lane)
        after = converted(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(b.std() > 0 for b in before)
    kind = FrozenBatchNorm if lane is None else CrossDeviceBatchNorm
    assert sum(isinstance(module, kind) for module in converted.modules()) == old_norms > 0
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in converted.modules())
    assert list(converted.state_dict()) == keys


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_a_converted_model_trains_as_it_trained(name):
    model = features(name).double().train()
    converted = exchange_norms(copy.deepcopy(model), "batch")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for a, b in zip(model(x), converted(x), strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize(("lane", "kind"), [(SINGLE_LANE, BatchNormAct), (None, FrozenBatchNormAct)])
def test_a_fused_activation_is_kept(lane, kind):
    old = BatchNormAct2d(4, eps=1e-3, act_layer=nn.ReLU6)
    new = exchange_norms(old, "batch", lane)
    assert type(new) is kind
    assert new.eps == 1e-3
    out = new(torch.randn(8, 4, 5, 5) * 50)
    assert out.min() == 0
    assert out.max() <= 6


@pytest.mark.parametrize("kind", ["group", "none"])
def test_a_fused_activation_outlives_its_norm(kind):
    new = exchange_norms(BatchNormAct2d(4, act_layer=nn.ReLU6), kind, None)
    out = new(torch.randn(8, 4, 5, 5) * 50)
    assert out.min() == 0
    assert out.max() == 6 if kind == "none" else out.max() <= 6


def test_group_norm_takes_over_weights_and_eps():
    old = nn.BatchNorm2d(48, eps=1e-3)
    nn.init.uniform_(old.weight, 0, 2)
    nn.init.uniform_(old.bias, 0, 2)
    new = exchange_norms(old, "group")
    assert isinstance(new, nn.GroupNorm)
    assert (new.num_groups, new.eps) == (24, 1e-3)  # the most up to 32 that divide 48
    assert torch.equal(new.weight, old.weight)
    assert torch.equal(new.bias, old.bias)


def test_the_mode_of_a_layer_is_kept():
    for training in (False, True):
        assert exchange_norms(nn.BatchNorm2d(3).train(training), "batch").training is training


def test_a_batch_norm_of_an_unknown_class_is_refused_by_name():
    class ClippedBatchNorm(nn.BatchNorm2d):
        pass

    with pytest.raises(InputError, match="ClippedBatchNorm"):
        exchange_norms(nn.Sequential(nn.Sequential(ClippedBatchNorm(3))), "batch")


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_a_batch_norm_without_all_its_tensors_is_refused(options):
    with pytest.raises(InputError, match="without weights or without running statistics"):
        exchange_norms(nn.BatchNorm2d(3, **options), "batch")


def test_norm_layers_are_made_by_name():
    assert isinstance(norm_factory("batch")(8), CrossDeviceBatchNorm)
    assert isinstance(norm_factory("batch", None)(8), FrozenBatchNorm)
    assert isinstance(norm_factory("frozen")(8), FrozenBatchNorm)
    assert isinstance(norm_factory("none")(8), nn.Identity)
    for channels, groups in ((64, 32), (8, 8), (80, 20), (7, 7), (37, 1)):
        assert norm_factory("group")(channels).num_groups == groups


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


@pytest.mark.parametrize(("bn_size", "images", "message"), [(3, 2, "not a multiple"), (4, 2, "does not divide the 1")])
def test_images_that_make_no_whole_groups_are_refused(bn_size, images, message):
    with pytest.raises(InputError, match=message):
        megdet_layers.convert_batch_norm(nn.BatchNorm2d(3), bn_size=bn_size, images_per_device=images)


def test_a_cumulative_average_cannot_be_folded():
    with pytest.raises(InputError, match="momentum None"):
        megdet_layers.convert_batch_norm(nn.BatchNorm2d(3, momentum=None), bn_size=2, images_per_device=2)


def test_parameters_stay_the_same_objects_so_an_optimizer_made_before_goes_on_working():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    converted = megdet_layers.convert_batch_norm(model, bn_size=2, images_per_device=2)
    assert {name: id(value) for name, value in converted.named_parameters()} == {
        name: id(value) for name, value in before.items()
    }
    trained = [name for name, parameter in converted.named_parameters() if parameter.requires_grad]
    assert trained == ["0.weight", "0.bias", "2.weight"]
    old = converted[2].weight.detach().clone()
    converted(torch.randn(2, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(converted[2].weight, old)


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_weights_and_biases_are_those_of_the_old_layer(kind):
    old = nn.BatchNorm2d(4)
    new = exchange_norms(old, kind)
    assert new.weight is old.weight
    assert new.bias is old.bias


class Twice(nn.Module):
    """One batch norm under two names, and once more inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.second = self.first
        self.inner = nn.Sequential(nn.ReLU(), self.first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.second(self.first(x)))


def test_a_layer_that_is_used_twice_is_converted_once_and_still_shared():
    torch.manual_seed(0)
    model = Twice().double()
    converted = megdet_layers.convert_batch_norm(copy.deepcopy(model), bn_size=4, images_per_device=4)
    assert isinstance(converted.first, CrossDeviceBatchNorm)
    assert converted.first is converted.second is converted.inner[1]
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert relative(model(x), converted(x)) < 1e-12
    torch.testing.assert_close(converted.state_dict(), model.state_dict())


def test_a_class_that_is_not_known_leaves_the_whole_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
    with pytest.raises(InputError, match="without weights"):
        megdet_layers.convert_batch_norm(model, bn_size=2, images_per_device=2)
    assert isinstance(model[0], nn.BatchNorm2d)


def test_statistics_that_nobody_folds_are_refused_where_they_would_be_used():
    model = nn.Sequential(CrossDeviceBatchNorm(3))
    model.eval().train()  # nothing is lost yet
    model(torch.randn(2, 3, 4, 4))
    with pytest.raises(InputError, match=r"lack the groups since the last finish_step: call .*finish_step once a step"):
        model.eval()
    assert model[0].training
    finish_step(model.modules(), 1, World(0, 1, torch.device("cpu")))
    assert not model.eval()[0].training


def test_a_converted_layer_folds_by_itself():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    reference = copy.deepcopy(model)
    converted = megdet_layers.convert_batch_norm(model, bn_size=2, images_per_device=2)
    x = torch.randn(2, 3, 4, 4) + 5
    converted(x), reference(x)
    torch.testing.assert_close(converted.eval().state_dict(), reference.state_dict())


def copies_of_a_model_in_lanes(world: World, folder: str) -> dict[str, Any]:
    """What copies of a converted model compute beside it, in a lane of two; the saved one is loaded by other ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 2))
    model = megdet_layers.convert_batch_norm(model, bn_size=4, images_per_device=2)
    torch.manual_seed(world.rank)
    x = torch.randn(2, 3, 5, 5)
    model(x)
    file = Path(folder) / "model.pt"
    if world.is_first:
        torch.save(model, file)
    world.barrier()
    made = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(file, weights_only=False),
        "average": AveragedModel(model, use_buffers=True),
    }
    made["average"].update_parameters(model)
    found: dict[str, Any] = {name: relative(model(x), each(x)) for name, each in made.items()}
    # a process that never converted a model, such as one that resumes
    lane._groups.clear()
    found["later"] = relative(model(x), torch.load(file, weights_only=False)(x))
    found["groups"] = len(lane._groups)
    return found


@pytest.mark.distributed
def test_a_model_in_a_lane_can_be_copied_averaged_and_saved(tmp_path):
    for found in run_in_ranks(copies_of_a_model_in_lanes, 4, str(tmp_path)):
        assert found.pop("groups") == 1
        assert found == dict.fromkeys(("deepcopy", "pickle", "torch.save", "average", "later"), 0.0)


def test_a_model_of_a_lane_evaluates_alone_and_says_why_it_cannot_train_alone():
    norm = CrossDeviceBatchNorm(3, lane=Lane(2))
    x = torch.randn(2, 3, 4, 4)
    norm.eval()(x)
    with pytest.raises(InputError, match="a batch norm over 2 processes cannot train in a program of 1"):
        norm.train()(x)


def three_lines(world: World, images_per_device: int, broadcasts: bool) -> dict[str, torch.Tensor]:
    """Running statistics after two steps under DistributedDataParallel, in lanes of mean 0 and 10."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).double()
    model = megdet_layers.convert_batch_norm(model, bn_size=2, images_per_device=images_per_device)
    name = "forward_sync_buffers" if torch.__version__ >= TorchVersion("2.13") else "broadcast_buffers"
    parallel = DistributedDataParallel(model, **({} if broadcasts else {name: False}))
    for step in two_steps():
        own = slice(world.rank * images_per_device, (world.rank + 1) * images_per_device)
        parallel(step.flatten(0, 1)[own]).mean().backward()
    return {name: value for name, value in model.eval().state_dict().items() if name.startswith("0.")}


def two_steps() -> torch.Tensor:
    """Step, group, image, channel, height, width; the second group of a step is 10 higher."""
    groups = torch.randn(2, 2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    groups[:, 1] += 10
    return groups


@pytest.mark.distributed
@pytest.mark.parametrize("broadcasts", [True, False])
@pytest.mark.parametrize(("size", "images_per_device"), [(4, 1), (2, 2)])
def test_under_ddp_every_process_has_the_plain_mean_over_the_groups_of_all_lanes(size, images_per_device, broadcasts):
    expected = nn.BatchNorm2d(3).double().state_dict()
    for step in two_steps():
        for name, values in (
            ("running_mean", step.mean((1, 3, 4))),
            ("running_var", step.transpose(1, 2).flatten(2).var(2)),
        ):
            expected[name] = 0.9 * expected[name] + 0.1 * values.mean(0)
        expected["num_batches_tracked"] += 1
    assert expected["running_mean"].min() > 0.9  # a lane of mean 0 alone would stay at 0
    ranks = run_in_ranks(three_lines, size, images_per_device, broadcasts)
    for state in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(state[f"0.{name}"], value, rtol=1e-12, atol=1e-12)
            assert torch.equal(state[f"0.{name}"], ranks[0][f"0.{name}"])


def one_without_images(world: World) -> torch.Tensor:
    norm = megdet_layers.convert_batch_norm(nn.BatchNorm2d(3), bn_size=2, images_per_device=2)
    norm(torch.randn(0, 3, 2, 2) if world.rank else torch.full((2, 3, 2, 2), 4.0))
    return norm.running_mean


@pytest.mark.distributed
def test_a_process_without_images_keeps_nobody_waiting_and_counts_for_nothing():
    for mean in run_in_ranks(one_without_images, 2):
        torch.testing.assert_close(mean, torch.full((3,), 0.4))


def test_group_norm_of_one_pixel_and_a_channel_a_group_is_the_bias_for_one_image_as_for_two():
    norm = norm_factory("group")(32)
    with torch.no_grad():
        norm.bias.normal_()
    for images in (1, 2):
        assert torch.allclose(norm(torch.randn(images, 32, 1, 1))[0, :, 0, 0], norm.bias, atol=1e-3)
    pixels = torch.randn(2, 32, 3, 4)
    ours = nn.GroupNorm(32, 32)
    ours.load_state_dict(norm.state_dict())
    assert torch.equal(norm(pixels), ours(pixels))
