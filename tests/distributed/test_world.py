import pytest
import torch

from megdet.distributed import world as world_module
from megdet.distributed.lane import SINGLE_LANE, make_lane
from megdet.distributed.layout import Layout
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World, name_ranks, start_world
from megdet.errors import InputError
from small_runs import ALONE


def test_one_process_is_a_world_of_its_own(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = start_world("cpu")
    assert world == World(0, 1, torch.device("cpu"))
    assert world.is_first
    value = torch.tensor([3.0])
    world.all_reduce(value)
    world.barrier()
    assert value.item() == 3
    assert world.gather_objects("a") == ["a"]
    assert make_lane(world, Layout(4, 2, 1, 1)) == SINGLE_LANE


def test_an_unknown_device_is_refused():
    with pytest.raises(InputError, match=r"--device tpu: choose cpu or cuda"):
        start_world("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="no CUDA device is visible here; use --device cpu"):
        start_world("cuda")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="local rank 2 has no GPU: this machine shows 2"):
        start_world("cuda")


def refuse():
    raise InputError("disk full")


def test_a_rank_alone_returns_or_raises_what_the_work_does():
    assert ALONE.together(lambda: 3) == ALONE.on_first(lambda: 3) == 3
    for do in (ALONE.together, ALONE.on_first):
        with pytest.raises(InputError, match="disk full"):
            do(refuse)


def test_ranks_are_named_in_runs():
    assert name_ranks([4]) == "rank 4"
    assert name_ranks([0, 1]) == "ranks 0, 1"
    assert name_ranks([0, 1, 2, 3, 5, 7, 8, 9]) == "ranks 0 to 3, 5, 7 to 9"
    assert name_ranks(range(0, 128, 2)) == "ranks 0, 2, 4, 6, 8, 10, and 58 more"


def meet(world: World) -> dict:
    total = torch.tensor([world.rank + 1.0])
    world.all_reduce(total)
    found = {"total": total.item(), "objects": world.gather_objects(("rank", world.rank)), "messages": []}
    for work, do in (
        (refuse if world.rank == 1 else int, world.together),
        (refuse if world.is_first else int, world.on_first),
        (refuse if world.rank == 1 else int, world.on_first),  # rank 1 is not asked
    ):
        try:
            found["messages"].append(do(work))
        except InputError as error:
            found["messages"].append(str(error))
    found["of the first"] = world.on_first(lambda: world.rank)
    images = torch.full((2, 3, 4, 5), float(world.rank), dtype=torch.float64).to(memory_format=torch.channels_last)
    shared = [torch.arange(6.0).reshape(2, 3) + world.rank, images, torch.tensor(world.rank), torch.empty(0, 4)]
    world.broadcast(shared)
    found["shared"] = shared
    found["small messages"] = [torch.full((5,), world.rank + float(number)) for number in range(5)]
    world_module.CHUNK_BYTES = 45  # two tensors a message
    world.broadcast(found["small messages"])
    for width in (1, 2, 4):
        lane = make_lane(world, Layout(4, 4, 4, width))
        members = torch.zeros(4)
        members[world.rank] = 1
        if lane.width > 1:
            torch.distributed.all_reduce(members, group=lane.process_group)
        found[width] = (lane.width, lane.place, lane.is_first, members.nonzero().flatten().tolist())
    world.barrier()
    return found


@pytest.mark.distributed
def test_four_ranks_sum_gather_agree_and_form_lanes_of_neighbours():
    for rank, found in enumerate(run_in_ranks(meet, 4)):
        assert found["total"] == 10
        assert found["objects"] == [("rank", other) for other in range(4)]
        assert found["messages"] == ["disk full", "disk full", 0]
        assert found["of the first"] == 0
        for tensor, expected in zip(
            found["shared"], (torch.arange(6.0).reshape(2, 3), 0, 0, torch.empty(0, 4)), strict=True
        ):
            assert (tensor == expected).all()
        assert [tensor.tolist() for tensor in found["small messages"]] == [[number] * 5 for number in range(5)]
        assert found["shared"][1].is_contiguous(memory_format=torch.channels_last)
        assert found[1] == (1, 0, True, [rank])
        assert found[2] == (2, rank % 2, rank % 2 == 0, [rank - rank % 2, rank - rank % 2 + 1])
        assert found[4] == (4, rank, rank == 0, [0, 1, 2, 3])
