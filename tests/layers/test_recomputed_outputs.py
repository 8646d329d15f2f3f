"""What a batch norm puts out is found again in the backward, to the bit, and its memory is free until then."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from factories import TINY, TINY_FROZEN, gradients, tiny_batch, tiny_detector, with_model
from megdet.layers import recomputed_outputs
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.recomputed_outputs import hold, mark_activations, recompute_outputs
from megdet.model import backbone
from megdet.model.faster_rcnn import FasterRcnn

RECIPES = {
    "resnet": TINY,
    "frozen": TINY_FROZEN,
    "fused_norms": with_model(TINY, backbone={"name": "mobilenetv2_100"}),
    "recomputed": replace(TINY, recompute="block"),
}


@contextmanager
def released(outputs: list[weakref.ref[torch.Tensor]]) -> Iterator[list[bool]]:
    """Whether each output of a forward is gone after it."""
    gone: list[bool] = []
    yield gone
    gone += [output() is None for output in outputs]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_gradients_are_those_of_kept_outputs_to_the_bit(recipe, precision, monkeypatch):
    def step():
        detector = tiny_detector(recipe)
        if precision == "float64":
            detector.double()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            losses = detector(tiny_batch(2))
        sum(losses[name].sum() for name in FasterRcnn.loss_names).backward()
        return losses | gradients(detector)

    recomputed = step()
    monkeypatch.setattr(backbone, "recompute_outputs", nullcontext)
    kept = step()
    assert recomputed.keys() == kept.keys()
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


def small_model(activation: nn.Module) -> nn.Sequential:
    norm = CrossDeviceBatchNorm(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, activation, nn.Conv2d(4, 2, 3))
    mark_activations(model)
    return model


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.ReLU6(inplace=True), nn.LeakyReLU(inplace=True)])
@pytest.mark.parametrize("is_recomputed", [True, False])
def test_the_output_of_a_norm_and_its_activation_is_let_go(activation, is_recomputed):
    model, outputs = small_model(activation), []
    model[2].register_forward_hook(lambda _m, _i, y: outputs.append(weakref.ref(y.untyped_storage())))
    with released(outputs) as gone, recompute_outputs() if is_recomputed else nullcontext():
        y = model(torch.rand(2, 3, 9, 9))
    assert gone == [is_recomputed]
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_output_that_was_changed_after_its_activation_is_kept_as_it_became():
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_model(nn.ReLU(inplace=True))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body[1](self.body[0](x))
            y += 1.0
            return self.body[3](self.body[2](y))

    torch.manual_seed(0)
    model, x = Shortcut(), torch.rand(2, 3, 9, 9)
    found = []
    for context in (nullcontext(), recompute_outputs()):
        model.zero_grad()
        with context:
            y = model(x)
        y.square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


class Block(nn.Module):
    """A residual block: the sum of its input, or of a norm of it, and of a norm of a convolution of it."""

    def __init__(self, add=torch.Tensor.add_, *, narrows: bool = False) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(4, 4, 3, padding=1), CrossDeviceBatchNorm(4)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), CrossDeviceBatchNorm(4)) if narrows else nn.Identity()
        self.activation, self.add = nn.ReLU(inplace=True), add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(x)
        return self.activation(self.add(self.norm(self.convolution(x)), shortcut))


def residual_model(*blocks: Block) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.Conv2d(4, 2, 3))
    mark_activations(model)
    return model


def trained_residual_model(model: nn.Sequential, *, is_recomputed: bool) -> tuple[list[bool], list[torch.Tensor]]:
    """Whether the output of each block is gone after a forward, and the gradients."""
    outputs: list[weakref.ref[torch.Tensor]] = []
    for block in model[1:-1]:
        block.register_forward_hook(lambda _m, _i, y: outputs.append(weakref.ref(y.untyped_storage())))
    model.zero_grad()
    with released(outputs) as gone, recompute_outputs() if is_recomputed else nullcontext():
        y = model(torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)))
    y.square().sum().backward()
    return gone, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("add", [torch.Tensor.add_, torch.add], ids=["in_place", "new"])
@pytest.mark.parametrize("narrows", [True, False])
def test_the_sums_of_residual_blocks_are_let_go_but_for_the_end_of_each_chain(add, narrows):
    blocks = [Block(add, narrows=narrows and i == 0) for i in range(5)]
    gone, again = trained_residual_model(residual_model(*blocks), is_recomputed=True)
    assert recomputed_outputs.LONGEST_CHAIN == 2
    # without a norm in its shortcut the first block adds what the first convolution has put out, which is kept
    assert gone == [True, True, False, True, True]
    kept, expected = trained_residual_model(residual_model(*blocks), is_recomputed=False)
    assert kept == [False] * 5
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, expected, strict=True))


def tripled(x: torch.Tensor) -> torch.Tensor:
    """The tensor, changed in place without gradients, as a forward hook may do it."""
    with torch.no_grad():
        return x.mul_(3)


@pytest.mark.parametrize(
    "add",
    [
        lambda y, x: torch.add(x, tripled(y)),
        lambda y, x: tripled(torch.add(x, y)),
        lambda y, x: tripled(y.add_(x)),
        lambda y, x: y.add_(x, alpha=0.5),
        lambda y, x: y.sub_(x),
        lambda y, x: y.add_(x.mean((2, 3), keepdim=True)),
        lambda y, x: y.add_(x).mul_(0.5),
        lambda y, x: y.add_(x.clone()),
    ],
    ids=[
        "part_changed",
        "sum_changed",
        "sum_in_place_changed",
        "weighted",
        "difference",
        "broadcast",
        "scaled",
        "of_a_copy",
    ],
)
def test_what_is_no_plain_sum_of_known_tensors_is_kept(add):
    blocks = [Block(add), Block(add)]
    gone, again = trained_residual_model(residual_model(*blocks), is_recomputed=True)
    _, expected = trained_residual_model(residual_model(*blocks), is_recomputed=False)
    assert gone == [False, False]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, expected, strict=True))


def test_what_others_keep_is_not_computed_again(monkeypatch):
    model, computed = residual_model(Block()), []
    with recompute_outputs():
        feature = model[1](model[0](torch.rand(2, 3, 9, 9)))
        y = model[2](feature)
        hold([feature])
    original = recomputed_outputs.Output.get

    def get(output):
        computed.append(original(output))
        return computed[-1]

    monkeypatch.setattr(recomputed_outputs.Output, "get", get)
    y.sum().backward()
    assert computed
    assert {value.data_ptr() for value in computed} == {feature.data_ptr()}


def test_what_is_held_is_freed_where_nobody_else_keeps_it():
    model = residual_model(Block())
    with recompute_outputs():
        feature = model[1](model[0](torch.rand(2, 3, 9, 9)))
        y = model[2](feature)
        hold([feature])
    gone = weakref.ref(feature.untyped_storage())
    del feature
    assert gone() is None
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_tensor_that_is_held_and_added_to_another_stays_as_it_is():
    shortcut_first = [Block(lambda y, x: torch.add(x, y)) for _ in range(2)]
    model = residual_model(*shortcut_first)
    with recompute_outputs():
        feature = model[1](model[0](torch.rand(2, 3, 9, 9)))
        hold([feature])
        y = model[3](model[2](feature))
    before = feature.detach().clone()
    y.sum().backward()
    assert torch.equal(feature, before)


def test_a_tensor_that_was_changed_without_gradients_is_kept_as_it_became():
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return tripled(x)

    def gradients_of(context):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), CrossDeviceBatchNorm(4), Scaled(), nn.Conv2d(4, 2, 3))
        with context:
            y = model(torch.rand(2, 3, 9, 9))
        y.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    again, expected = gradients_of(recompute_outputs()), gradients_of(nullcontext())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, expected, strict=True))


def test_a_graph_can_be_walked_twice():
    model, x = small_model(nn.ReLU(inplace=True)), torch.rand(2, 3, 9, 9)
    with recompute_outputs():
        loss = model(x).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_is_recomputed_outside_or_without_gradients():
    model, x = small_model(nn.ReLU(inplace=True)), torch.rand(2, 3, 9, 9)
    with torch.no_grad(), recompute_outputs():
        plain = model(x)
    assert not plain.requires_grad
    y = model(x)  # outside: torch keeps what it always keeps
    y.sum().backward()
    assert model[0].weight.grad is not None


class Noticed(torch.autograd.Function):
    """The identity, whose place in the graph holds an object by which its end is seen."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(_ctx, gradient):
        return gradient, None


class Seen:
    """An object that can be referred to weakly."""


def test_a_forward_without_a_backward_leaves_nothing_behind():
    seen = Seen()
    gone = weakref.ref(seen)
    with recompute_outputs():
        found = torch.relu(Noticed.apply(torch.rand(2, requires_grad=True), seen))  # which keeps its own output
    del seen
    assert gone() is not None, "the graph holds it"
    del found
    gc.collect()
    assert gone() is None
