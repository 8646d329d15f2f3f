"""Evaluation mode for a time, also where several threads detect and somebody else trains the model between them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass
class _Evaluated:
    trained: list[nn.Module]
    inside: int = 0


_LOCK = threading.Lock()
_EVALUATED: dict[nn.Module, _Evaluated] = {}
"""The models that are in evaluation mode for a time, and by how many."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside it, every module is in evaluation mode; somebody else's loop may train them between two detections.

    Of several threads the first notes which modules train, and the last to leave lets them train again.
    """
    with _LOCK:
        own = _EVALUATED.setdefault(model, _Evaluated([module for module in model.modules() if module.training]))
        own.inside += 1
    try:
        with _LOCK:
            model.eval()
        yield
    finally:
        with _LOCK:
            own.inside -= 1
            if not own.inside:
                del _EVALUATED[model]
                for module in own.trained:
                    module.training = True
