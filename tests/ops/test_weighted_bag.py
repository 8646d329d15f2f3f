import subprocess
import sys

import pytest
import torch

from megdet.ops.weighted_bag import stably_sorted, weighted_bags


def random_bags(dtype: torch.dtype = torch.float64, taps: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(7, 3, dtype=dtype, requires_grad=True)
    index = torch.randint(0, 7, (10, taps))
    return rows, index, torch.randn(10, taps, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_a_bag_is_the_weighted_sum_of_its_rows_with_the_gradients_of_one(taps):
    rows, index, weights = random_bags(taps=taps)
    torch.testing.assert_close(weighted_bags(rows, index, weights), (rows[index] * weights.unsqueeze(2)).sum(1))
    assert torch.autograd.gradcheck(lambda r, w: weighted_bags(r, index, w), (rows, weights))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_asked_for_gets_a_gradient(needs):
    rows, index, weights = (tensor.detach() for tensor in random_bags())
    rows.requires_grad_(needs[0])
    weights.requires_grad_(needs[1])
    weighted_bags(rows, index, weights).square().sum().backward()
    assert (rows.grad is not None, weights.grad is not None) == needs


def test_no_bags_have_gradients_of_zero():
    rows, index, weights = random_bags()
    index, weights = index[:0], weights.detach()[:0].requires_grad_()
    weighted_bags(rows, index, weights).sum().backward()
    assert rows.grad.eq(0).all()
    assert weights.grad.shape == (0, 4)


def test_in_bfloat16_the_gradient_of_weights_in_float32_is_in_float32():
    rows, index, weights = random_bags(torch.float32)
    half = rows.detach().bfloat16().requires_grad_()
    bags = weighted_bags(half, index, weights)
    assert bags.dtype == torch.bfloat16
    bags.float().sum().backward()
    assert weights.grad.dtype == torch.float32
    torch.testing.assert_close(weights.grad, half.float().sum(1)[index], atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    "numbers",
    [
        torch.empty(0, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        torch.full((9,), 5),
        torch.tensor([0, 2**60, 3, 2**60, 0]),  # no room for a place beside the number
        torch.tensor([0, 2**59, 3, 2**59, 0]),  # just enough room
        torch.randint(0, 50, (4096,)),
    ],
)
def test_numbers_are_sorted_with_their_places_as_torch_sorts_stably(numbers):
    before = numbers.clone()
    limit = max(numbers.tolist(), default=0) + 1
    for ours, theirs in zip(stably_sorted(numbers, limit), numbers.sort(stable=True), strict=True):
        assert ours.equal(theirs)
        assert ours.dtype == torch.int64
    assert numbers.equal(before)


@pytest.mark.parametrize("taps", [3, 4])
def test_second_derivatives_are_those_of_finite_differences(taps):
    torch.manual_seed(0)
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    index, weights = torch.randint(5, (4, taps)), torch.rand(4, taps, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda own: weighted_bags(own, index, weights).pow(3), (rows,))


COMPILED = """
import torch
from megdet.ops.weighted_bag import weighted_bags

torch.set_num_threads(1)
compiled = torch.compile(weighted_bags, fullgraph=True, backend="aot_eager")
rows, index, weights = torch.randn(5, 2), torch.randint(5, (4, 3)), torch.rand(4, 3)
found = []
for function in (compiled, weighted_bags):
    leaf = rows.clone().requires_grad_()
    y = function(leaf, index, weights)
    y.pow(2).sum().backward()
    found.append((y, leaf.grad))
print(*(torch.equal(ours, theirs) for ours, theirs in zip(*found)))
"""


def test_a_compiled_sum_is_one_graph():
    # a process without the checks of shapes, which torch cannot compile
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True)
    assert run.stdout == "True True\n"
