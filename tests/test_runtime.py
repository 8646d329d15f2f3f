"""What is asked of the machine, of one that is made up: nothing here depends on the real one."""

from collections.abc import Callable

import pytest
import torch

from megdet.errors import InputError
from megdet.precision import arithmetic
from megdet.runtime import Speeds, device_beside, device_kind, measure_speeds, prepare_process, slow_at

Pretend = Callable[..., list[torch.dtype]]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


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


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.parametrize(("ranks", "device"), [("1", "cuda:1"), ("3", "cuda:3"), ("4", "cpu")])
def test_a_gpu_that_no_rank_computes_on_is_free_for_work_beside_the_training_otherwise_the_cpu(
    ranks, device, four_gpus, monkeypatch
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert device_beside("", GPU) == torch.device(device)


def test_work_beside_a_training_on_the_cpu_is_on_the_cpu(four_gpus):
    assert device_beside("", CPU) == CPU


@pytest.mark.parametrize(("asked", "device"), [("cpu", "cpu"), ("cuda", "cuda:1"), ("cuda:3", "cuda:3")])
def test_the_device_that_was_asked_for_is_given(asked, device, four_gpus):
    assert device_beside(asked, GPU) == torch.device(device)


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"])
def test_what_is_no_device_is_refused(asked, four_gpus):
    with pytest.raises(InputError, match=f"--evaluate-on {asked}: choose cpu, cuda or cuda:N"):
        device_beside(asked, CPU)


def test_a_gpu_that_is_not_there_is_refused(four_gpus, monkeypatch):
    with pytest.raises(InputError, match="--evaluate-on cuda:4: 4 CUDA devices are visible here"):
        device_beside("cuda:4", CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--evaluate-on cuda: 0 CUDA devices are visible here"):
        device_beside("cuda", CPU)


def test_a_device_that_is_not_named_is_the_gpu_where_there_is_one(four_gpus, monkeypatch):
    assert (device_kind(""), device_kind("cpu"), device_kind("cuda")) == ("cuda", "cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_kind("") == "cpu"
    with pytest.raises(InputError, match="no CUDA device is visible here"):
        device_kind("cuda")


def test_a_process_on_a_gpu_computes_deterministically_and_without_tf32(four_gpus, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    with arithmetic("tf32", GPU):  # which puts the flags back in the end
        prepare_process(GPU)
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.deterministic
    assert chosen == [GPU]
