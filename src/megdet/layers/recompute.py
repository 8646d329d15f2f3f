"""Sublinear memory (Chen et al., 2016): compute part of the forward again in the backward instead of keeping it.

A recomputed forward has the same batch statistics as the first. In a lane of several ranks it reads them from a tape
that the first forward wrote, so there is no second collective; in a lane of one rank it computes them again, to the
bit. The running statistics are updated once. torch's checkpointing alone would update them twice (pytorch issue 96136).
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_ACTIVE = threading.local()  # on a GPU the backward, and the second forward in it, run in another thread


class Tape:
    """The statistics that the norm layers of one segment computed, in the order of their calls."""

    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._position: int | None = None  # None while recording

    @property
    def is_replayed(self) -> bool:
        """Whether this is the second forward."""
        return self._position is not None

    def record(self, entry: Any) -> None:
        """Add the statistics of a layer, in the first forward."""
        self._entries.append(entry)

    def next(self) -> Any:
        """The statistics of the same layer in the first forward."""
        assert self._position is not None
        entry = self._entries[self._position]
        self._position += 1
        return entry

    def start(self, *, is_replayed: bool) -> None:
        """Begin the first forward, or a later one, in this thread."""
        self._position = 0 if is_replayed else None
        _ACTIVE.tape = self


class _Forward:
    """The context of one forward of a segment; a second backward through the same graph enters it again."""

    def __init__(self, tape: Tape, *, is_replayed: bool) -> None:
        self.tape, self.is_replayed = tape, is_replayed

    def __enter__(self) -> None:
        self.tape.start(is_replayed=self.is_replayed)

    def __exit__(self, *_error: object) -> None:
        _ACTIVE.tape = None


def current_tape() -> Tape | None:
    """The tape of the segment whose forward is running in this thread, if any."""
    return getattr(_ACTIVE, "tape", None)


def recompute(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)`; only arguments and result are kept, and the backward computes the rest again.

    Inside another recomputed function, or without gradients, it is a plain call.
    """
    if current_tape() is not None or not torch.is_grad_enabled():
        return function(*arguments)
    tape = Tape()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _Forward(tape, is_replayed=False), _Forward(tape, is_replayed=True)

    # no layer draws random numbers, so the state of the generator is not kept
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)` and keep everything: the recompute plan `none`."""
    return function(*arguments)


class RecomputedBlocks(nn.Sequential):
    """A sequence of blocks, cut into segments that the backward computes again; its state dict is unchanged.

    Without segments nothing is recomputed.
    """

    def __init__(self, blocks: nn.Sequential, segments: Sequence[range]) -> None:
        super().__init__()
        for name, block in blocks.named_children():
            self.add_module(name, block)
        self.segments = tuple(segments)

    def forward(self, x: Any) -> Any:
        """Run the segments one after another."""
        blocks = list(self)
        if not self.segments:
            return _in_turn(blocks, x)
        for segment in self.segments:
            x = recompute(_in_turn, [blocks[i] for i in segment], x)
        return x


def _in_turn(blocks: Sequence[nn.Module], x: Any) -> Any:
    for block in blocks:
        x = block(x)
    return x


def sublinear_segments(inside: Sequence[int], kept: Sequence[int], ends: Sequence[int]) -> list[range]:
    """Cut blocks into segments for the least memory: the outputs kept between them plus the largest segment.

    Args:
        inside: bytes that each block's backward needs, its input included.
        kept: bytes of each block's output, which is kept if a segment ends there.
        ends: counts of blocks after which a segment must end, such as at the end of a stage.

    The search of Chen et al. (2016), Algorithm 3: fill segments up to a budget, for every budget that could matter.
    """
    must_end = {*ends, len(inside)}

    def cut(budget: int) -> list[range]:
        segments, start, filled = [], 0, 0
        for i, size in enumerate(inside):
            if i > start and (filled + size > budget or i in must_end):
                segments.append(range(start, i))
                start, filled = i, 0
            filled += size
        return [*segments, range(start, len(inside))]

    def cost(segments: list[range]) -> int:
        return sum(kept[segment[-1]] for segment in segments) + max(
            sum(inside[i] for i in segment) for segment in segments
        )

    sums = {sum(inside[i:j]) for i in range(len(inside)) for j in range(i + 1, len(inside) + 1)}
    return min((cut(budget) for budget in sorted(sums)), key=cost)


def saved_bytes(function: Callable[[], Any], parameters: Sequence[Tensor] = ()) -> int:
    """Bytes that `function()` keeps for its backward, each storage once, without the parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}
    alive = []  # so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(function())
    return sum(sizes.values())
