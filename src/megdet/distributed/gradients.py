"""Gradients summed over all ranks once a step, in fixed buckets, while the last backward still runs.

DistributedDataParallel rebuilds its buckets after its first step, so a new process would add numbers in another order
than the old one did. Here the layout follows from the parameters alone and never changes. Nothing is allocated early:
gradients stay where autograd makes them, and a bucket is filled when it is sent.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from megdet.distributed.world import World

BUCKET_BYTES = 16 << 20
"""Bytes of gradients that the ranks add up in one collective."""
_ALIGNED = 64
"""A gradient starts in its bucket at a multiple of so many numbers: GPU kernels read aligned vectors faster."""


class GradientBuckets:
    """The gradients of some parameters, the last layers' first, since they are ready first.

    Use: `zero()`, any number of backwards, `overlap()` before the last of them, `finish()` after it. A rank without a
    backward calls `finish()` all the same. Afterwards every `parameter.grad` is the sum over all ranks, zeros where no
    rank had one.

    For the gradients of two parts of a step, call `set_aside()` between them. It sends and returns the gradients of the
    first part; they may travel while the second part runs, and are sums over all ranks after `finish()`.

    A rank that must repeat its backwards calls `begin_again()`; buckets already sent are right and are not sent again.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.world = world
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad][::-1]
        self.buckets: list[list[nn.Parameter]] = []
        bucket: list[nn.Parameter] = []
        for parameter in self.parameters:
            bucket.append(parameter)
            if sum(p.numel() * p.element_size() for p in bucket) >= bucket_bytes:
                self.buckets.append(bucket)
                bucket = []
        if bucket:
            self.buckets.append(bucket)
        self._bucket_of = {parameter: number for number, own in enumerate(self.buckets) for parameter in own}
        self._waiting: list[int] = []
        self._launched = 0
        self._works: list[distributed.Work] = []
        self._sent: list[tuple[nn.Parameter, Tensor]] = []
        if world.size > 1:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    @property
    def gradients(self) -> list[Tensor]:
        """The gradient of each of `parameters` that has one."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def zero(self) -> None:
        """Start a step: forget all gradients and free their memory."""
        for parameter in self.parameters:
            parameter.grad = None
        self._waiting, self._launched, self._works, self._sent = [], 0, [], []

    def overlap(self) -> None:
        """From now on send a bucket as soon as all its gradients are ready and all earlier buckets are sent."""
        self._waiting = [len(bucket) for bucket in self.buckets]

    def begin_again(self) -> None:
        """Drop the gradients since `zero` or `set_aside`; buckets already sent stay sent."""
        for parameter in self.parameters:
            parameter.grad = None
        self._waiting = []

    def set_aside(self) -> list[Tensor]:
        """Send the remaining buckets and start a second part; returns the first part's gradients, as `parameters`."""
        self._send_rest()
        gradients, works = self.gradients, self._works
        self.zero()
        self._works = works
        return gradients

    def finish(self) -> None:
        """Send the remaining buckets and wait for all sums."""
        self._send_rest()
        for work in self._works:
            work.wait()
        self._waiting = []

    def _send_rest(self) -> None:
        if self.world.size == 1:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return
        while self._launched < len(self.buckets):
            self._launch()
        for parameter, view in self._sent:  # a repeated backward has set another tensor
            parameter.grad = view

    def norm(self) -> Tensor:
        """The Euclidean norm of the whole gradient."""
        return nn.utils.get_total_norm(self.gradients)

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients."""
        torch._foreach_mul_(self.gradients, factor)

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self._waiting:
            return
        self._waiting[self._bucket_of[parameter]] -= 1
        while self._launched < len(self.buckets) and self._waiting[self._launched] == 0:
            self._launch()

    @torch.no_grad()
    def _launch(self) -> None:
        """Copy the gradients of the next bucket into one flat tensor, make them views of it, and send it."""
        bucket = self.buckets[self._launched]
        flat = bucket[0].new_zeros(sum(_room(parameter) for parameter in bucket))
        start = 0
        for parameter in bucket:
            view = flat.as_strided(parameter.shape, parameter.stride(), start)
            if parameter.grad is not None:
                view.copy_(parameter.grad)
            parameter.grad = view
            self._sent.append((parameter, view))
            start += _room(parameter)
        work = distributed.all_reduce(flat, async_op=True)
        if work is not None:
            self._works.append(work)
        self._launched += 1


def _room(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() // _ALIGNED) * _ALIGNED
