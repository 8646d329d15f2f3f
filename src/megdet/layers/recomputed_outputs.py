"""Computes the outputs of batch norms again in the backward instead of keeping them.

A batch norm keeps its input, from which its output follows by one multiplication and one addition a number. So a later
layer need not keep the output or its activation: both are computed again when the backward needs them, which takes
about a hundredth of a step. The numbers are the same to the bit, and no collective is needed.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
"""Activations that may come between a batch norm and the layer that needs its output; all work in place."""

_STATE = threading.local()


class Output:
    """A tensor that can be computed again, and the number of layers that still need it."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute = compute
        self._users = 0
        self._value: Tensor | None = None

    def keep(self) -> "Output":
        """Count one more layer that needs the tensor; returns itself, to be kept instead of the tensor."""
        self._users += 1
        return self

    def get(self) -> Tensor:
        """The tensor; it is freed after the last layer has asked for it."""
        if self._value is None:
            with torch.no_grad():
                self._value = self.compute()
        value = self._value
        self._users -= 1
        if self._users <= 0:
            self._value = None
        return value


class _Latest:
    """The last output that was marked as recomputable, and how to recognise it."""

    def __init__(self, tensor: Tensor, version: int, output: Output) -> None:
        self.tensor = tensor.detach()  # kept alive, so that no other tensor gets its address
        self.version, self.output = version, output

    def matches(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, after the expected number of changes in place."""
        mine = self.tensor
        return (
            tensor.data_ptr() == mine.data_ptr()
            and tensor._version == self.version
            and tensor.shape == mine.shape
            and tensor.stride() == mine.stride()
            and tensor.dtype == mine.dtype
        )


@contextmanager
def recompute_outputs() -> Iterator[None]:
    """A context in which layers do not keep outputs marked as recomputable; recomputed segments keep none anyway."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    _STATE.is_active, _STATE.latest = True, None
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _STATE.is_active, _STATE.latest = False, None


def mark_recomputable(tensor: Tensor, compute: Callable[[], Tensor]) -> None:
    """Register a function that computes a new tensor again, to the bit, from tensors that are kept anyway."""
    if not torch.compiler.is_compiling() and getattr(_STATE, "is_active", False) and tensor.requires_grad:
        _STATE.latest = _Latest(tensor, tensor._version, Output(compute))


def mark_activations(model: nn.Module) -> None:
    """Make the activations of a model mark their outputs when they change a marked tensor in place."""
    for module in model.modules():
        if isinstance(module, ACTIVATIONS):
            module.register_forward_pre_hook(_before_activation)


def _before_activation(activation: nn.Module, arguments: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling() or not getattr(_STATE, "is_active", False):
        return
    latest: _Latest | None = _STATE.latest
    if latest is not None and activation.inplace and latest.matches(arguments[0]):
        before = latest.output.compute
        # before the activation runs, because it saves its own output for the backward
        _STATE.latest = _Latest(arguments[0], latest.version + 1, Output(lambda: activation(before())))


def _pack(tensor: Tensor) -> Tensor | Output:
    latest: _Latest | None = getattr(_STATE, "latest", None)
    if latest is not None and latest.matches(tensor):
        return latest.output.keep()
    return tensor.detach()  # with its history tensor and graph would keep each other alive


def _unpack(kept: Tensor | Output) -> Tensor:
    return kept.get() if isinstance(kept, Output) else kept
