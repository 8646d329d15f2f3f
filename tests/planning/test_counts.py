"""The stored counts against the detector's own modules, and what published numbers make of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from factories import with_model
from megdet.errors import InputError
from megdet.model.choice import make_detector
from megdet.planning.canvases import largest_pixels, mean_pixels
from megdet.planning.counting import RECIPES, count, exchange_of, meta_detector
from megdet.planning.counts import TILE, Variant, detector_counts
from megdet.planning.published import TITAN_XP, machine_of, published_cost
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.json"
COUNTS = detector_counts("trained")
TILES = mean_pixels() / TILE**2


@pytest.mark.parametrize("variant", RECIPES)
def test_the_stored_counts_are_those_of_the_detector(variant: Variant) -> None:
    assert count(load_recipe(RECIPES[variant])) == detector_counts(variant), "run python -m megdet.planning.counting"


def test_the_detector_on_the_meta_device_is_the_real_one() -> None:
    real, meta = make_detector(Recipe(), 80), meta_detector(Recipe(), 80)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert [p.shape for p in meta.parameters()] == [p.shape for p in real.parameters()]
    assert exchange_of(meta) == exchange_of(real)
    assert COUNTS.exchange.gradient_bytes == 4 * sum(parameter.numel() for parameter in real.parameters())
    assert len(COUNTS.exchange.norm_channels) == 53
    double = meta_detector(replace(Recipe(), precision="float64"), 80)
    assert exchange_of(double).gradient_bytes == 2 * COUNTS.exchange.gradient_bytes
    assert next(double.parameters()).dtype == torch.float64


def test_weights_that_a_recipe_names_are_not_read() -> None:
    recipe = Recipe()
    named = with_model(recipe, backbone={"weights": "nowhere.pth"})
    assert exchange_of(meta_detector(named, 80)) == COUNTS.exchange


def test_resnet50_has_the_published_multiply_adds() -> None:
    """4.1 billion at 224 x 224, with the stride in the 3 x 3 convolutions, less 2 million of the classifier."""
    assert COUNTS.backbone / 2 * (224 / TILE) ** 2 == pytest.approx(4.09e9, rel=0.003)


def test_the_counted_work_is_what_the_benchmark_counted_while_it_ran() -> None:
    measured = json.loads(BENCHMARKS.read_text())["results"]["train_step/800-fp32"]["result"]["flops"]
    tile = COUNTS.backbone + COUNTS.pyramid + COUNTS.rpn + COUNTS.backward
    assert tile * (800 / TILE) ** 2 + 3 * COUNTS.box_head == pytest.approx(measured, rel=0.02)


def test_frozen_stages_have_a_forward_alone_and_keep_less() -> None:
    frozen = detector_counts("frozen")
    assert (frozen.backbone, frozen.normed) == (COUNTS.backbone, COUNTS.normed)
    assert frozen.backward < COUNTS.backward
    assert frozen.normed_backward < COUNTS.normed_backward
    assert frozen.kept < COUNTS.kept
    assert frozen.exchange.norm_channels == ()
    assert load_recipe(RECIPES["frozen"]).bn_size == 0


def test_what_is_kept_is_two_values_of_each_norm_and_three_of_each_of_the_pyramid() -> None:
    pyramid = 256 * sum((TILE // stride) ** 2 for stride in (4, 8, 16, 32, 64))
    assert COUNTS.kept == 2 * COUNTS.normed + 3 * pyramid
    # C2 leaves the frozen stages for the pyramid
    frozen = detector_counts("frozen")
    assert frozen.kept == 2 * frozen.normed_backward + 256 * (TILE // 4) ** 2 + 3 * pyramid


def test_the_arithmetic_of_an_image_by_hand() -> None:
    machine = replace(TITAN_XP, speed=replace(TITAN_XP.speed, fraction=0.5), memory_bandwidth=1e30)
    forward = TILES * (COUNTS.backbone + COUNTS.pyramid + COUNTS.rpn) + COUNTS.box_head
    backward = TILES * COUNTS.backward + 2 * COUNTS.box_head
    cost = published_cost(machine, "trained", 1)
    assert cost.backward_seconds == pytest.approx(backward / (0.5 * 12.15e12))
    assert cost.image_seconds == pytest.approx((forward + backward) / (0.5 * 12.15e12))
    dense = published_cost(machine, "trained", 1, is_sparse_rpn=False)
    assert dense.backward_seconds == pytest.approx((backward + TILES * 2 * COUNTS.rpn) / (0.5 * 12.15e12))
    again = published_cost(machine, "trained", 1, recompute="backbone")
    assert again.backward_seconds == pytest.approx((backward + TILES * COUNTS.backbone) / (0.5 * 12.15e12))


def test_norm_layers_read_and_write_memory_by_hand() -> None:
    machine = replace(TITAN_XP, arithmetic=1e40)
    frozen = detector_counts("frozen")
    seconds = TILES * 4 / 547.7e9
    trained = published_cost(machine, "trained", 1).image_seconds
    assert trained == pytest.approx((4 + 5) * COUNTS.normed * seconds)
    without = published_cost(machine, "frozen", 1).image_seconds
    assert without == pytest.approx((2 * frozen.normed + 2 * frozen.normed_backward) * seconds)
    again = published_cost(machine, "trained", 1, recompute="norms").image_seconds
    assert again == pytest.approx(trained + 2 * COUNTS.normed * seconds)


def test_memory_and_loading_by_hand() -> None:
    cost = published_cost(TITAN_XP, "trained", 4)
    assert cost.fixed_bytes == 3 * COUNTS.exchange.gradient_bytes  # weights, gradients, momentum
    assert cost.image_bytes == pytest.approx(4 * COUNTS.kept * largest_pixels() / TILE**2)
    assert cost.load_seconds == pytest.approx(4 / (16 * 130))  # four devices share 16 cores
    assert published_cost(TITAN_XP, "trained", 64).load_seconds == pytest.approx(8 / (16 * 130))


def test_an_unknown_device_is_named_with_the_nearest_known_one() -> None:
    assert machine_of("b200").device == "B200"
    with pytest.raises(InputError, match="h20'; did you mean 'h200'"):
        machine_of("h20")
