"""A batch is moved and cut as a whole, so that a new field needs no line elsewhere."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from factories import tiny_batch
from megdet.structures import Batch, Targets


@dataclass
class NewTargets(Targets):
    areas: Tensor = field(default_factory=lambda: torch.tensor([[1.0], [2.0], [3.0]]))


@dataclass
class NewBatch(Batch):
    weather: tuple[str, ...] = ("sun", "rain", "fog")
    brightness: Tensor = field(default_factory=lambda: torch.tensor([0.1, 0.2, 0.3]))


def new_batch() -> NewBatch:
    plain = tiny_batch(3)
    targets = NewTargets(plain.targets.boxes, plain.targets.labels, plain.targets.image_seeds)
    return NewBatch(plain.pixels, plain.sizes, targets, plain.image_index, plain.scales)


def test_map_calls_the_function_with_every_tensor_and_leaves_the_rest():
    batch = new_batch()
    doubled = batch.map(lambda tensor: tensor + tensor)
    assert isinstance(doubled, NewBatch)
    assert isinstance(doubled.targets, NewTargets)
    assert len(batch.tensors()) == 8
    for before, after in zip(batch.tensors(), doubled.tensors(), strict=True):
        assert torch.equal(before + before, after)
    assert (doubled.image_index, doubled.weather) == (batch.image_index, batch.weather)


def test_a_slice_has_the_rows_of_its_images_in_every_field():
    batch = new_batch()
    part = batch[1:]
    assert isinstance(part, NewBatch)
    for whole, own in zip(batch.tensors(), part.tensors(), strict=True):
        assert torch.equal(whole[1:], own)
    assert (part.image_index, part.weather) == ((1, 2), ("rain", "fog"))


def test_an_empty_slice_keeps_canvas_and_width():
    part = tiny_batch(2, canvas=32)[0:0]
    assert part.pixels.shape == (0, 3, 32, 32)
    assert part.targets.boxes.shape[1:] == tiny_batch(2).targets.boxes.shape[1:]
    assert part.image_index == ()
