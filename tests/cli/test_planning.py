"""`megdet plan` from what was measured before; tests/planning/test_measuring.py measures."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cli_runs import OVERRIDES, TinyData, make_data
from factories import TINY
from megdet.cli.main import main
from megdet.planning.measurement import Measurement, TimedSteps
from megdet.planning.step import StepCost
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe

Refused = Callable[..., str]
GIB = 2**30
COSTS = {
    "none": StepCost(0.1, 0.0, 1.0, 1.0 * GIB, 0.25 * GIB, 0.5 * GIB),
    "block": StepCost(0.1, 0.0, 1.4, 1.0 * GIB, 0.25 * GIB, 0.25 * GIB),
}
HALVES = {"estimator": "halves", "measurements": 7}
RECIPE = replace(TINY, batch_size=16, bn_size=8)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(dump_recipe(RECIPE))
    return file


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A measurement of exact costs, of a data set of 160 images; 11 epochs are 110 steps."""
    points = [
        TimedSteps(
            plan,  # type: ignore[arg-type]
            images,
            rounds,
            cost.update_seconds + rounds * images * cost.image_seconds,
            int(GIB + cost.accumulation_bytes * (rounds > 1) + cost.image_bytes * images),
        )
        for plan, cost in COSTS.items()
        for images in (1, 4)
        for rounds in (1, 2)
    ]
    canvas = (64, 64)
    whole = Measurement(
        dump_recipe(RECIPE), "cpu", "some", 1, 160, 0, 3, canvas, canvas, 0.0, 0.0, 0, tuple(points), 1e-5, 1e9
    )
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"measurement": asdict(whole)}))
    return file


@pytest.fixture
def plan(recipe: Path, measured: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON of a plan."""

    def run(*words: object) -> dict[str, Any]:
        assert main(["plan", str(recipe), "--measured", str(measured), "--json", *map(str, words)]) == 0
        printed = capsys.readouterr().out
        assert len(printed.splitlines()) == 1
        found: dict[str, Any] = json.loads(printed)
        return found

    return run


def test_json_is_one_object_with_the_layout_its_memory_and_its_time(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--workers", 0)
    own = found["chosen"]
    assert (found["batch_size"], found["bn_size"], found["devices"], found["steps"]) == (16, 8, 1, 110)
    assert (own["micro_batch"], own["lanes"], own["lane_width"], own["rounds"]) == (8, 1, 1, 2)
    assert own["seconds"] == pytest.approx(0.1 + 16)
    assert own["bytes"] == pytest.approx((1 + 0.25 + 4) * GIB, rel=1e-6)
    assert own["hours"] == pytest.approx(110 * 16.1 / 3600)
    assert own["communication_seconds"] == 0
    assert {layout["recompute"] for layout in found["layouts"]} == {"none", "block"}
    assert found["best"] == own
    assert found["batch_sizes"] == []


def test_a_plan_can_be_made_from_the_json_of_a_plan(
    plan: Callable[..., dict[str, Any]], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = plan("--devices", 2)
    (tmp_path / "again.json").write_text(json.dumps(first))
    assert main(["plan", str(recipe), "--devices", "2", "--measured", str(tmp_path / "again.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_a_price_gives_the_cost_of_a_run_and_the_cheapest_devices_within_the_hours(
    plan: Callable[..., dict[str, Any]], recipe: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--hours", 0.2, "--price", 10, "--workers", 0)
    found = plan(*words)
    # a step of 16, 8, 6 (shares of 3, 3 and 2) and 4 images on 1 to 4 devices, and 0.1 s: two take 0.248 hours
    assert found["chosen"]["cost"] == pytest.approx(10 * 110 * 16.1 / 3600)
    fewest, cheapest = found["devices_for_hours"], found["cheapest_for_hours"]
    assert (fewest["devices"], cheapest["devices"]) == (3, 4)
    assert fewest["cost"] == pytest.approx(10 * 3 * 110 * 6.1 / 3600, rel=0.02)
    assert cheapest["cost"] == pytest.approx(10 * 4 * 110 * 4.1 / 3600, rel=0.02)
    assert main(["plan", str(recipe), "--measured", str(measured), *map(str, words)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Within 0.2 hours: 3 devices, 11." in text
    assert f"with lane width 3 and recompute none, cost {fewest['cost']:.2f}." in text
    assert "The cheapest within 0.2 hours: 4 devices, " in text


def test_without_a_price_nothing_costs(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--hours", 0.2)
    assert (found["price"], found["cheapest_for_hours"], found["chosen"]["cost"]) == (None, None, None)
    assert found["chosen"]["device_hours"] == found["chosen"]["hours"]


def test_layouts_that_do_not_fit_are_marked_and_what_would_fit_is_named(
    plan: Callable[..., dict[str, Any]], recipe: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan("--memory", 3.5)
    assert found["chosen"]["fits"] is False  # 5.25 GiB
    assert (found["best"]["recompute"], found["best"]["fits"]) == ("block", True)  # 3.25 GiB
    assert found["devices_that_fit"]["block"] == 1
    assert found["devices_that_fit"]["none"] == 2  # four images of a group: 3.25 GiB and the bucket
    assert main(["plan", str(recipe), "--measured", str(measured), "--memory", "3.5"]) == 0
    text = capsys.readouterr().out
    assert "as it is, does not fit" in text
    assert "Devices that hold a step in 3.5 GiB each, by recompute plan: none 2, block 1." in text
    assert f"Run it: megdet train {recipe} --recompute=block" in text


def test_the_fewest_devices_within_some_hours_are_named(
    recipe: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 110 steps: 29.5 minutes on one device, 14.9 on two
    for hours, sentence in ((0.3, "Within 0.3 hours: 2 devices, 14."), (0.001, "hours: no number of devices")):
        assert main(["plan", str(recipe), "--measured", str(measured), "--hours", str(hours)]) == 0
        assert sentence in capsys.readouterr().out


def test_batch_sizes_are_judged_by_a_noise_scale_given_or_read_from_a_run(
    plan: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    lines = [
        {"step": 1, "noise": {**HALVES, "model": {"gradient_sq": 1.0, "variance": 5.0, "scale": 5.0}}},
        {"step": 2, "noise": {**HALVES, "model": {"gradient_sq": 1.0, "variance": 32.0, "scale": 32.0}}},
        {"step": 3, "loss": 1.0},
    ]
    run = write_run(tmp_path, *lines)
    given, read = plan("--noise-scale", 32), plan("--noise-from", run)
    assert read["noise_scale"] == 32
    assert given["batch_sizes"] == read["batch_sizes"]
    assert [size["batch_size"] for size in read["batch_sizes"]] == [8, 16, 32, 64, 128]
    assert [size["pays"] for size in read["batch_sizes"]] == [True, True, True, False, False]


@pytest.mark.parametrize("forced", [("--lane-width", 4), ("--max-images-per-device", 2)])
def test_batch_sizes_are_judged_with_a_forced_layout_too(
    forced: tuple[str, int],
    plan: Callable[..., dict[str, Any]],
    recipe: Path,
    measured: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--devices", 4, *forced, "--noise-scale", 32)
    # groups of eight: half of the batch has two devices in proportion, which are no lane of four
    found = [(size["batch_size"], size["hours_in_step"] is None) for size in plan(*words)["batch_sizes"]]
    assert found == [(8, True), (16, False), (32, False), (64, False), (128, False)]
    assert main(["plan", str(recipe), "--measured", str(measured), *map(str, words)]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    [row] = [row for row in rows if row[:1] == ["8"]]
    assert row[4:6] == ["-", "-"]
    assert row[3] != "-"


def test_a_noise_scale_from_a_run_says_where_it_is_from(
    plan: Callable[..., dict[str, Any]],
    recipe: Path,
    measured: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run(tmp_path, {"step": 350, "noise": {**HALVES, "model": {"scale": 12.0}}}, {"step": 351, "loss": 1.0})
    wanted = f"noise scale 12 images from {run}, step 350, 7 measurements, estimator halves"
    assert wanted in plan("--noise-from", run)["assumptions"]
    assert main(["plan", str(recipe), "--measured", str(measured), "--noise-from", str(run)]) == 0
    assert "Assumed: noise scale 12 images from" in " ".join(capsys.readouterr().out.split())
    steps = {"estimator": "successive steps", "measurements": 1, "model": {"scale": 12.0}}
    write_run(tmp_path, {"step": 50, "noise": steps})
    found = plan("--noise-from", run)["assumptions"]
    assert any(line.endswith("step 50, 1 measurement, estimator successive steps (too large)") for line in found)
    assert not any("noise scale" in line for line in plan("--noise-scale", 12)["assumptions"])


def test_a_noise_scale_of_other_groups_or_other_images_is_refused(
    plan: Callable[..., dict[str, Any]], recipe: Path, measured: Path, tmp_path: Path, refused: Refused
) -> None:
    line = {"step": 50, "noise": {**HALVES, "model": {"scale": 12.0}}}
    words = ("plan", recipe, "--measured", measured, "--noise-from")
    run = write_run(tmp_path, line, recipe=replace(RECIPE, bn_size=4))
    assert "of other groups (bn_size: 8 here, 4 there)" in refused(*words, run)
    write_run(tmp_path, line, recipe=replace(RECIPE, bn_size=0, group_size=8))
    assert "of other groups (bn_size: 8 here, 0 there)" in refused(*words, run)
    write_run(tmp_path, line, recipe=replace(RECIPE, bn_size=0, group_size=4))
    frozen = ("plan", recipe, "--bn_size", 0, "--group_size", 2, "--noise-from")
    assert "of other groups (group_size: 2 here, 4 there)" in refused(*frozen, run)
    write_run(tmp_path, line, recipe=replace(RECIPE, data=replace(RECIPE.data, train_annotations="other.json")))
    assert "of other images (data.train_annotations: " in refused(*words, run)
    (run / "recipe.yaml").unlink()
    assert "recipe.yaml does not exist: --noise-from takes the folder of a run" in refused(*words, run)
    # another batch size and rate, and another way to write the path, are the same groups and images
    absolute = str(Path(RECIPE.data.train_annotations).resolve())
    other = replace(RECIPE, batch_size=32, data=replace(RECIPE.data, train_annotations=absolute))
    assert plan("--noise-from", write_run(tmp_path, line, recipe=other))["noise_scale"] == 12


def test_a_measurement_serves_a_recipe_that_compares_gradients_which_needs_more_memory(
    plan: Callable[..., dict[str, Any]],
) -> None:
    plain, measuring = plan(), plan("--noise_interval", 50, "--optimizer.agvm", "true")
    more = measuring["chosen"]["bytes"] - plain["chosen"]["bytes"]
    assert more == pytest.approx(plan("--devices", 2)["chosen"]["gradient_bytes_sent"])  # 2 (W - 1) / W of it
    assert any("agvm, noise_interval" in line for line in measuring["assumptions"])
    assert not any("agvm" in line for line in plain["assumptions"])


def test_numbers_may_be_given_instead_of_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path)
    words = ["plan", "demo", *data.options, *OVERRIDES, "--device", "cpu", "--seconds-per-image", "0.5", "--json"]
    memory = ["--gib-per-image", "0.5", "--fixed-gib", "1", "--memory", "2"]
    assert main([*words, *memory, "--bandwidth", "10", "--latency", "5", "--devices", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["compute_seconds"] == 1.0  # 8 images over 4 devices
    assert found["chosen"]["bytes"] == pytest.approx(2 * GIB, rel=0.1)
    assert found["chosen"]["gradient_bytes_sent"] > 0
    assert any("10 GB/s and 5 us a hop (bandwidth and latency as given)" in line for line in found["assumptions"])
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["bytes"] is None


def test_what_cannot_be_planned_is_refused_before_anything_is_measured(
    recipe: Path, measured: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it started to measure")

    monkeypatch.setattr("megdet.planning.measuring._measure_together", never)
    assert "bn_size is 3: it must divide batch_size 16" in refused("plan", recipe, "--bn_size", 3)
    assert "17 devices for a mini-batch of 16 images" in refused("plan", recipe, "--devices", 17)
    assert "takes at least one" in refused("plan", recipe, "--devices", 0)
    assert "nowhere.json" in refused("plan", recipe, "--data.train_annotations", "nowhere.json")
    data: TinyData = make_data(tmp_path / "data")
    line = refused("plan", recipe, *data.options, "--batch_size", 32)
    assert "24 images to train on are not enough for one mini-batch of 32" in line
    line = refused("plan", recipe, *data.options, "--model.backbone.weights", "nowhere.pth")
    assert "nowhere.pth" in line
    assert "no step has a noise scale: train with noise_interval: 50" in refused(
        "plan", recipe, "--noise-from", write_run(tmp_path, {"step": 1})
    )
    for scale in (None, -3.0, "NaN"):
        run = write_run(tmp_path, {"step": 1, "noise": {**HALVES, "model": {"scale": scale}}})
        assert "is no number above 0" in refused("plan", recipe, "--noise-from", run)
    words = ("plan", recipe, "--measured", measured)
    assert "model.backbone.name: resnet34 here, resnet18 there" in refused(*words, "--model.backbone.name", "resnet34")
    assert "bn_size: 0 here, 8 there" in refused(*words, "--bn_size", 0, "--group_size", 8)
    assert "recompute sqrt was not measured, only none, block" in refused(*words, "--plans", "sqrt")
    broken = json.loads(measured.read_text())
    broken["measurement"]["load_seconds"] = None
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    line = refused("plan", recipe, "--measured", tmp_path / "broken.json")
    assert "broken.json: measurement.load_seconds: expected float, got null" in line
    assert "160 images to train on, which are not enough" in refused(*words, "--batch_size", 320)
    assert "give only one of them" in refused(*words, "--seconds-per-image", 1)
    line = refused("plan", recipe, *data.options, "--seconds-per-image", 1, "--fixed-gib", 1)
    assert "--gib-per-image and --fixed-gib go together" in line
    assert "memory a step takes is not known" in refused(
        *("plan", recipe, *data.options, "--seconds-per-image", 1, "--memory", 4)
    )


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--memory", "0", "not a number above 0"),
        ("--hours", "nan", "not a number above 0"),
        ("--bandwidth", "fast", "not a number above 0"),
        ("--sizes", "4", "at least two numbers"),
        ("--sizes", "0,4", "at least two numbers"),
        ("--plans", "none,half", "'half': choose from none, block, stage, sqrt"),
        ("--side-by-side", "0", "at least 1"),
        ("--device", "tpu", "choose from"),
    ],
)
def test_options_that_mean_nothing_are_refused(option: str, value: str, why: str, refused: Refused) -> None:
    assert why in refused("plan", "demo", option, value)


def test_a_gpu_that_is_not_there_is_refused(recipe: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA device is visible here" in refused("plan", recipe, "--device", "cuda")


def write_run(folder: Path, *lines: dict[str, Any], recipe: Recipe = RECIPE) -> Path:
    """A folder with the recipe and the metrics of a run."""
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
