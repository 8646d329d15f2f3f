import pytest
import torch
from torch import nn

from factories import TINY, tiny_detector
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.recipe import Optimizer
from megdet.training.optimizers.averages import MovingAverage
from megdet.training.optimizers.optimizer import make_optimizer, restore_state, state_by_name


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), CrossDeviceBatchNorm(3), nn.GroupNorm(1, 3), nn.Linear(4, 4))


def decays(model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_everything_decays_in_the_papers_baseline():
    model = small_model()
    assert set(decays(model, make_optimizer(model, Optimizer())).values()) == {1e-4}
    assert len(decays(model, make_optimizer(model, Optimizer()))) == 8


def test_norms_and_biases_are_spared_where_the_recipe_says_so():
    model = small_model()
    found = decays(model, make_optimizer(model, Optimizer(decay_norm_and_bias=False)))
    assert {name for name, decay in found.items() if decay} == {"0.weight", "3.weight"}
    assert len(found) == 8


def test_every_trained_parameter_of_a_detector_is_in_one_group():
    detector = tiny_detector(TINY)
    detector.backbone.body.conv1.requires_grad_(False)
    for recipe in (Optimizer(), Optimizer(decay_norm_and_bias=False)):
        found = decays(detector, make_optimizer(detector, recipe))
        assert found.keys() == {name for name, p in detector.named_parameters() if p.requires_grad}
        listed = [p for group in make_optimizer(detector, recipe).param_groups for p in group["params"]]
        assert len(listed) == len(found)


def test_momentum_put_back_goes_on_where_it_stopped():
    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            (model(torch.ones(2, 3)) ** 2).sum().backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    whole, optimizer = fresh()
    steps(whole, optimizer, 5)
    first, optimizer = fresh()
    assert state_by_name(first, optimizer) == {}
    steps(first, optimizer, 3)
    saved = {name: tensor.clone() for name, tensor in state_by_name(first, optimizer).items()}
    assert saved.keys() == {"weight", "bias"}
    second, optimizer = fresh()
    second.load_state_dict(first.state_dict())
    restore_state(second, optimizer, saved)
    steps(second, optimizer, 2)
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)
    # and the momentum did count
    third, optimizer = fresh()
    third.load_state_dict(first.state_dict())
    steps(third, optimizer, 2)
    assert not torch.equal(third.weight, whole.weight)


def test_restored_momentum_has_the_memory_order_of_its_weight():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    momentum = {"weight": torch.randn(4, 3, 3, 3), "bias": torch.randn(4)}
    restore_state(model, optimizer, momentum)
    restored = optimizer.state[model.weight]["momentum_buffer"]
    assert torch.equal(restored, momentum["weight"])
    assert restored.stride() == model.weight.stride()


def test_the_moving_average_by_hand():
    model = CrossDeviceBatchNorm(1)
    average = MovingAverage(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(11.0)  # from 1
        model.running_mean.fill_(10.0)  # from 0
        model.num_batches_tracked.fill_(4)
    average.update(model, 0)  # decay (1 + 0) / (10 + 0) = 0.1
    assert average.tensors["weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 11)
    assert average.tensors["running_mean"].item() == pytest.approx(9.0)
    assert average.tensors["num_batches_tracked"].item() == 4
    average.update(model, 100)  # the recipe's 0.5 is smaller than 101 / 110
    assert average.tensors["weight"].item() == pytest.approx(0.5 * 10 + 0.5 * 11)
    assert average.tensors["running_mean"].item() == pytest.approx(0.5 * 9 + 0.5 * 10)
    assert model.weight.item() == 11.0
    assert model.running_mean.item() == 10.0
