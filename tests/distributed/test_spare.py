import torch

from megdet.distributed.spare import alone_on


def test_a_process_beside_the_ranks_is_none_of_them(monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "OMP_NUM_THREADS": "5"}.items():
        monkeypatch.setenv(name, value)
    found = alone_on(torch.device("cuda", 6))
    wanted = {"RANK": "0", "LOCAL_RANK": "6", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "5"}
    assert {name: found[name] for name in wanted} == wanted
