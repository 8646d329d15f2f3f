"""What is measured, and that its predictions are those of real runs."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cli_runs import make_data
from factories import TINY
from megdet.architecture_parts import Backbone
from megdet.cli.main import main
from megdet.errors import InputError
from megdet.planning import measured_steps
from megdet.planning.inputs import planner_of_measurement
from megdet.planning.measured_steps import Answer, Meeting, Task, micro_batch_recipe, others_bytes, peak_bytes
from megdet.planning.measurement import fit_costs, read_measurement
from megdet.planning.measuring import Measuring, measure, typical_canvas
from megdet.planning.network import flat_fabric
from megdet.recipe import Data, Recipe, Schedule
from megdet.recipe_file import dump_recipe

CPU = Measuring((1, 2), ("none",), device="cpu")
# the process says its own peak: that of a child would hold the peak of the parent that started it
TRAIN = """
import sys
from megdet.planning.measured_steps import resident_bytes
from megdet.cli.main import main
code = main(sys.argv[1:])
print(resident_bytes("VmHWM"))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Micro-batches of 6 images of 256 px, large enough that they show beside the libraries; two steps."""
    folder = tmp_path_factory.mktemp("data")
    data = make_data(folder)
    return replace(
        TINY,
        batch_size=12,
        bn_size=6,
        model=replace(TINY.model, backbone=Backbone(name="resnet18")),
        data=Data(
            train_annotations=str(data.train),
            train_images=str(data.train_images),
            val_annotations=str(data.val),
            val_images=str(data.val_images),
            short_edges=(256,),
            max_long_edge=256,
        ),
        schedule=Schedule(policy="step", epochs=1.0, warmup_steps=1),
    )


def test_the_typical_canvas_is_nearest_to_the_mean_area() -> None:
    # mean area (3 x 100 + 1 x 900) / 4 = 300
    assert typical_canvas({(10, 10): 3, (30, 30): 1, (10, 90): 0, (20, 20): 0}) == (20, 20)


def test_a_micro_batch_is_one_group_of_its_size() -> None:
    trained, frozen = (micro_batch_recipe(replace(TINY, bn_size=size), 3) for size in (2, 0))
    assert (trained.batch_size, trained.bn_size, trained.groups_per_step, trained.images_per_group) == (3, 3, 1, 3)
    assert (frozen.batch_size, frozen.bn_size, frozen.groups_per_step, frozen.images_per_group) == (3, 0, 1, 3)


def test_a_micro_batch_compares_no_gradients() -> None:
    asked = replace(TINY, noise_interval=1, optimizer=replace(TINY.optimizer, agvm=True))
    assert micro_batch_recipe(asked, 3) == micro_batch_recipe(TINY, 3)


@pytest.mark.parametrize("held", [0.0, 12.0])
def test_the_memory_of_a_gpu_is_counted_without_what_other_processes_hold(
    held: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib, gpu = 1 << 30, torch.device("cuda", 0)
    now = SimpleNamespace(context=0.5, reserved=0.0, peak=0.0)
    monkeypatch.setattr(
        "torch.cuda.mem_get_info", lambda _: (int((80 - held - now.context - now.reserved) * gib), 80 * gib)
    )
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: int(now.reserved * gib))
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda _: int(now.peak * gib))
    others = others_bytes(gpu)
    now.context, now.reserved, now.peak = 0.75, 6.0, 7.0  # kernels were loaded
    peak = peak_bytes(gpu, others)
    assert peak is not None
    # where others are, what a context may take beyond this one's 0.5 GiB is counted as ours
    assert peak == (7.75 if held == 0 else 7.75 + 0.5) * gib


def test_other_processes_on_the_gpu_are_told_of(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([3 << 30, 5 << 30])

    def answers(*_: object) -> list[Answer]:
        return [Answer((1.0, 2.0), (1 << 30, 1 << 30), next(held), (0.1, 1 << 30))]

    monkeypatch.setattr("megdet.planning.measuring._measure_together", answers)
    measurement = measure(recipe, CPU)
    assert measurement.others_bytes == 5 << 30

    def told(others: int) -> list[str]:
        said: list[str] = []
        planner_of_measurement(recipe, replace(measurement, others_bytes=others), CPU, flat_fabric(0.0, 1.0), said)
        return [line for line in said if "other processes" in line]

    assert told(0) == []
    [line] = told(5 << 30)
    assert "the 5 GiB of the GPU that other processes held when measuring began are in no number here" in line


def test_too_few_images_are_refused_before_anything_is_measured(recipe: Recipe) -> None:
    said: list[str] = []
    with pytest.raises(InputError, match="24 images to train on are not enough for one mini-batch of 60"):
        measure(replace(recipe, batch_size=60), CPU, said.append)
    assert said == []


def test_a_measuring_process_that_ends_badly_is_said_in_one_line(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megdet.planning.measuring.measure_here", end_at_once)
    with pytest.raises(
        InputError,
        match=r"micro-batches of 1 images failed: its process was ended by SIGKILL \(out of memory\?\); give smaller",
    ):
        measure(recipe, CPU)


def test_processes_side_by_side_stop_where_one_fails(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megdet.planning.measuring.measure_here", fail_on_the_second)
    with pytest.raises(InputError, match="failed: the second has no memory"):
        measure(recipe, replace(CPU, side_by_side=2))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process's memory")
def test_the_memory_of_a_real_run_is_predicted_within_15_percent(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe_of_test.yaml"
    file.write_text(dump_recipe(recipe))
    words = ["plan", str(file), "--device", "cpu", "--sizes", "1,3", "--plans", "none", "--timed-steps", "1", "--json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    measurement = read_measurement(tmp_path / "plan.json")
    assert [(point.images, point.rounds) for point in measurement.points] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert (measurement.typical_canvas, measurement.largest_canvas) == ((256, 256), (256, 256))
    assert (measurement.num_images, measurement.num_val_images, plan["steps"]) == (24, 4, 2)
    # six images were never measured, in two rounds as the layout of one device has them
    assert (plan["chosen"]["micro_batch"], plan["chosen"]["rounds"]) == (6, 2)
    assert plan["chosen"]["seconds"] > 0

    words = ["train", str(file), "--run", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    real, predicted = int(done.stdout.split()[-1]), plan["chosen"]["bytes"]
    assert abs(predicted / real - 1) < 0.15
    # the images are what is predicted, not the libraries: without them it would miss
    cost = fit_costs(measurement)["none"]
    assert abs((predicted - 6 * cost.image_bytes) / real - 1) > 0.15


def test_sizes_that_do_not_fit_are_left_out(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megdet.planning.measuring.measure_here", have_no_memory)
    said: list[str] = []
    with pytest.raises(InputError, match="no micro-batch of these sizes fits this device: give smaller --sizes"):
        measure(recipe, Measuring((1,), ("none",), device="cpu", side_by_side=2), said.append)
    assert said[1] == "micro-batches of 1 images do not fit this device: left out"


def end_at_once(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_on_the_second(task: Task, meeting: Meeting) -> Answer:
    """The first waits in the real function for the second, which never comes."""
    if meeting.place == 0:
        return measured_steps.measure_here(task, meeting)
    raise InputError("the second has no memory")


def have_no_memory(task: Task, meeting: Meeting) -> Answer:
    """The first does not fit, and the second waits for it."""
    with pytest.MonkeyPatch.context() as patch:
        if meeting.place == 0:
            patch.setattr(measured_steps, "_measure", raise_out_of_memory)
        return measured_steps.measure_here(task, meeting)


def raise_out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError
