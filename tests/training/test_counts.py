"""What a step costs besides arithmetic, counted: operators that make the host wait, and operators for each image."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from factories import TINY, tiny_batch, tiny_detector
from megdet.distributed.world import World
from megdet.ops import nms
from megdet.recipe import Optimizer, Recipe, Schedule
from megdet.training.step import train_step
from megdet.training.trainer import trainer_of

ALONE = World(0, 1, torch.device("cpu"))
WAITING = {
    *("nonzero", "_local_scalar_dense", "is_nonzero", "unique_consecutive", "_unique2", "unique_dim", "equal"),
    *("masked_select", "item", "nonzero_numpy", "repeat_interleave", "bincount", "histc"),
}
"""Operators whose result, or its size, depends on what is in a tensor."""


READS = {getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__")}
"""Methods that hand numbers to the host, some of them past the dispatcher."""


class Reads(TorchFunctionMode):
    """Counts READS."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Counted(TorchDispatchMode):
    """Counts operators, and those that would make a host wait for a GPU; all of an NMS is one function."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self.is_inside_nms = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_inside_nms:
            name = function._schema.name.split("::")[1]
            self.operators[name] += 1
            if name in WAITING and not (name == "repeat_interleave" and function._overloadname == "self_int"):
                self.waiting[name] += 1
            indices = args[1] if name in ("index", "index_put_", "index_put") else ()
            if any(index is not None and index.dtype == torch.bool for index in indices):
                self.waiting[f"{name} by mask"] += 1
        return function(*args, **(kwargs or {}))


AGVM = Optimizer(agvm=True)
SINCE_THE_SECOND = Schedule(warmup_steps=1)
RECIPES = {
    "sgd": TINY,
    "lars": replace(TINY, optimizer=Optimizer(kind="lars")),
    "lamb": replace(TINY, optimizer=Optimizer(kind="lamb")),
    "agvm": replace(TINY, optimizer=AGVM, schedule=SINCE_THE_SECOND, noise_interval=2),
    "agvm-adamw": replace(TINY, optimizer=replace(AGVM, kind="adamw"), schedule=SINCE_THE_SECOND),
    "noise of steps": replace(TINY, bn_size=4, noise_interval=2),
}
"""The second step measures what there is to measure."""


def counted_step(images: int, monkeypatch: pytest.MonkeyPatch, recipe: Recipe = TINY) -> tuple[Counted, int]:
    """The counts of a whole training step, and how often it called the NMS."""
    trainer = trainer_of(recipe, tiny_detector(recipe).train(), ALONE)
    counted, reads, calls = Counted(), Reads(), 0
    original = nms.segmented_nms

    def one_function(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        counted.is_inside_nms, before = True, list(reads.names)
        kept = original(*arguments)
        counted.is_inside_nms, reads.names = False, before
        return kept

    monkeypatch.setattr("megdet.model.rpn.segmented_nms", one_function)
    batches, groups = [tiny_batch(images)], range(1)
    if recipe.optimizer.agvm:
        batches, groups = batches * 2, range(2)
    train_step(trainer, batches, groups, 0.01, 0, ALONE)  # constants are made in the first step
    calls, counted.operators, counted.waiting = 0, Counter(), Counter()
    with counted, reads:
        result = train_step(trainer, batches, groups, 0.01, 1, ALONE)
    assert (result.agvm is not None) == recipe.optimizer.agvm
    assert (result.noise is not None) == bool(recipe.noise_interval)
    counted.waiting.update(reads.names)
    return counted, calls


def test_a_step_waits_for_nothing_but_one_nms_however_many_images_it_has(monkeypatch):
    for images in (2, 8):
        counted, calls = counted_step(images, monkeypatch)
        assert calls == 1
        assert counted.waiting == Counter()


@pytest.mark.parametrize("name", RECIPES)
def test_no_optimizer_and_nothing_that_is_measured_waits_either(name, monkeypatch):
    counted, calls = counted_step(2, monkeypatch, RECIPES[name])
    assert calls == 1 + RECIPES[name].optimizer.agvm
    assert counted.waiting == Counter()


def test_the_operators_of_a_step_do_not_grow_with_its_images(monkeypatch):
    few, many = (counted_step(images, monkeypatch)[0].operators for images in (2, 16))
    assert many == few


def test_the_count_sees_what_waits():
    with Counted() as counted, Reads() as reads:
        x = torch.arange(4.0)
        x[x > 1]
        x.nonzero()
        bool(x.sum() > 1)
        torch.unique(x)
        x.tolist()
    assert {"index by mask", "nonzero", "_local_scalar_dense", "_unique2"} <= set(counted.waiting)
    assert reads.names[-1] == "tolist"
