"""Settings of all tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from megdet import runtime

torch.set_num_threads(1)  # pytest runs several workers; more threads would only wait for each other

settings.register_profile("megdet", deadline=None, derandomize=True)  # a slow machine is no failure of a property
settings.load_profile("megdet")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither find nor leave anything in the user's cache; matplotlib keeps its list of fonts there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        if "MPLCONFIGDIR" not in os.environ:
            patch.setenv("MPLCONFIGDIR", str(cache / "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


Pretend = Callable[..., list[torch.dtype]]


@pytest.fixture
def pretend_speeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Let a convolution or product take these seconds; returns the formats in the order in which they are timed."""

    def pretend(float32: float, bfloat16: float) -> list[torch.dtype]:
        order: list[torch.dtype] = []

        def seconds(run: Callable[[], torch.Tensor], device: torch.device) -> float:
            order.append(run().dtype)
            return float32 if order[-1] == torch.float32 else bfloat16

        monkeypatch.setattr(runtime, "_seconds", seconds)
        runtime.measure_speeds.cache_clear()
        return order

    yield pretend
    runtime.measure_speeds.cache_clear()
