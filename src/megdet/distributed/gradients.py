"""Gradients in fixed buckets, summed over all ranks once a step while the last backward still runs.

DistributedDataParallel rebuilds its buckets after its first step, so a new process would add numbers in another order
than the old one did. Here the layout follows from the parameters alone and never changes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from megdet.distributed.world import World

BUCKET_BYTES = 16 << 20


class GradientBuckets:
    """The gradients of some parameters as views of a few flat tensors.

    Use: `zero()`, any number of backwards, `overlap()` before the last of them, `finish()` after it. A rank without a
    backward calls `finish()` all the same. Afterwards every `parameter.grad` is the sum over all ranks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.world = world
        # the last layers' gradients are ready first
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad][::-1]
        self.flats: list[Tensor] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._sizes: list[int] = []
        bucket: list[nn.Parameter] = []
        for parameter in self.parameters:
            bucket.append(parameter)
            if sum(p.numel() * p.element_size() for p in bucket) >= bucket_bytes:
                self._close(bucket)
                bucket = []
        if bucket:
            self._close(bucket)
        self._waiting: list[int] = []
        self._launched = 0
        self._works: list[distributed.Work] = []
        if world.size > 1:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def zero(self) -> None:
        """Start a step."""
        for flat in self.flats:
            flat.zero_()
        self._waiting, self._launched, self._works = [], 0, []

    def overlap(self) -> None:
        """From now on a bucket is sent as soon as all its gradients and all earlier buckets are there."""
        self._waiting = list(self._sizes)

    def finish(self) -> None:
        """Send what is left and wait for all sums."""
        if self.world.size == 1:
            return
        while self._launched < len(self.flats):
            self._launch()
        for work in self._works:
            work.wait()
        self._waiting = []

    def norm(self) -> Tensor:
        """The Euclidean norm of the whole gradient."""
        return torch.stack([flat.dot(flat) for flat in self.flats]).sum().sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients."""
        for flat in self.flats:
            flat *= factor

    def _close(self, bucket: list[nn.Parameter]) -> None:
        flat = bucket[0].new_zeros(sum(parameter.numel() for parameter in bucket))
        start = 0
        for parameter in bucket:
            view = flat[start : start + parameter.numel()]
            parameter.grad = view.as_strided(parameter.shape, parameter.stride(), view.storage_offset())
            self._bucket_of[parameter] = len(self.flats)
            start += parameter.numel()
        self.flats.append(flat)
        self._sizes.append(len(bucket))

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self._waiting:
            return
        self._waiting[self._bucket_of[parameter]] -= 1
        while self._launched < len(self.flats) and self._waiting[self._launched] == 0:
            self._launch()

    def _launch(self) -> None:
        work = distributed.all_reduce(self.flats[self._launched], async_op=True)
        if work is not None:
            self._works.append(work)
        self._launched += 1
