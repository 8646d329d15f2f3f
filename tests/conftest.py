"""Settings of all tests."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

from megdet import runtime

torch.set_num_threads(1)  # pytest runs two workers; more threads would only wait for each other

settings.register_profile("megdet", deadline=None, derandomize=True)  # a slow machine is no failure of a property
settings.load_profile("megdet")

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
