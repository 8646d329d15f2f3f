"""MegDet: a trainer for object detectors with large mini-batches.

You choose the mini-batch and the BN size, counted in images; MegDet fits them to whatever devices you have, and the
result does not depend on the devices. After Peng et al., "MegDet: A Large Mini-Batch Object Detector", CVPR 2018.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megdet.api import (
        Detections,
        InputError,
        LoadedDetector,
        ModuleRates,
        PlanSampler,
        TorchvisionLoop,
        TrainedRun,
        evaluate,
        load,
        module_groups,
        scaled_learning_rate,
        train,
    )

__all__ = [
    "Detections",
    "InputError",
    "LoadedDetector",
    "ModuleRates",
    "PlanSampler",
    "TorchvisionLoop",
    "TrainedRun",
    "evaluate",
    "load",
    "module_groups",
    "scaled_learning_rate",
    "train",
]
__version__ = "0.1.0"
ARITHMETIC = 2
"""Rises with every change that rounds a number of a run otherwise, on some machine. Ledgers note it."""

SPIN_COUNT = 3000
"""Number of times a waiting OpenMP thread polls before it gives up its core (GNU's OpenMP).

OpenMP's default, 300,000, suits a machine that nobody else uses: with it, two trainings on the same cores spend most of
their time in waiting threads (`bench/busy_machine.py`). OpenMP reads the number when torch is loaded; child processes
inherit it.
"""

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def __getattr__(name: str) -> Any:
    """The names of `megdet.api`, loaded when one is used: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'megdet' has no attribute '{name}'")
    from importlib import import_module

    from megdet.program import loading

    with loading():
        return getattr(import_module("megdet.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
