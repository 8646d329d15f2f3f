"""The affine model of a step's time and memory, fitted to points."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megdet.distributed.layout import Layout
from megdet.errors import InputError
from megdet.planning.measurement import Measurement, TimedSteps, fit_costs, read_measurement
from megdet.planning.network import flat_fabric
from megdet.planning.step import Exchange, StepCost, step_bytes, step_time

COST = StepCost(0.5, 0.2, 0.3, 1000.0, 100.0, 40.0)


def measured(points: list[TimedSteps], evaluation_bytes: int | None = 0) -> Measurement:
    return Measurement(
        "batch_size: 4", "cpu", "some", 1, 32, 4, 3, (64, 64), (64, 96), 0.01, 0.02, evaluation_bytes, tuple(points)
    )


def seconds(cost: StepCost, images: int, rounds: int) -> float:
    return step_time(cost, Layout(rounds, images, 1, 1), Exchange((), ()), flat_fabric(0.0, 1.0)).total


def memory(cost: StepCost, images: int, rounds: int) -> float | None:
    return step_bytes(cost, Layout(rounds, images, 1, 1), Exchange((), ()))


def exact(images: int, rounds: int, cost: StepCost = COST) -> TimedSteps:
    needed = memory(cost, images, rounds)
    return TimedSteps("none", images, rounds, seconds(cost, images, rounds), None if needed is None else int(needed))


def test_exact_points_give_back_the_cost_they_were_made_with() -> None:
    found = fit_costs(measured([exact(m, r) for m in (1, 3) for r in (1, 2)]))["none"]
    assert seconds(found, 7, 5) == pytest.approx(seconds(COST, 7, 5))
    assert memory(found, 7, 5) == pytest.approx(memory(COST, 7, 5))


def test_noise_never_makes_a_step_or_an_image_free() -> None:
    # the large micro-batch was quicker than the small one: the best slope would be negative
    points = [TimedSteps("none", 1, 1, 1.0, 500), TimedSteps("none", 1, 2, 2.0, 500)]
    points += [TimedSteps("none", 4, 1, 0.9, 400), TimedSteps("none", 4, 2, 1.8, 400)]
    found = fit_costs(measured(points))["none"]
    assert min(found.update_seconds, found.micro_batch_seconds, found.image_seconds, found.image_bytes) >= 0
    assert 0.85 < seconds(found, 2, 1) < 1.05


def test_a_process_that_evaluates_needs_at_least_what_its_evaluation_took() -> None:
    found = fit_costs(measured([exact(m, r) for m in (1, 2) for r in (1, 2)], 1500))["none"]
    assert memory(found, 1, 1) == 1500
    assert memory(found, 100, 1) == pytest.approx(1000 + 40 * 100)


def test_memory_that_no_system_told_stays_unknown() -> None:
    cost = StepCost(0.5, 0.2, 0.3)
    found = fit_costs(measured([exact(m, r, cost) for m in (1, 2) for r in (1, 2)], None))["none"]
    assert memory(found, 1, 1) is None
    assert seconds(found, 3, 1) == pytest.approx(seconds(cost, 3, 1))


def test_one_size_alone_has_no_slope() -> None:
    with pytest.raises(InputError, match="at least two --sizes"):
        fit_costs(measured([exact(2, 1), exact(2, 2)]))


def test_a_measurement_comes_back_from_what_a_plan_printed(tmp_path: Path) -> None:
    whole = replace(measured([exact(1, 1)]), latency=1e-5, bandwidth=1e9)
    assert read_measurement(write(tmp_path, asdict(whole))) == whole
    unmeasured = {k: v for k, v in asdict(whole).items() if k not in ("latency", "bandwidth", "others_bytes")}
    assert read_measurement(write(tmp_path, unmeasured)) == measured([exact(1, 1)])


@pytest.mark.parametrize("content", [[], {"measurement": None}, {"points": []}, {"measurement": {"recipe": ""}}])
def test_a_file_without_a_measurement_is_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"plan.json.*make one with `megdet plan RECIPE --json`"):
        read_measurement(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("points[0].seconds", -1.0),
        ("points[0].seconds", 0),
        ("points[0].images", 0),
        ("points[0].rounds", "2"),
        ("points[0].recompute", "half"),
        ("points[0].bytes", 0),
        ("points[0]", 3),
        ("points", []),
        ("recipe", 5),
        ("device", "tpu"),
        ("machine", None),
        ("side_by_side", 0),
        ("num_images", None),
        ("num_images", 32.5),
        ("num_images", True),
        ("num_val_images", -1),
        ("num_classes", 10**400),
        ("typical_canvas", [64]),
        ("largest_canvas", 64),
        ("load_seconds", None),
        ("load_seconds", 10**400),
        ("evaluation_seconds", -0.1),
        ("evaluation_bytes", "much"),
        ("others_bytes", -1),
        ("bandwidth", 0),
        ("latency", "fast"),
    ],
)
def test_values_that_cannot_be_are_refused_by_their_key(key: str, value: object, tmp_path: Path) -> None:
    content: dict[str, Any] = json.loads(json.dumps(asdict(measured([exact(1, 1)]))))
    read_measurement(write(tmp_path, content))
    place: Any = content["points"] if key == "points[0]" else content["points"][0] if "]." in key else content
    place[0 if key == "points[0]" else key.rpartition(".")[2]] = value
    with pytest.raises(InputError) as refused:
        read_measurement(write(tmp_path, content))
    line = str(refused.value)
    assert line.startswith(f"{tmp_path / 'plan.json'}")
    assert line.endswith("make one with `megdet plan RECIPE --json`")
    assert f"measurement.{key}" in line or value == 10**400
    assert len(line) < 250 + len(str(tmp_path))


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    content = asdict(measured([exact(1, 1)]))
    for key in set(content) - {"latency", "bandwidth", "others_bytes"}:
        with pytest.raises(InputError, match=f"{key}"):
            read_measurement(write(tmp_path, {name: value for name, value in content.items() if name != key}))


def write(folder: Path, measurement: dict[str, Any]) -> Path:
    (folder / "plan.json").write_text(json.dumps({"batch_size": 4, "measurement": measurement}))
    return folder / "plan.json"
