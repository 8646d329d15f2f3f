"""The choice of an arithmetic by measuring, on timings that are made up: nothing here depends on the machine."""

from collections.abc import Callable

import pytest
import torch

from megdet.runtime import Speeds, measure_speeds, slow_at

Pretend = Callable[..., list[torch.dtype]]
CPU = torch.device("cpu")


def test_the_faster_arithmetic_wins(pretend_speeds: Pretend) -> None:
    pretend_speeds(float32=0.001, bfloat16=0.002)
    slow = measure_speeds(CPU)
    assert slow.float32 == pytest.approx(2 * slow.bfloat16)
    assert slow.faster == "float32"
    pretend_speeds(float32=0.002, bfloat16=0.001)
    assert measure_speeds(CPU).faster == "bfloat16"


def test_both_are_timed_in_turn_so_that_a_neighbour_slows_both(pretend_speeds: Pretend) -> None:
    order = pretend_speeds(float32=0.001, bfloat16=0.001)
    measure_speeds(CPU)
    assert {torch.float32, torch.bfloat16} == set(order)
    turns = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(turn.count(torch.float32) == turn.count(torch.bfloat16) == 2 for turn in turns)


def test_a_process_measures_once(pretend_speeds: Pretend) -> None:
    order = pretend_speeds(float32=0.001, bfloat16=0.002)
    first, count = measure_speeds(CPU), len(order)
    assert measure_speeds(torch.device("cpu")) is first
    assert len(order) == count


def test_the_speed_is_the_work_over_the_time(pretend_speeds: Pretend) -> None:
    pretend_speeds(float32=0.5, bfloat16=0.25)
    work = 2 * 36 * 36 * 128 * 128 * 9 + 2 * 512 * 512 * 512  # a 3 x 3 convolution and a matrix product
    assert measure_speeds(CPU).float32 == pytest.approx(work / (0.5 + 0.5))
    assert measure_speeds(CPU).bfloat16 == pytest.approx(work / (0.25 + 0.25))


def test_bfloat16_is_slow_where_it_is_clearly_behind() -> None:
    assert Speeds(float32=338e9, bfloat16=174e9).bfloat16_is_slow
    assert not Speeds(float32=338e9, bfloat16=300e9).bfloat16_is_slow  # near enough that two runs might disagree
    assert not Speeds(float32=300e9, bfloat16=1200e9).bfloat16_is_slow


def test_only_a_precision_that_is_slow_here_is_told_of(pretend_speeds: Pretend) -> None:
    order = pretend_speeds(float32=0.001, bfloat16=0.002)
    assert slow_at("float32", CPU) == slow_at("float64", CPU) == ""
    assert order == []  # nothing to ask
    assert slow_at("bfloat16", CPU) == str(measure_speeds(CPU))
    pretend_speeds(float32=0.001, bfloat16=0.0011)
    assert slow_at("bfloat16", CPU) == ""


def test_the_sentence_has_both_figures() -> None:
    assert str(Speeds(float32=338.4e9, bfloat16=174.2e9)) == "338 GFLOP/s in float32, 174 in bfloat16"
    assert str(Speeds(float32=3.384e9, bfloat16=0.1742e9)) == "3.4 GFLOP/s in float32, 0.17 in bfloat16"


def test_what_is_measured_are_real_operations() -> None:
    measure_speeds.cache_clear()
    found = measure_speeds(CPU)
    assert 0 < found.float32 < 1e15
    assert 0 < found.bfloat16 < 1e15
