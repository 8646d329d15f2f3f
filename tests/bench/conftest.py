"""What tests of the benchmarks share: the scripts of bench/ as modules, and a small file of results."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script of bench/ by its name, as its neighbours there do."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.fixture
def results() -> dict[str, Any]:
    """Entries of two benchmarks that ran and one that failed; memory/320 took another day."""
    place = {
        "machine": {
            "cpu": {"model": "Some CPU", "cores": 2, "memory_bytes": 24 * 2**30},
            "devices": [],
            "native_bf16": True,
        },
        "versions": {"python": "3.11.7", "torch": "2.15.0+cu132"},
        "git": {"commit": "0123456789", "dirty": True},
    }
    step = {
        "size": 320,
        "batch": 2,
        "precision": "fp32",
        "rounds": 3,
        "processes": "own",
        "seconds": {"torchvision fp32": 3.0, "torchvision channels_last": 2.5, "megdet fp32": 1.25},
        "spread": {
            "torchvision fp32": [2.5, 4.0],
            "torchvision channels_last": [2.0, 3.0],
            "megdet fp32": [1.0, 1.5],
        },
        "ratios": {"torchvision fp32": 1.0, "torchvision channels_last": 1.2, "megdet fp32": 2.4},
        "ratio_spread": {
            "torchvision fp32": [1.0, 1.0],
            "torchvision channels_last": [1.0, 1.5],
            "megdet fp32": [2.0, 3.0],
        },
        "images_per_second": {"torchvision fp32": 2 / 3, "torchvision channels_last": 0.8, "megdet fp32": 1.6},
        "ratio_to_torchvision_best": 2.0,
        "flops": 100e9,
        "limit_flops_per_second": 160e9,
        "fraction_of_limit": 0.5,
    }
    memory = {
        "size": 320,
        "batch": 2,
        "precision": "fp32",
        "mib": {"torchvision": 1000.0, "megdet": 800.0},
        "spread": {"torchvision": [990.0, 1010.0], "megdet": [790.0, 805.0]},
        "ratios": {"torchvision": 1.0, "megdet": 0.8},
    }
    command = "python bench/train_step.py --size 320 --json"
    return {
        "train_step/320-fp32": {"date": "2026-01-02T03:04:05+00:00", "command": command, **place, "result": step},
        "memory/320": {"date": "2026-01-03T03:04:05+00:00", "command": "python m --json", **place, "result": memory},
        "memory/800": {
            "date": "2026-01-02T03:04:05+00:00",
            "command": "python m --json",
            **place,
            "error": "no `m` (1)",
        },
    }
