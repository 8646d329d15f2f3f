import pytest
import torch

from megdet.distributed.spare import alone_on, spare_device
from megdet.distributed.world import World
from megdet.errors import InputError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.parametrize(("ranks", "device"), [("1", "cuda:1"), ("3", "cuda:3"), ("4", "cpu")])
def test_a_gpu_that_no_rank_computes_on_is_spare_otherwise_the_cpu(ranks, device, four_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert spare_device("", World(0, int(ranks), GPU)) == torch.device(device)


def test_beside_a_training_on_the_cpu_the_cpu_is_spare(four_gpus):
    assert spare_device("", World(0, 1, CPU)) == CPU


@pytest.mark.parametrize(("asked", "device"), [("cpu", "cpu"), ("cuda", "cuda:1"), ("cuda:3", "cuda:3")])
def test_the_device_that_was_asked_for_is_given(asked, device, four_gpus):
    assert spare_device(asked, World(1, 2, GPU)) == torch.device(device)


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"])
def test_what_is_no_device_is_refused(asked, four_gpus):
    with pytest.raises(InputError, match=f"--evaluate-on {asked}: choose cpu, cuda or cuda:N"):
        spare_device(asked, World(0, 1, CPU))


def test_a_gpu_that_is_not_there_is_refused(four_gpus, monkeypatch):
    with pytest.raises(InputError, match="--evaluate-on cuda:4: 4 CUDA devices are visible here"):
        spare_device("cuda:4", World(0, 1, CPU))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--evaluate-on cuda: 0 CUDA devices are visible here"):
        spare_device("cuda", World(0, 1, CPU))


def test_a_process_beside_the_ranks_is_none_of_them(monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "OMP_NUM_THREADS": "5"}.items():
        monkeypatch.setenv(name, value)
    found = alone_on(torch.device("cuda", 6))
    wanted = {"RANK": "0", "LOCAL_RANK": "6", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "5"}
    assert {name: found[name] for name in wanted} == wanted
