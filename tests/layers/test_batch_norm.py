import copy
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import nn

from factories import relative
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.layers.batch_norm import RUNNING_MOMENTUM, CrossDeviceBatchNorm, finish_step
from megdet.layers.frozen_norm import FrozenBatchNorm
from two_processes import UNEVEN_SHARES, joined_reference, run_two_processes

ALONE = World(0, 1, torch.device("cpu"))
SHAPES = [(6, 5), (4, 5, 7), (3, 5, 4, 6), (1, 5, 2, 2)]


def pair(channels: int = 5, dtype: torch.dtype = torch.float32) -> tuple[CrossDeviceBatchNorm, nn.BatchNorm2d]:
    """Our norm and torch's with the same tensors, none of them trivial."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(channels, eps=1e-3, momentum=RUNNING_MOMENTUM)
    theirs._check_input_dim = lambda _input: None  # type: ignore[method-assign]
    for name, tensor in theirs.state_dict().items():
        if name != "num_batches_tracked":
            tensor.uniform_(0.5, 1.5)
    ours = CrossDeviceBatchNorm(channels, eps=1e-3)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_device_normalizes_as_torch_does(shape):
    ours, theirs = pair()
    for _step in range(3):
        x = (torch.randn(shape) * 3 + 1).requires_grad_()
        x2 = x.detach().clone().requires_grad_()
        y, y2 = ours(x), theirs(x2)
        upstream = torch.randn_like(y)
        y.backward(upstream)
        y2.backward(upstream)
        finish_step(ours.modules(), 1, ALONE)
        assert relative(y2, y) < 1e-6
        assert relative(x2.grad, x.grad) < 1e-6
    assert relative(theirs.weight.grad, ours.weight.grad) < 1e-6
    assert relative(theirs.bias.grad, ours.bias.grad) < 1e-6
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_its_state_dict_is_that_of_torch():
    ours, theirs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_channels_last_input_stays_so_and_changes_no_number():
    ours, theirs = pair()
    x = torch.randn(3, 5, 4, 6)
    y = ours(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, theirs(x))


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_input_has_float32_statistics(masked):
    ours, theirs = pair()
    x = (torch.randn(64, 5, 4, 6) + 100).bfloat16()  # whose square in bfloat16 has no digit of the variance left
    y = ours(x, torch.ones(64, dtype=torch.bool) if masked else None)
    assert y.dtype == torch.bfloat16
    assert relative(theirs(x.float()), y.float()) < 0.01
    finish_step(ours.modules(), 1, ALONE)
    assert ours.running_var.dtype == torch.float32
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_rows_change_nothing(shape, two_pass):
    ours, theirs = pair(dtype=torch.float64)
    ours.two_pass = two_pass
    x = torch.randn(shape, dtype=torch.float64)
    is_valid = torch.cat([torch.ones(shape[0], dtype=torch.bool), torch.zeros(2, dtype=torch.bool)])
    is_valid = is_valid[torch.randperm(len(is_valid))]
    padded = torch.full((len(is_valid), *shape[1:]), 1e6, dtype=torch.float64)
    padded[is_valid] = x
    padded.requires_grad_()
    x.requires_grad_()
    y, y2 = ours(padded, is_valid), theirs(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    y2.backward(upstream[is_valid])
    finish_step(ours.modules(), 1, ALONE)
    assert relative(y2, y[is_valid]) < 1e-12
    assert relative(x.grad, padded.grad[is_valid]) < 1e-12
    assert padded.grad[~is_valid].eq(0).all()
    assert relative(theirs.weight.grad, ours.weight.grad) < 1e-12
    assert relative(theirs.bias.grad, ours.bias.grad) < 1e-12
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)
    bias = ours.bias.detach().reshape(1, -1, *[1] * (len(shape) - 2))
    assert torch.equal(y[~is_valid], bias.expand(2, *shape[1:]))


@pytest.mark.parametrize("two_pass", [False, True])
def test_the_gradient_is_the_derivative(two_pass):
    torch.manual_seed(0)
    norm = CrossDeviceBatchNorm(2, two_pass=two_pass).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True])

    def normalized(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, mask))[mask]

    assert torch.autograd.gradcheck(normalized, (x, norm.weight, norm.bias))


def test_a_step_of_several_groups_is_one_update_with_their_plain_mean():
    norm = CrossDeviceBatchNorm(3)
    groups = [torch.randn(2, 3, 4, 4) * (i + 1) + i for i in range(3)]
    for group in groups:
        norm(group)
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_var, torch.ones(3))
    finish_step([norm], 3, ALONE)
    means = torch.stack([group.mean((0, 2, 3)) for group in groups]).mean(0)
    variances = torch.stack([group.transpose(0, 1).flatten(1).var(1, correction=1) for group in groups]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.1 * means)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variances)
    assert norm.num_batches_tracked == 1


def test_a_step_leaves_nothing_to_the_next():
    ours, theirs = pair()
    for _ in range(2):
        x = torch.randn(4, 5, 3, 3)
        ours(x), theirs(x)
        finish_step([ours], 1, ALONE)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_every_layer_of_a_model_gets_its_own_statistics():
    norms = nn.Sequential(CrossDeviceBatchNorm(3), FrozenBatchNorm(3), CrossDeviceBatchNorm(3))
    x = torch.randn(4, 3, 2, 2) * torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1) + 5
    reference = nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.BatchNorm2d(3))
    norms(x), reference(x)
    finish_step(norms.modules(), 1, ALONE)
    torch.testing.assert_close(norms[0].state_dict(), reference[0].state_dict())
    torch.testing.assert_close(norms[2].state_dict(), reference[2].state_dict(), rtol=1e-4, atol=1e-4)
    finish_step([], 1, ALONE)


def test_evaluation_uses_and_leaves_the_running_statistics():
    ours, _ = pair()
    before = copy.deepcopy(ours.state_dict())
    ours.eval()(torch.randn(3, 5, 2, 2))
    finish_step([ours.train()], 1, ALONE)
    assert ours.step_mean.eq(0).all()
    assert ours.num_batches_tracked == 1
    assert not torch.equal(ours.running_mean, before["running_mean"])  # a step of no forward is a bug of the caller


def test_a_group_of_one_value_has_no_variance_and_is_refused():
    with pytest.raises(InputError, match="no variance"):
        CrossDeviceBatchNorm(3)(torch.randn(1, 3))


@pytest.mark.parametrize("is_valid", [[True, False], [False, False]])
def test_a_group_of_padded_rows_but_for_one_stays_finite(is_valid):
    norm = CrossDeviceBatchNorm(3)
    x = torch.randn(2, 3, requires_grad=True)
    y = norm(x, torch.tensor(is_valid))
    y.sum().backward()
    torch.testing.assert_close(y, norm.bias.expand(2, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.grad, torch.zeros(2, 3), atol=1e-3, rtol=0)
    finish_step([norm], 1, ALONE)
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()


@pytest.mark.parametrize("two_pass", [False, True])
def test_a_group_without_a_valid_row_leaves_its_part_of_the_running_statistics(two_pass):
    ours, _ = pair()
    ours.two_pass = two_pass
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    ours(x, torch.zeros(4, dtype=torch.bool)).sum().backward()
    assert x.grad.eq(0).all()
    finish_step([ours], 1, ALONE)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours.state_dict()[name], before[name])


def test_a_lane_of_one_without_images_has_no_group():
    norm = CrossDeviceBatchNorm(3)
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad.eq(0).all()
    assert norm.step_mean.eq(0).all()
    assert norm.step_var.eq(0).all()


def test_frozen_norms_are_the_running_form_and_learn_nothing():
    _, theirs = pair()
    frozen = FrozenBatchNorm(5, eps=1e-3)
    frozen.load_state_dict(theirs.state_dict())
    assert list(frozen.parameters()) == []
    x = torch.randn(2, 5, 3, 3)
    assert torch.equal(frozen.train()(x), theirs.eval()(x))
    before = copy.deepcopy(frozen.state_dict())
    finish_step([frozen], 1, ALONE)
    torch.testing.assert_close(frozen.state_dict(), before, rtol=0, atol=0)
    assert frozen(x.bfloat16()).dtype == torch.bfloat16


def test_a_frozen_norm_misses_a_tensor_that_is_not_there():
    with pytest.raises(RuntimeError, match="running_var"):
        FrozenBatchNorm(5).load_state_dict({"weight": torch.ones(5), "bias": torch.ones(5)})


def test_both_forms_of_the_statistics_agree(two_processes):
    for ranks in two_processes:
        for case in range(len(UNEVEN_SHARES)):
            for name, merged in ranks[case, False].items():
                assert relative(ranks[case, True][name], merged) < 1e-12


def test_a_recomputed_forward_over_two_devices_issues_no_collective(two_processes):
    for ranks in two_processes:
        plain, recomputed = ranks["plain"], ranks["recomputed"]
        assert plain["collectives"] == recomputed["collectives"] == 4  # two layers, forward and backward
        for name in plain:
            if name != "collectives":
                assert torch.equal(plain[name], recomputed[name]), name


def test_a_wide_lane_refuses_a_group_of_one_value_on_every_rank(two_processes):
    assert all("no variance" in ranks["one value"] for ranks in two_processes)


@pytest.fixture(scope="module")
def two_processes():
    return run_two_processes()


@pytest.mark.distributed
def test_two_devices_normalize_like_one(two_processes):
    results = two_processes
    for (case, shares), two_pass in product(enumerate(UNEVEN_SHARES), (False, True)):
        reference = joined_reference(case)
        ranks = [result[case, two_pass] for result in results]
        for name in ("output", "input_gradient"):
            assert [len(rank[name]) for rank in ranks] == list(shares)
            assert relative(reference[name], torch.cat([rank[name] for rank in ranks])) < 1e-12
        for name in ("weight_gradient", "bias_gradient"):
            assert relative(reference[name], ranks[0][name] + ranks[1][name]) < 1e-12
        for rank in ranks:
            for name in ("running_mean", "running_var"):
                assert relative(reference[name], rank[name]) < 1e-12
            assert torch.equal(ranks[0]["running_var"], rank["running_var"])  # bitwise, or replicas drift apart
            assert rank["num_batches_tracked"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_frozen_statistics_keep_no_input_and_have_the_gradient_of_torch(dtype, memory_format):
    norm = FrozenBatchNorm(5)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 1.5)
    if dtype == torch.float64:
        norm.double()
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 6).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn_like(x)
    expected = nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )
    (of_torch,) = torch.autograd.grad(expected, x, dy)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = norm(x)
    (gradient,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, expected)
    assert torch.equal(gradient, of_torch)
    assert max(kept) == 5, "numbers a channel, not the input"
    by_function = torch.func.grad(lambda own: (norm(own).double() * dy.double()).sum())(x.detach())
    assert torch.equal(by_function, of_torch)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own, in `jvp`
def test_frozen_statistics_work_in_functions_of_functions():
    norm = FrozenBatchNorm(5)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 1.5)
    images = torch.randn(3, 1, 5, 4, 6)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return norm(x).pow(3).sum()

    by_image = torch.func.vmap(torch.func.grad(loss))(images)
    one_by_one = [torch.autograd.grad(loss(x), x)[0] for x in images.clone().requires_grad_().unbind()]
    torch.testing.assert_close(by_image, torch.stack(one_by_one))
    x, tangent = images[0], torch.randn_like(images[0])
    hessian_product = torch.func.jvp(torch.func.grad(loss), (x,), (tangent,))[1]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(hessian_product, torch.autograd.grad(gradient, leaf, tangent)[0])


def test_a_frozen_weight_that_asks_for_a_gradient_gets_it():
    norm = FrozenBatchNorm(5)
    norm.weight.requires_grad_()
    norm(torch.randn(2, 5, 4, 6, requires_grad=True)).sum().backward()
    assert norm.weight.grad is not None


def test_frozen_statistics_work_in_a_traced_graph():
    # a process without the checks of shapes, which do not take what torch traces with
    program = """
import torch
from megdet.layers.frozen_norm import FrozenBatchNorm
norm, x = FrozenBatchNorm(3), torch.rand(2, 3, 4, 5)
print(torch.equal(torch.fx.symbolic_trace(torch.nn.Sequential(norm))(x), norm(x)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
