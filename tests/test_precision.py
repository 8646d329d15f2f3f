"""Each detector computes in the precision of its own recipe, whatever else the process does."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from factories import TINY, tiny_batch, tiny_detector, with_model
from megdet.inference.predict import detect_batch
from megdet.inference.trained import place_model
from megdet.model.detector import Detector
from megdet.precision import arithmetic, dtype_of
from megdet.recipe import Recipe
from megdet.training.step import train_step
from megdet.training.trainer import trainer_of
from small_runs import ALONE

CPU = torch.device("cpu")
RECIPE = with_model(replace(TINY, batch_size=2, bn_size=2), backbone={"name": "test_resnet"})


def tf32() -> tuple[bool, bool]:
    """Whether convolutions and matrix products of float32 use TF32 on a GPU; it can be asked without one."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def placed(recipe: Recipe) -> Detector:
    model = tiny_detector(recipe)
    place_model(model, CPU, recipe.precision)
    return model


def watch(model: Detector) -> list[tuple[str, tuple[bool, bool], bool]]:
    """What holds in each forward and backward of a layer: which of the two, TF32, autocast."""
    seen: list[tuple[str, tuple[bool, bool], bool]] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: seen.append((what, tf32(), torch.is_autocast_enabled("cpu")))

    model.rpn.conv.register_forward_hook(note("forward"))
    if model.training:
        model.rpn.conv.weight.register_hook(note("backward"))
    return seen


def train(model: Detector, recipe: Recipe) -> None:
    model.train()
    trainer = trainer_of(recipe, model, ALONE)
    train_step(trainer, [tiny_batch(2)], range(1), 0.01, 0, ALONE)


def detect(model: Detector, recipe: Recipe) -> None:
    batch = tiny_batch(2)
    detect_batch(model.eval(), batch.pixels, batch.sizes, recipe.precision)


@pytest.mark.parametrize("work", [train, detect])
def test_placing_and_using_another_detector_does_not_change_the_arithmetic_of_the_first(
    work: Callable[[Detector, Recipe], None],
) -> None:
    before = tf32()
    recipes = {name: replace(RECIPE, precision=name) for name in ("tf32", "float32", "bfloat16", "float64")}
    models = {name: placed(recipe) for name, recipe in recipes.items()}
    for precision in ("tf32", "float32", "tf32", "bfloat16", "float64"):
        model = models[precision].train(work is train)
        seen = watch(model)
        work(model, recipes[precision])
        is_tf32 = (precision == "tf32",) * 2
        assert ("forward", is_tf32, precision == "bfloat16") in seen
        assert {flags for _, flags, _ in seen} == {is_tf32}
        if work is train:
            assert ("backward", is_tf32, False) in seen
    assert tf32() == before


def fail_within(precision: str) -> None:
    with arithmetic(precision, CPU):
        raise ValueError("no memory")


def test_a_forward_that_fails_leaves_the_process_as_it_was() -> None:
    before = tf32()
    for precision in ("tf32", "bfloat16", "float32"):
        with pytest.raises(ValueError, match="no memory"):
            fail_within(precision)
        assert tf32() == before
        assert not torch.is_autocast_enabled("cpu")


def test_weights_and_sums_are_in_float32_unless_all_is_in_float64() -> None:
    assert [dtype_of(name) for name in ("float32", "tf32", "bfloat16")] == [torch.float32] * 3
    assert dtype_of("float64") == torch.float64
