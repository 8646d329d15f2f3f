"""The surroundings of a process that is alone on a device."""

import os

import torch


def alone_on(device: torch.device) -> dict[str, str]:
    """The environment of a new process in which `start_world(device.type)` makes a world of one on this device."""
    place = {"RANK": "0", "LOCAL_RANK": str(device.index or 0), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**os.environ, **place}
