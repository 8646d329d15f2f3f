"""Batch norm over two real processes, and the same on the joined batch in one."""

from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn

from megdet.distributed.lane import Lane, make_lane
from megdet.distributed.layout import Layout
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.layers.batch_norm import CrossDeviceBatchNorm, finish_step
from megdet.layers.recompute import plainly, recompute

UNEVEN_SHARES = ((3, 3), (5, 2), (1, 6), (0, 4), (4, 0))
"""Rows of either rank; the last two leave one without any."""
CHANNELS, REST = 3, (4, 5)


def whole_group(case: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and gradient of the output of the whole group."""
    generator = torch.Generator().manual_seed(case)
    shape = (sum(UNEVEN_SHARES[case]), CHANNELS, *REST)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    upstream = torch.randn(shape, dtype=torch.float64, generator=generator)
    return x * 3 + 50, upstream  # far from 0, where E[x^2] - E[x]^2 would lose its digits


def make_norm(kind: Any, **options: Any) -> Any:
    """A norm with weights that are not trivial."""
    norm = kind(CHANNELS, **options).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(9))
    nn.init.uniform_(norm.bias, 0.5, 1.5, generator=torch.Generator().manual_seed(8))
    return norm


def observed(norm: Any, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "output": y.detach(),
        "input_gradient": x.grad,
        "weight_gradient": norm.weight.grad,
        "bias_gradient": norm.bias.grad,
        **{name: buffer.clone() for name, buffer in norm.named_buffers()},
    }


def joined_reference(case: int) -> dict[str, torch.Tensor]:
    """torch's batch norm on the joined batch."""
    norm = make_norm(nn.BatchNorm2d)
    x, upstream = whole_group(case)
    y = norm(x.requires_grad_())
    y.backward(upstream)
    return observed(norm, x, y)


def _two_layers(lane: Lane, world: World, function: Any) -> dict[str, Any]:
    """What two layers in a row learn, and the number of collectives until their running statistics are due."""
    norms = nn.ModuleList(make_norm(CrossDeviceBatchNorm, lane=lane) for _ in range(2))
    generator = torch.Generator().manual_seed(lane.place)
    x = torch.randn(3, CHANNELS, *REST, dtype=torch.float64, generator=generator, requires_grad=True)
    calls = 0
    gather = distributed.all_gather_into_tensor

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return gather(*arguments, **options)

    with mock.patch.object(distributed, "all_gather_into_tensor", counted):
        function(lambda x: norms[1](norms[0](x).relu()).sin(), x).square().sum().backward()
    finish_step(norms, 1, world)
    found = {name: parameter.grad for name, parameter in norms.named_parameters()}
    return {"collectives": calls, "x": x.grad, **found, **dict(norms.named_buffers())}


def _rank(world: World) -> dict[Any, Any]:
    lane = make_lane(world, Layout(1, 7, 2, 2))
    found: dict[Any, Any] = {}
    for (case, shares), two_pass in product(enumerate(UNEVEN_SHARES), (False, True)):
        norm = make_norm(CrossDeviceBatchNorm, lane=lane, two_pass=two_pass)
        own = slice(0, shares[0]) if world.rank == 0 else slice(shares[0], None)
        x, upstream = (tensor[own].clone() for tensor in whole_group(case))
        y = norm(x.requires_grad_())
        y.backward(upstream)
        finish_step(norm.modules(), 1, world)
        found[case, two_pass] = observed(norm, x, y)
    found["plain"], found["recomputed"] = (_two_layers(lane, world, function) for function in (plainly, recompute))
    try:
        CrossDeviceBatchNorm(CHANNELS, lane=lane)(torch.ones(1 - world.rank, CHANNELS, 1, 1))
    except InputError as error:
        found["one value"] = str(error)
    return found


def run_two_processes() -> list[dict[Any, Any]]:
    """What each of two gloo processes saw, by case and form of the statistics."""
    return run_in_ranks(_rank, 2)
