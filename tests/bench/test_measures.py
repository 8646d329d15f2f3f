"""What the benchmarks reckon with: rounds, ratios and operations."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from megdet.ops.linear import linear

Script = Callable[[str], ModuleType]


def test_every_round_calls_every_side_once_and_the_first_is_not_counted(script: Script) -> None:
    calls: list[str] = []
    times = script("rounds").in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_of_medians_and_its_spread_goes_round_by_round(script: Script) -> None:
    found = script("rounds").summary({"a": [2.0, 6.0, 4.0], "b": [1.0, 2.0, 8.0]}, "a")
    assert found["seconds"] == {"a": 4.0, "b": 2.0}
    assert found["spread"] == {"a": [2.0, 6.0], "b": [1.0, 8.0]}
    assert found["ratios"] == {"a": 1.0, "b": 2.0}
    assert found["ratio_spread"] == {"a": [1.0, 1.0], "b": [0.5, 3.0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # ours by oneDNN, and torch's own
def test_a_fully_connected_layer_counts_three_products_a_step(script: Script, dtype: torch.dtype) -> None:
    x = torch.rand(5, 7, dtype=dtype, requires_grad=True)
    weight = torch.rand(3, 7, dtype=dtype, requires_grad=True)
    with script("train_step").flop_counter() as counter:
        linear(x, weight, None).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 7 * 3


@pytest.mark.parametrize(
    ("seconds", "size", "within"),
    [
        (10.0, 100, {"memory": True, "time": True}),
        (8.0, 87, {"memory": True, "time": True}),
        (7.9, 86, {"memory": False, "time": False}),  # 27% and 16% too much
        (14.0, 120, {"memory": False, "time": False}),  # 29% and 17% too little
        (13.0, 120, {"memory": False, "time": True}),
    ],
)
def test_a_prediction_holds_within_15_percent_of_memory_and_25_of_time(
    script: Script, seconds: float, size: int, within: dict[str, bool]
) -> None:
    layout = {"devices": 1, "lane_width": 1, "micro_batch": 6, "rounds": 2}
    row = {**layout, "recompute": "none", "communication_seconds": 0.0, "seconds": 10.0, "bytes": 100}
    found = script("plan").compared({"chosen": layout, "layouts": [row]}, {"seconds": seconds, "bytes": size}, "none")
    assert found["within"] == within
    assert found["bytes_ratio"] == 100 / size


def test_the_convolution_of_the_limit_counts_a_multiply_add_as_two(script: Script) -> None:
    _, flops = script("train_step").convolution(16, 1, False, torch.device("cpu"))
    assert flops == 2 * (4 * 4) * 256 * 256 * 9
