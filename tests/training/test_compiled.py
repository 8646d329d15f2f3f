"""`--compile`: what is refused, what is left as it is, and that compiling changes nothing but the rounding."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from factories import TINY, gradients, relative, tiny_batch, tiny_detector, with_model
from megdet.distributed.lane import Lane, make_lane
from megdet.distributed.layout import Layout
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.inference.trained import place_model
from megdet.layers.batch_norm import CrossDeviceBatchNorm, finish_step
from megdet.model.choice import make_detector
from megdet.model.detector import Detector
from megdet.model.faster_rcnn import FasterRcnn
from megdet.structures import Batch
from megdet.training import compiled
from megdet.training.compiled import PerCanvas, check_compiler, compile_dense

CPU = torch.device("cpu")
RECIPE = with_model(TINY, backbone={"name": "test_resnet"})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that a stand-in for torch.compile was called with; it computes what it is given."""
    called: list[torch.Size] = []

    def stand_in(function: Any, **_options: Any) -> Any:
        def compiled_function(x: Any) -> Any:
            called.append((x if isinstance(x, torch.Tensor) else x[0]).shape)
            return function(x)

        return compiled_function

    monkeypatch.setattr(torch, "compile", stand_in)
    return called


def test_compiling_and_recomputing_together_is_refused():
    with pytest.raises(InputError, match=r"--compile does not go with recompute block: .* set recompute none"):
        check_compiler(replace(RECIPE, recompute="block"), CPU)


def test_where_nothing_can_be_compiled_it_is_refused_in_one_line(monkeypatch):
    def broken(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("\nno C++ compiler found\nand a long explanation")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(InputError) as refusal:
        check_compiler(RECIPE, CPU)
    assert str(refusal.value) == (
        "--compile: torch.compile does not work here (no C++ compiler found): install a C++ compiler, or leave "
        "--compile out"
    )


def test_training_calls_the_compiled_parts_and_detecting_the_modules_whose_names_stay(calls):
    model = tiny_detector(RECIPE)
    names = list(model.state_dict())
    assert compile_dense(model) == ["backbone", "fpn", "rpn"]
    assert list(model.state_dict()) == names
    batch = tiny_batch(2)
    model.train()(batch)
    assert len(calls) == 3
    finish_step(model.modules(), 1, World(0, 1, torch.device("cpu")))
    model.eval().detect(model.normalized(batch.pixels, batch.sizes), batch.sizes)
    assert len(calls) == 3


def test_what_talks_to_other_devices_is_left_as_it_is(calls, caplog):
    recipe = with_model(RECIPE, fpn={"norm": "group"})
    assert compile_dense(make_detector(recipe, 3, Lane(2))) == ["fpn", "rpn"]
    assert caplog.messages == ["--compile: the backbone is not compiled, its batch norms talk to other devices"]
    assert compile_dense(make_detector(replace(recipe, bn_size=0), 3, Lane(2))) == ["backbone", "fpn", "rpn"]


def test_canvases_beyond_the_most_run_as_they_are_and_are_told_of_once(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "MOST_CANVASES", 2)
    seen: list[torch.Size] = []
    part = PerCanvas("fpn", torch.nn.Identity(), lambda x: seen.append(x.shape))
    for edge in (1, 2, 3, 1, 4, 2):
        part(torch.zeros(1, 1, 1, edge))
    assert [shape[3] for shape in seen] == [1, 2, 1, 2]
    assert len(caplog.messages) == 1
    assert "more than 2 canvases, so the fpn runs uncompiled on the others" in caplog.text


def test_a_share_without_images_is_not_compiled():
    part = PerCanvas("backbone", torch.nn.Identity(), lambda _x: pytest.fail("compiled"))
    assert part(torch.zeros(0, 3, 32, 32)).shape == (0, 3, 32, 32)


def check_equality(device: torch.device) -> None:
    """Losses, gradients and statistics of a compiled detector on two canvases, beside those of the plain one."""
    torch.set_num_threads(1)
    recipe = with_model(RECIPE, fpn={"norm": "batch"})
    plain = tiny_detector(recipe).train()
    ours = copy.deepcopy(plain)
    for model in (plain, ours):
        place_model(model, device, recipe.precision)
    compile_dense(ours)

    def learn(model: Detector, batch: Batch) -> dict[str, torch.Tensor]:
        losses = model(batch)
        torch.stack([losses[name].sum() for name in FasterRcnn.loss_names]).sum().backward()
        return {**losses, **gradients(model), **dict(model.named_buffers())}

    for canvas in (64, 96):
        batch = tiny_batch(2, canvas).to(device)
        found = [learn(model, batch) for model in (plain, ours)]
        assert len(found[0]) > 100
        worst = max((relative(tensor.double(), found[1][name].double()), name) for name, tensor in found[0].items())
        assert worst[0] < 1e-4, worst
        assert worst[0] > 0, "nothing was compiled"
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3 * 2
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        learn(ours, batch)
        torch.cuda.set_sync_debug_mode("default")
    print("equal")


def run_here(device: str) -> None:
    """Check equality in a process of its own: what checks shapes here is nothing to compile."""
    found = subprocess.run(
        [sys.executable, __file__, device],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert found.stdout == "equal\n", found.stderr


@pytest.mark.slow
def test_a_compiled_detector_has_the_losses_and_gradients_of_the_plain_one():
    run_here("cpu")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_detector_has_them_on_a_gpu_too_and_waits_for_nothing():
    run_here("cuda")


def norms_of_a_lane(world: World) -> tuple[float, int]:
    """The largest difference between a compiled and a plain stack of norms whose lane is two ranks of uneven shares."""
    lane = make_lane(world, Layout(1, 3, 2, 2))
    plain, ours = (
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            CrossDeviceBatchNorm(4, lane=lane),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, 4, 3),
            CrossDeviceBatchNorm(4, lane=lane),
        )
        for _ in range(2)
    )
    ours.load_state_dict(plain.state_dict())
    function = torch.compile(ours.forward, dynamic=False)
    torch.manual_seed(1 + world.rank)
    x = torch.randn(1 + world.rank, 3, 9, 9)
    found = []
    for model, forward in ((plain, plain), (ours, function)):
        y = forward(x)
        y.square().sum().backward()
        found.append([y, model[1].step_mean, *(parameter.grad for parameter in model.parameters())])
    worst = max(relative(a, b) for a, b in zip(*found, strict=True))
    return worst, sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.distributed
def test_a_compiled_model_of_yours_breaks_its_graph_at_norms_that_talk_to_other_devices():
    for worst, breaks in run_in_ranks(norms_of_a_lane, 2):
        assert worst < 1e-5
        assert breaks >= 2


if __name__ == "__main__":
    check_equality(torch.device(sys.argv[1]))
