"""Real processes that meet, return what they found, and fail in a way that tells who and why."""

import os
import signal
import time

import pytest
import torch

from megdet.distributed.local_ranks import RankError, run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError

pytestmark = pytest.mark.distributed


def add_up(world: World, start: float) -> tuple[int, int, float, int]:
    total = torch.tensor([start + world.rank], dtype=torch.float64)
    world.all_reduce(total)
    return world.rank, world.size, total.item(), torch.get_num_threads()


@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_returns_what_it_found_with_one_thread(size):
    total = sum(10.0 + rank for rank in range(size))
    assert run_in_ranks(add_up, size, 10.0) == [(rank, size, total, 1) for rank in range(size)]


def return_object(world: World) -> dict:
    return {"tensor": torch.arange(3), "rank": world.rank}


def test_tensors_and_objects_come_back():
    for rank, found in enumerate(run_in_ranks(return_object, 2)):
        assert found["rank"] == rank
        assert torch.equal(found["tensor"], torch.arange(3))


def variable(world: World, name: str) -> str | None:
    return os.environ.get(name)


def test_ranks_have_the_environment_of_the_call(monkeypatch):
    run_in_ranks(return_object, 1)  # the server that starts the ranks is there before the variable
    monkeypatch.setenv("MEGDET_TEST_OF_RANKS", "set later")
    assert run_in_ranks(variable, 2, "MEGDET_TEST_OF_RANKS") == ["set later"] * 2
    monkeypatch.delenv("MEGDET_TEST_OF_RANKS")
    assert run_in_ranks(variable, 1, "MEGDET_TEST_OF_RANKS") == [None]


def fail_in(world: World, rank: int, how: str) -> None:
    if world.rank == rank:
        if how == "raise":
            raise KeyError("no such thing")
        if how == "input":
            raise InputError("image 7 cannot be read")
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", RankError, r"rank 1 of 3 failed: KeyError: 'no such thing'\n(?s:.*)in fail_in"),
        ("input", InputError, r"^image 7 cannot be read$"),
        ("kill", RankError, r"^rank 1 of 3 was ended by SIGKILL$"),
        ("exit", RankError, r"^rank 1 of 3 ended with exit code 3$"),
    ],
)
def test_a_rank_that_fails_is_named_with_its_reason_and_the_others_are_stopped(how, error, message):
    started = time.monotonic()
    with pytest.raises(error, match=message):
        run_in_ranks(fail_in, 3, 1, how, timeout=60.0)
    assert time.monotonic() - started < 30


def test_a_rank_that_hangs_is_stopped_after_the_timeout():
    started = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 0 of 1 did not end within 4 seconds$"):
        run_in_ranks(fail_in, 1, 0, "hang", timeout=4.0)
    assert time.monotonic() - started < 30


def only_returns(world: World, value: object) -> object:
    return value


def test_a_function_that_cannot_be_sent_leaves_no_process_behind():
    with pytest.raises(Exception, match="local object"):
        run_in_ranks(lambda world: world, 2)
    assert run_in_ranks(only_returns, 1, "after") == ["after"]
