"""Trainings that diverge on purpose."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megdet.training import run as run_module
from megdet.training.trainer import Trainer


@contextmanager
def losses_times(trainer: Trainer, factor: float) -> Iterator[None]:
    """Every loss, and so the gradient, is multiplied."""
    handle = trainer.model.register_forward_hook(
        lambda _module, _inputs, losses: {
            name: own * factor if name in trainer.model.loss_names else own for name, own in losses.items()
        }
    )
    yield
    handle.remove()


def diverge_at(steps: list[int], factor: float, patch: Any) -> None:
    """Let each of these steps, numbered from 1, diverge the first time that this process makes it."""
    make = run_module.train_step

    def diverging(*arguments: Any) -> Any:
        diverges = arguments[4] + 1 in steps
        if diverges:
            steps.remove(arguments[4] + 1)
        with losses_times(arguments[0], factor if diverges else 1.0):
            return make(*arguments)

    patch.setattr(run_module, "train_step", diverging)
