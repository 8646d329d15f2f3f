"""Batch statistics beside float64, wherever the mean lies beside the deviation."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megdet.distributed.lane import SINGLE_LANE, Lane, make_lane
from megdet.distributed.layout import Layout
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.layers.batch_norm import CrossDeviceBatchNorm

CHANNELS = 3
SHAPES = {
    "2-D": (1200, CHANNELS),
    "3-D": (12, CHANNELS, 143),
    "4-D": (2, CHANNELS, 80, 90),
    "5-D": (2, CHANNELS, 6, 9, 11),
    "one pixel": (600, CHANNELS, 1, 1),
    "long and prime": (2, CHANNELS, 10007),
    "large": (2, CHANNELS, 211, 223),
}
FORMATS = [(name, False) for name in SHAPES] + [(name, True) for name in ("4-D", "5-D", "large")]
RATIOS = (0.0, 3.0, 20.0, 100.0, 1e3, 1e4)
KINDS = ("noise", "mostly one value", "images apart")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def lanes_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane of one takes torch's own kernel, which loses digits; here it takes the arithmetic of wider lanes."""
    monkeypatch.setattr(CrossDeviceBatchNorm, "_local", lambda norm, x: norm._together(x, None))


def sample(kind: str, name: str, ratio: float, dtype: torch.dtype, *, channels_last: bool = False) -> Tensor:
    """Numbers whose mean over the whole is `ratio` standard deviations from 0, or near it; other in every channel."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    if dtype == torch.bfloat16 and ratio > 100:  # so few digits have such a ratio where one number in many differs
        share = min(0.5, (128 / ratio) ** 2)
        x = 1024.0 + 8 * (torch.rand(shape, dtype=torch.float64) < share)
        x[:1, :, ...] = 1032.0 if len(shape) == 2 else x[:1]
    else:
        x = torch.randn(shape, dtype=torch.float64)
        if kind == "mostly one value":
            x = torch.where(x > 1.5, 10.0, 0.0)
        elif kind == "images apart":
            x = 0.1 * x + torch.linspace(-1, 1, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
        mean, deviation = (by_channel(f, x) for f in (x.mean(dims(x)), x.std(dims(x))))
        x = (x - mean) / deviation + ratio
        x = x * torch.tensor([0.25, 1.0, 300.0], dtype=torch.float64).reshape(1, -1, *[1] * (len(shape) - 2))
    x = x.to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def make_norm(x: Tensor, lane: Lane = SINGLE_LANE, *, two_pass: bool = False) -> CrossDeviceBatchNorm:
    norm = CrossDeviceBatchNorm(CHANNELS, lane=lane, two_pass=two_pass)
    return norm.double() if x.dtype == torch.float64 else norm


def check(norm_mean: Tensor, norm_var: Tensor, x: Tensor, what: str) -> None:
    """The statistics that a layer found beside those of the same numbers in float64."""
    wide = x.double()
    mean, var = wide.mean(dims(x)), wide.var(dims(x))
    off = (norm_var.double() - var).abs()
    assert (norm_var >= 0).all(), what
    # where all numbers are equal there is no digit to be right in: 1e-15 is the square of float32's last one
    assert (off <= TOLERANCE * var + 1e-15 * mean**2).all(), (what, (off / var).tolist())
    assert ((norm_mean.double() - mean).abs() <= 1e-7 * mean.abs() + 2e-5 * var.sqrt()).all(), what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "channels_last"), FORMATS)
def test_one_device_finds_the_variance_of_float64(name, channels_last, dtype):
    for kind, ratio in product(KINDS, RATIOS):
        x = sample(kind, name, ratio, dtype, channels_last=channels_last)
        norm = make_norm(x)
        norm(x)
        check(norm.step_mean, norm.step_var, x, f"{kind}, ratio {ratio:g}")


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("name", ["2-D", "4-D"])
def test_padded_rows_and_the_two_pass_form_do_too(name, two_pass):
    for kind, ratio, dtype in product(KINDS, RATIOS, DTYPES):
        x = sample(kind, name, ratio, dtype)
        is_valid = torch.arange(len(x)) < len(x) // 2
        norm = make_norm(x, two_pass=two_pass)
        norm(x, is_valid)
        check(norm.step_mean, norm.step_var, x[is_valid], f"{kind}, ratio {ratio:g}, {dtype}")


@pytest.mark.parametrize("value", [2024.3, -1e-3, 0.0, 1e6])
@pytest.mark.parametrize(("name", "channels_last"), FORMATS)
def test_a_constant_has_no_variance_and_comes_out_as_the_bias(name, channels_last, value):
    x = torch.full_like(sample("noise", name, 0, torch.float32, channels_last=channels_last), value)
    norm = CrossDeviceBatchNorm(CHANNELS)
    y = norm(x.requires_grad_())
    y.sum().backward()
    assert (norm.step_var >= 0).all()
    assert (norm.step_var <= 1e-14 * value**2).all()
    assert y.abs().max() <= 1e-6 * abs(value) / math.sqrt(norm.eps)
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("name", "channels_last"), FORMATS)
def test_output_and_gradients_lose_no_more_digits_than_the_mean_has_before_the_deviation(name, channels_last):
    for ratio in RATIOS:
        x = sample("noise", name, ratio, torch.float32, channels_last=channels_last)
        upstream = torch.randn_like(x)
        found = []
        for norm, values in ((CrossDeviceBatchNorm(CHANNELS), x), (reference().double(), x.double())):
            values = values.detach().clone().requires_grad_()
            y = norm(values)
            y.backward(upstream.to(y.dtype))
            found.append((y, values.grad, norm.weight.grad, norm.bias.grad))
        for ours, expected in zip(*found, strict=True):
            assert (ours - expected).abs().max() <= 4e-7 * (20 + ratio) * expected.abs().max(), ratio


def reference() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS)
    norm._check_input_dim = lambda _input: None  # type: ignore[method-assign]
    return norm


def cases() -> list[tuple[str, str, bool, float, torch.dtype, float, bool]]:
    """Kind, shape, format, ratio, dtype, deviations between the ranks' means, form."""
    found = [
        (kind, name, last, ratio, dtype, 0.0, False)
        for kind, (name, last), ratio, dtype in product(KINDS, FORMATS, RATIOS, DTYPES)
    ]
    apart = product(FORMATS, (0.0, 100.0, 1e4), DTYPES[:2], (5.0, 1000.0), (False, True))
    return found + [("noise", name, last, ratio, dtype, far, form) for (name, last), ratio, dtype, far, form in apart]


def share(case: tuple[Any, ...], rank: int) -> Tensor:
    """A third of the numbers for rank 0, the rest for rank 1."""
    kind, name, last, ratio, dtype, apart, _ = case
    x = sample(kind, name, ratio, dtype, channels_last=last)
    cut = max(1, len(x) // 3)
    own = x[:cut] if rank == 0 else x[cut:] + apart
    return own.movedim(1, -1).contiguous().movedim(-1, 1) if last else own.contiguous()


def statistics_of_a_lane(world: World) -> list[tuple[Tensor, Tensor]]:
    lane = make_lane(world, Layout(1, 2, 2, 2))
    found = []
    for case in cases():
        x = share(case, world.rank)
        norm = make_norm(x, lane, two_pass=case[-1])
        with torch.no_grad():
            norm(x)
        found.append((norm.step_mean, norm.step_var))
    return found


@pytest.mark.distributed
def test_two_devices_find_the_variance_of_float64_also_where_their_means_differ():
    ranks = run_in_ranks(statistics_of_a_lane, 2)
    for case, *found in zip(cases(), *ranks, strict=True):
        x = torch.cat([share(case, rank) for rank in range(2)])
        for mean, var in found:
            check(mean, var, x, str(case))
