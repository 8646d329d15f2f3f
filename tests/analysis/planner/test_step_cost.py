"""The affine model of a step's time and memory, fitted to points."""

import json
from typing import Any

import pytest

from megdet.analysis.planner.step_cost import Link, Measurement, Point, StepCost, fit_costs
from megdet.errors import InputError

COST = StepCost(0.5, 0.2, 0.3, 1000.0, 100.0, 40.0)


def measured(points: list[Point], evaluation_bytes: int | None = 0) -> Measurement:
    return Measurement(
        "batch_size: 4", "cpu", "some", 1, 32, 4, 3, (64, 64), (64, 96), 0.01, 0.02, evaluation_bytes, tuple(points)
    )


def exact(images: int, rounds: int, cost: StepCost = COST) -> Point:
    memory = cost.bytes(images, rounds)
    return Point("none", images, rounds, cost.seconds(images, rounds), None if memory is None else int(memory))


def test_a_step_costs_its_update_its_micro_batches_and_their_images() -> None:
    assert COST.seconds(4, 2) == pytest.approx(0.5 + 2 * (0.2 + 0.3 * 4))
    assert COST.bytes(4, 1) == 1000 + 40 * 4
    assert COST.bytes(4, 3) == 1000 + 100 + 40 * 4  # a gradient waits, however many micro-batches there are


def test_exact_points_give_back_the_cost_they_were_made_with() -> None:
    found = fit_costs(measured([exact(m, r) for m in (1, 3) for r in (1, 2)]))["none"]
    assert found.seconds(7, 5) == pytest.approx(COST.seconds(7, 5))
    assert found.bytes(7, 5) == pytest.approx(COST.bytes(7, 5))


def test_noise_never_makes_a_step_or_an_image_free() -> None:
    # the large micro-batch was quicker than the small one: the best slope would be negative
    points = [Point("none", 1, 1, 1.0, 500), Point("none", 1, 2, 2.0, 500)]
    points += [Point("none", 4, 1, 0.9, 400), Point("none", 4, 2, 1.8, 400)]
    found = fit_costs(measured(points))["none"]
    assert min(found.update_seconds, found.micro_batch_seconds, found.image_seconds, found.image_bytes) >= 0
    assert 0.85 < found.seconds(2, 1) < 1.05


def test_a_process_that_evaluates_needs_at_least_what_its_evaluation_took() -> None:
    found = fit_costs(measured([exact(m, r) for m in (1, 2) for r in (1, 2)], 1500))["none"]
    assert found.bytes(1, 1) == 1500
    assert found.bytes(100, 1) == pytest.approx(1000 + 40 * 100)


def test_memory_that_no_system_told_stays_unknown() -> None:
    cost = StepCost(0.5, 0.2, 0.3)
    found = fit_costs(measured([exact(m, r, cost) for m in (1, 2) for r in (1, 2)], None))["none"]
    assert found.bytes(1, 1) is None
    assert found.seconds(3, 1) == pytest.approx(cost.seconds(3, 1))


def test_one_size_alone_has_no_slope() -> None:
    with pytest.raises(InputError, match="at least two --sizes"):
        fit_costs(measured([exact(2, 1), exact(2, 2)]))


def test_a_measurement_comes_back_from_json_also_out_of_a_plan() -> None:
    whole = Measurement(**{**measured([exact(1, 1)]).__dict__, "link": Link(1e-5, 1e9, "measured")})
    text = json.loads(json.dumps(whole.as_dict()))
    assert Measurement.from_dict(text, "file") == whole
    assert Measurement.from_dict({"measurement": text, "layouts": []}, "file") == whole
    unmeasured = {key: value for key, value in text.items() if key not in ("link", "others_bytes")}
    assert Measurement.from_dict(unmeasured, "file") == measured([exact(1, 1)])


@pytest.mark.parametrize("content", [[], {"measurement": None}, {"points": []}, {"measurement": {"recipe": ""}}])
def test_a_file_without_a_measurement_is_refused(content: object) -> None:
    with pytest.raises(InputError, match=r"file: it.*make one with `megdet plan RECIPE --json`"):
        Measurement.from_dict(content, "file")


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("points[0].seconds", -1.0, "-1.0: it must be a finite number, above 0"),
        ("points[0].seconds", 0, "0: it must be a finite number, above 0"),
        ("points[0].images", 0, "0: it must be a whole number, at least 1"),
        ("points[0].rounds", "2", '"2": it must be a whole number, at least 1'),
        ("points[0].recompute", "half", '"half": it must be one of none, block, stage, sqrt'),
        ("points[0].bytes", 0, "0: it must be a whole number, at least 1"),
        ("points", [], "[]: it must be a list that is not empty"),
        ("points", [3], "points[0] is 3: it must be an object"),
        ("recipe", 5, "5: it must be a text"),
        ("recipe", {"batch_size": [4] * 99}, "..."),
        ("device", "tpu", '"tpu": it must be one of cpu, cuda'),
        ("machine", None, "null: it must be a text"),
        ("side_by_side", 0, "0: it must be a whole number, at least 1"),
        ("num_images", None, "null: it must be a whole number, at least 1"),
        ("num_images", 32.5, "32.5: it must be a whole number, at least 1"),
        ("num_images", True, "true: it must be a whole number, at least 1"),
        ("num_val_images", -1, "-1: it must be a whole number, at least 0"),
        ("num_classes", 10**400, "1000000"),
        ("typical_canvas", [64], "[64]: it must be a height and a width in pixels"),
        ("largest_canvas", 64, "64: it must be a height and a width in pixels"),
        ("load_seconds", None, "null: it must be a finite number, not negative"),
        ("load_seconds", 10**400, "1000000"),
        ("evaluation_seconds", float("nan"), "NaN: it must be a finite number, not negative"),
        ("evaluation_seconds", -0.1, "-0.1: it must be a finite number, not negative"),
        ("evaluation_bytes", "much", '"much": it must be a whole number, at least 0'),
        ("others_bytes", -1, "-1: it must be a whole number, at least 0"),
        ("link", "fast", '"fast": it must be an object'),
        ("link.bandwidth", 0, "0: it must be a finite number, above 0"),
        ("link.bandwidth", float("inf"), "Infinity: it must be a finite number, above 0"),
        ("link.latency", None, "null: it must be a finite number, not negative"),
        ("link.source", 1, "1: it must be a text"),
    ],
)
def test_values_that_cannot_be_are_refused_by_their_key(key: str, value: object, why: str) -> None:
    content: dict[str, Any] = json.loads(json.dumps(measured([exact(1, 1)]).as_dict()))
    content["link"] = {"latency": 1e-5, "bandwidth": 1e9, "source": "measured"}
    Measurement.from_dict(content, "file")
    section, _, leaf = key.rpartition(".")
    place = {"": content, "points[0]": content["points"][0], "link": content["link"]}[section]
    place[leaf] = value
    with pytest.raises(InputError) as refused:
        Measurement.from_dict(content, "file")
    line = str(refused.value)
    assert line.startswith(f"file: its measurement cannot be used ({key}")
    assert why in line
    assert line.endswith("make one with `megdet plan RECIPE --json`")
    assert len(line) < 250
    del place[leaf]
    if key not in ("link", "others_bytes"):
        with pytest.raises(InputError, match="is missing"):
            Measurement.from_dict(content, "file")
