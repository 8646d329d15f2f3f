"""Computes the outputs of batch norms and of residual sums again in the backward instead of keeping them.

A batch norm keeps its input, from which its output follows by one multiplication and one addition a number. So a later
layer need not keep the output or its activation: both are computed again when the backward needs them, which takes
about a hundredth of a step. The numbers are the same to the bit, and no collective is needed.

The same holds where a block adds its input, or a batch norm of it, to the output of its last batch norm and activates
the sum. After `LONGEST_CHAIN` such blocks in a row the next one keeps its sum, from which the ones after it follow.

Batch norms on a GPU mark nothing, unless their lane has several ranks or they compute images apart. A tensor that was
changed without gradients is kept, but a change through its `data`, which leaves no trace, is not seen.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megdet.layers.recompute import current_tape

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
"""Activations that may come between a batch norm and the layer that needs its output; all work in place."""
LONGEST_CHAIN = 2
"""How many sums in a row may be computed one from the other."""

_STATE = threading.local()


class Output:
    """A tensor that can be computed again, and the number of layers that still need it."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute = compute  # a new tensor each time
        self._users = 0
        self._value: Tensor | None = None
        self._held: Callable[[], Tensor | None] = lambda: None

    def keep(self) -> "Output":
        """Count one more layer that needs the tensor; returns itself, to be kept instead of the tensor."""
        self._users += 1
        return self

    def get(self) -> Tensor:
        """The tensor; it is freed after the last layer has asked for it."""
        if self._value is None:
            with torch.no_grad():
                self._value = self.value()
        value = self._value
        self._users -= 1
        if self._users <= 0:
            self._value = None
        return value

    def hold(self, tensor: Tensor) -> None:
        """Take the tensor itself, as long as others keep it, instead of computing it."""
        self._held = weakref.ref(tensor)

    def value(self) -> Tensor:
        """The tensor, which must not be changed."""
        held = self._held()
        return self.compute() if held is None else held.detach()


class _Source(NamedTuple):
    """Where a tensor of the graph comes from in the backward: an output that is computed again, or itself, kept."""

    found: Output | Tensor
    version: int
    """changes in place until it was remembered"""
    counter: Tensor
    """an empty tensor with its count of changes in place, which holds none of its memory"""
    layout: tuple[Any, ...]
    """shape, strides and type"""
    chain: int
    """sums that are computed one from another to find it"""

    def changes(self) -> int:
        """How often it has been changed in place since then."""
        return self.counter._version - self.version

    def value(self) -> Tensor:
        """The tensor, which must not be changed."""
        return self.found.value() if isinstance(self.found, Output) else self.found


class _Latest:
    """The last output that was marked as recomputable, and how to recognise it."""

    def __init__(self, tensor: Tensor, version: int, output: Output, chain: int = 0) -> None:
        self.tensor = tensor.detach()  # kept alive, so that no other tensor gets its address
        self.version, self.output, self.chain = version, output, chain

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
    _STATE.is_active, _STATE.latest, _STATE.sources = True, None, {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _STATE.is_active, _STATE.latest, _STATE.sources = False, None, {}


def mark_recomputable(tensor: Tensor, compute: Callable[[], Tensor]) -> None:
    """Register a function that computes a new tensor again, to the bit, from tensors that are kept anyway."""
    if _is_active() and tensor.requires_grad:
        _STATE.latest = latest = _Latest(tensor, tensor._version, Output(compute))
        _remember(tensor, latest.output, latest.chain)


def mark_activations(model: nn.Module) -> None:
    """Make the activations of a model mark their outputs when they change a marked tensor, or a sum, in place."""
    for module in model.modules():
        if isinstance(module, ACTIVATIONS):
            module.register_forward_pre_hook(_before_activation)


def hold(tensors: Iterable[Tensor]) -> None:
    """Do not compute these tensors again while others keep them: the features that other parts read."""
    if _is_active():
        for tensor in tensors:
            source = _STATE.sources.get(_place(tensor))
            if source is not None and isinstance(source.found, Output):
                source.found.hold(tensor)


def _is_active() -> bool:
    return not torch.compiler.is_compiling() and getattr(_STATE, "is_active", False)


def _before_activation(activation: nn.Module, arguments: tuple[Any, ...]) -> None:
    if not _is_active() or not activation.inplace:
        return
    x: Tensor = arguments[0]
    latest: _Latest | None = _STATE.latest
    if latest is not None and latest.matches(x):
        before, chain = latest.output.compute, latest.chain
    elif (found := _recomputable_sum(x)) is not None:
        before, chain = found
    else:
        return
    # before the activation runs, because it saves its own output for the backward
    _STATE.latest = _Latest(x, x._version + 1, Output(lambda: activation(before())), chain)


def _recomputable_sum(total: Tensor) -> tuple[Callable[[], Tensor], int] | None:
    """How to compute a sum of two known tensors again, and the length of its chain; None if it is to be kept."""
    node: Any = total.grad_fn  # what each kind of node has saved is in no type
    if node is None or node.name() != "AddBackward0" or node._saved_alpha != 1:
        return None
    parts: list[_Source | None] = [_STATE.sources.get(place) for place in node.next_functions]
    known = [part for part in parts if part is not None and part.layout == _layout(total)]
    if len(known) < 2:
        return None
    # the sum is new and unchanged, or the first of them with one change in place, the addition
    changes = [part.changes() for part in known]
    is_new = total._version == 0 and changes == [0, 0]
    if not is_new and (changes != [1, 0] or total._version != known[0].version + 1):
        return None
    first, second = sorted(known, key=lambda part: isinstance(part.found, Tensor))
    chain = 1 + first.chain + second.chain
    if chain > LONGEST_CHAIN or isinstance(first.found, Tensor):
        return None
    compute = first.found.compute
    return lambda: compute().add_(second.value()), chain


def _place(tensor: Tensor) -> tuple[Any, int]:
    """A tensor's place in the graph, as `next_functions` has it; a change in place with gradients gives it another."""
    return tensor.grad_fn, tensor.output_nr


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _remember(tensor: Tensor, found: Output | Tensor, chain: int = 0) -> None:
    """Let sums find the tensor. In a segment that is computed again this would keep what is to be freed."""
    if tensor.grad_fn is not None and current_tape() is None:
        counter = tensor.detach()
        counter.data = counter.new_empty(0)
        _STATE.sources[_place(tensor)] = _Source(found, tensor._version, counter, _layout(tensor), chain)


def _pack(tensor: Tensor) -> Tensor | Output:
    if not _is_active():
        return tensor.detach()
    source: _Source | None = _STATE.sources.get(_place(tensor)) if tensor.grad_fn is not None else None
    if source is not None and isinstance(source.found, Output) and source.version == tensor._version:
        return source.found.keep()
    latest: _Latest | None = _STATE.latest
    if latest is not None and latest.matches(tensor):
        _remember(tensor, latest.output, latest.chain)
        return latest.output.keep()
    kept = tensor.detach()  # with its history tensor and graph would keep each other alive
    _remember(tensor, kept)
    return kept


def _unpack(kept: Tensor | Output) -> Tensor:
    return kept.get() if isinstance(kept, Output) else kept
