"""A device for work beside the training, and the surroundings of a process that is alone on it."""

import os

import torch

from megdet.distributed.world import World
from megdet.errors import InputError


def spare_device(asked: str, world: World) -> torch.device:
    """The device for a process beside the ranks of this machine, seen from one of them.

    `asked` is cpu, cuda (the GPU of this rank, which it then shares), cuda:N, or empty: the first visible GPU that no
    rank computes on where the training is on GPUs, otherwise the CPU, where nothing can take memory from the training.
    Raises InputError for a device that is not there.
    """
    if not asked:
        taken = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        is_free = world.device.type == "cuda" and torch.cuda.device_count() > taken
        return torch.device("cuda", taken) if is_free else torch.device("cpu")
    if asked == "cpu":
        return torch.device("cpu")
    kind, colon, index = asked.partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise InputError(f"--evaluate-on {asked}: choose cpu, cuda or cuda:N")
    number = int(index) if index else world.device.index or 0
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= found:
        raise InputError(f"--evaluate-on {asked}: {found} CUDA devices are visible here; use --evaluate-on cpu")
    return torch.device("cuda", number)


def alone_on(device: torch.device) -> dict[str, str]:
    """The environment of a new process in which `start_world(device.type)` makes a world of one on this device."""
    place = {"RANK": "0", "LOCAL_RANK": str(device.index or 0), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**os.environ, **place}
