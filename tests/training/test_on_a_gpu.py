"""What only a GPU can show: a step that waits for nothing, the CPU's numbers, and a resume to the bit."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from factories import TINY, gradients, random_boxes, relative, reported_by, tiny_batch, tiny_detector, with_model
from megdet.data.loader import training_batches
from megdet.data.plan import TrainingPlan
from megdet.distributed.lane import SINGLE_LANE
from megdet.distributed.layout import choose_layout
from megdet.distributed.world import World, start_world
from megdet.inference.trained import place_model
from megdet.layers.cross_device import CrossDeviceNorm, lane_moments
from megdet.model.anchors import LEVEL_STRIDES
from megdet.model.faster_rcnn import FasterRcnn
from megdet.ops.roi_align import feature_table, roi_align
from megdet.recipe import Optimizer, Recipe, Schedule
from megdet.run_folder.folder import RunFolder
from megdet.training.loop import train
from megdet.training.run import RunOptions, open_run
from megdet.training.step import train_step
from megdet.training.trainer import Trainer, trainer_of
from small_runs import small_recipe, train_set, write_small_set

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RECIPE = with_model(TINY, backbone={"name": "test_resnet"})


@pytest.fixture
def world() -> World:
    return start_world("cuda")


@contextmanager
def no_waiting() -> Iterator[None]:
    """An operator for whose end on the GPU the host would wait raises RuntimeError."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its watch a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tiny_trainer(recipe: Recipe, world: World) -> Trainer:
    model = tiny_detector(recipe).train()
    place_model(model, world.device, recipe.precision)
    return trainer_of(recipe, model, world)


def test_the_watch_sees_who_waits(world):
    x = torch.ones(3, device=world.device)
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_step_waits_for_nothing_even_on_a_canvas_that_is_new(precision, world):
    recipe = replace(RECIPE, batch_size=2, precision=precision, optimizer=replace(RECIPE.optimizer, clip_norm=5.0))
    trainer = tiny_trainer(recipe, world)
    batches = [tiny_batch(2, canvas).pin_memory() for canvas in (64, 64, 96)]
    train_step(trainer, [batches[0].to(world.device)], range(1), 0.01, 0, world)  # makes kernels and momentum
    for number, batch in enumerate(batches[1:], start=1):
        with no_waiting():
            result = train_step(trainer, [batch.to(world.device)], range(1), 0.01, number, world)
        assert reported_by(result).isfinite().all()


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer(agvm=True),
        Optimizer(kind="adamw", agvm=True, base_lr=1e-4),
        Optimizer(kind="lars"),
        Optimizer(kind="lamb", base_lr=1e-3),
    ],
    ids=lambda own: own.kind,
)
def test_no_optimizer_and_nothing_that_is_measured_waits_or_differs_from_the_cpu(optimizer, precision, world):
    recipe = replace(RECIPE, precision=precision, optimizer=optimizer, schedule=Schedule(warmup_steps=1))
    recipe = replace(recipe, noise_interval=2)
    weights = []
    for here in (replace(world, device=torch.device("cpu")), world):
        trainer = tiny_trainer(recipe, here)
        batches = [tiny_batch(2, seed=seed).to(here.device) for seed in range(2)]
        train_step(trainer, batches, range(2), 1e-4, 0, here)
        before = trainer.model.rpn.conv.weight.clone()
        with no_waiting():
            result = train_step(trainer, batches, range(2), 1e-4, 1, here)
        assert result.noise is not None
        assert (result.agvm is None) == (trainer.agvm is None)
        assert all(numbers[:2].isfinite().all() for numbers in (result.noise, result.agvm) if numbers is not None)
        weights.append((trainer.model.rpn.conv.weight - before).detach().double().cpu())
    if precision == "float64":  # the fused kernels of a GPU read a rate that is a tensor in float32
        assert relative(*weights) < 1e-6


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_losses_and_gradients_are_those_of_the_cpu(precision, tolerance, world):
    recipe = replace(with_model(RECIPE, fpn={"norm": "batch"}), precision=precision)
    plain = tiny_detector(recipe).train()
    place_model(plain, torch.device("cpu"), precision)
    ours = copy.deepcopy(plain)
    place_model(ours, world.device, precision)
    found = []
    for model, device in ((plain, torch.device("cpu")), (ours, world.device)):
        losses = model(tiny_batch(3).to(device))
        torch.stack([losses[name].sum() for name in FasterRcnn.loss_names]).sum().backward()
        both = {**losses, **gradients(model)}
        found.append({name: tensor.detach().double().cpu() for name, tensor in both.items()})
    for name, tensor in found[0].items():
        assert relative(tensor, found[1][name]) < tolerance, name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_kernels_of_cross_device_batch_norm_are_torchs_own_batch_norm(dtype, tolerance, memory_format, world):
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(6, eps=1e-3, momentum=1.0).to(world.device, dtype)
    nn.init.uniform_(theirs.weight, 0.5, 1.5)
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in (theirs.weight, theirs.bias))
    x = torch.randn(4, 6, 9, 7, device=world.device, dtype=dtype).mul(3).add(1).contiguous(memory_format=memory_format)
    x, x2 = x.requires_grad_(), x.detach().clone().requires_grad_()
    moments = lane_moments(x, None, 1e-3, SINGLE_LANE, two_pass=False)
    y = CrossDeviceNorm.apply(x, weight, bias, None, 1e-3, SINGLE_LANE, moments)
    y2 = theirs(x2)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    y2.backward(upstream)
    assert moments.num_values == 4 * 9 * 7
    pairs = [
        (y, y2),
        (moments.mean, theirs.running_mean),
        (moments.unbiased_var, theirs.running_var),
        (x.grad, x2.grad),
    ]
    for ours, reference in [*pairs, (weight.grad, theirs.weight.grad), (bias.grad, theirs.bias.grad)]:
        assert relative(reference, ours) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_roi_align_is_that_of_the_cpu_forward_and_backward_and_repeats_itself_to_the_bit(dtype, tolerance, world):
    generator = torch.Generator().manual_seed(0)
    strides = LEVEL_STRIDES[:4]
    pyramid = [torch.randn(2, 8, 96 // s, 64 // s, dtype=dtype, generator=generator) for s in strides]
    rois = random_boxes(200, generator=generator).to(dtype)
    image, level = (torch.randint(count, (200,), generator=generator) for count in (2, 4))
    upstream = torch.randn(200, 49, 8, dtype=dtype, generator=generator)
    found = []
    for device in (torch.device("cpu"), world.device, world.device):
        levels = [features.to(device).requires_grad_() for features in pyramid]
        given = rois.to(device), image.to(device), level.to(device)
        bins = roi_align(feature_table(levels), strides, *given, 7, 2, aligned=True)
        bins.backward(upstream.to(device))
        found.append([bins.detach().cpu(), *(features.grad.cpu() for features in levels)])
    for reference, ours, again in zip(*found, strict=True):
        assert relative(reference, ours) < tolerance
        assert torch.equal(ours, again)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_copied_ahead_are_those_of_the_cpu_with_their_channels_last(workers, world, tmp_path):
    write_small_set(tmp_path, "train", 16)
    recipe = small_recipe(tmp_path)
    dataset = train_set(recipe)
    plan = TrainingPlan(dataset.sizes, recipe)
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, 1)
    sides = [
        training_batches(dataset, plan, layout, 0, (0, 4), workers=workers, device=device)
        for device in (torch.device("cpu"), world.device)
    ]
    for number, (theirs, ours) in enumerate(zip(*sides, strict=True)):
        assert ours.pixels.device == world.device
        assert ours.pixels.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours.pixels.cpu(), theirs.pixels), number
        assert torch.equal(ours.targets.boxes.cpu(), theirs.targets.boxes)
        assert torch.equal(ours.targets.image_seeds.cpu(), theirs.targets.image_seeds)


def steps_of(recipe: Recipe, world: World, steps: range, start: dict[str, Any] | None = None) -> dict[str, Any]:
    """Weights and momentum after some steps of the plan, from the start or from what another call returned."""
    with open_run(recipe, world, RunOptions(workers=0)) as run:
        trainer = run.trainer
        if start is not None:
            trainer.restore({"model": start["model"], "optimizer": start["optimizer"]})
        for _ in run.steps(steps.start, steps.stop):
            pass
    return copy.deepcopy(trainer.state())


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(precision, world, tmp_path):
    write_small_set(tmp_path, "train", 16)
    recipe = small_recipe(tmp_path, precision=precision)
    whole = steps_of(recipe, world, range(4))
    resumed = steps_of(recipe, world, range(2, 4), start=steps_of(recipe, world, range(2)))
    moved = steps_of(recipe, world, range(0))["model"]
    for kind, tensors in whole.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, resumed[kind][name]), (kind, name)
    assert any(not torch.equal(tensor, moved[name]) for name, tensor in whole["model"].items())


@pytest.mark.slow
def test_a_whole_run_trains_evaluates_and_saves_on_a_gpu(world, tmp_path):
    write_small_set(tmp_path, "train", 16)
    write_small_set(tmp_path, "val", 4, seed=1)
    folder = RunFolder(tmp_path / "run")
    numbers = train(small_recipe(tmp_path, precision="bfloat16"), folder, RunOptions(workers=2), world)
    assert 0 <= numbers.bbox.AP <= 1
    assert folder.evaluation.is_file()
