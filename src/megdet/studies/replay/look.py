"""Records a step while it is made: every image's losses, the first layer that is not finite, the batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from megdet.structures import Batch
from megdet.training.run import Run


@dataclass(frozen=True)
class ImageLosses:
    """The losses of an image in a step, before they are divided by the mini-batch."""

    place: tuple[int, int]
    """group of the step, and index in the group"""
    image_id: int | str
    file_name: str
    losses: dict[str, float]

    @property
    def loss(self) -> float:
        """Their sum."""
        return sum(self.losses.values())


@dataclass(frozen=True)
class NotFinite:
    """The first layer of a forward whose output has a value that is not finite."""

    group: int
    layer: str
    """path of the layer in the detector"""
    image_ids: tuple[int | str, ...]
    """the images with such values, if the rows of the output are images; else all images of the micro-batch"""


@dataclass(frozen=True)
class Forward:
    """A forward of the detector: this rank's share of a group."""

    group: int
    """number of the group in the step"""
    places: Sequence[int]
    """indices of its images in the group"""
    batch: Batch
    """the batch as the model got it"""


@dataclass
class Look:
    """The record of a rank's part of a step."""

    images: list[ImageLosses] = field(default_factory=list)
    not_finite: list[NotFinite] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)


@contextmanager
def looking(run: Run, without: int | None = None) -> Iterator[Look]:
    """A context that records the forwards of one step; all of them must be made inside.

    Args:
        run: the run, on every rank.
        without: index in the data set of an image that is taken out of its group.
    """
    model, dataset, seen = run.trainer.model, run.datasets.train, Look()
    groups = iter(run.layout.groups_of(run.world.rank))
    start = run.layout.share_of(run.world.rank).start
    now: list[Forward] = []

    def begin(_module: nn.Module, inputs: tuple[Batch]) -> tuple[Batch]:
        batch = inputs[0]
        rows = [row for row, index in enumerate(batch.image_index) if index != without]
        now[:] = [Forward(next(groups), [start + row for row in rows], rows_of(batch, rows))]
        return (now[0].batch,)

    def check(name: str, output: Any) -> None:
        group, batch = now[0].group, now[0].batch
        if any(own.group == group for own in seen.not_finite):
            return
        for tensor in tensors_of(output):
            is_finite = tensor.isfinite()
            if not is_finite.all():
                rows = list(range(len(batch.image_index)))
                if len(tensor) == len(rows):
                    rows = [row for row in rows if not is_finite[row].all()]
                ids = tuple(dataset.image_ids[batch.image_index[row]] for row in rows)
                seen.not_finite.append(NotFinite(group, name, ids))
                return

    def end(_module: nn.Module, _inputs: tuple[Batch], losses: dict[str, Tensor]) -> None:
        own = now.pop()
        values = {name: losses[name].tolist() for name in model.loss_names}
        for row, index in enumerate(own.batch.image_index):
            of_image = {name: numbers[row] for name, numbers in values.items()}
            place = own.group, own.places[row]
            seen.images.append(ImageLosses(place, dataset.image_ids[index], dataset.file_names[index], of_image))
        seen.forwards.append(replace(own, batch=own.batch.to(torch.device("cpu"))))

    def layer_hook(name: str) -> Any:
        return lambda _module, _inputs, output: check(name, output) if now else None

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    hooks += [own.register_forward_hook(layer_hook(name)) for name, own in model.named_modules() if name]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some images of a batch."""
    if len(rows) == len(batch.image_index):
        return batch
    kept = torch.tensor(rows, dtype=torch.long, device=batch.pixels.device)
    return replace(batch.map(lambda tensor: tensor[kept]), image_index=tuple(batch.image_index[row] for row in rows))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors with rows in the output of a layer."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.dim():
            yield value.detach()
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for own in value:
            yield from tensors_of(own)
    elif hasattr(value, "__dict__"):
        yield from tensors_of(list(vars(value).values()))
