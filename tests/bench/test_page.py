"""docs/benchmarks.md is what its results say."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

Script = Callable[[str], ModuleType]
DOCS = Path(__file__).resolve().parents[2] / "docs"


def section(page: str, title: str) -> list[str]:
    """The lines below a heading."""
    return re.split(r"^## ", page.partition(f"## {title}\n")[2], flags=re.MULTILINE)[0].splitlines()


def test_the_page_is_what_the_results_give(script: Script) -> None:
    results = json.loads((DOCS / "benchmarks.json").read_text(encoding="utf-8"))["results"]
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert page == script("page").write_page(results), "run make bench-page"


def test_a_row_has_the_median_the_spread_the_speed_and_both_ratios(script: Script, results: dict[str, Any]) -> None:
    lines = section(script("page").write_page(results), "A training step")
    assert "| **megdet fp32** | 1.25 (1.00 to 1.50) | 1.60 | 2.40 (2.00 to 3.00) | 2.00 |" in lines
    assert any("50% of the limit of 160 GFLOP/s" in line for line in lines)


def test_machine_versions_and_date_stand_below_the_tables(script: Script, results: dict[str, Any]) -> None:
    lines = section(script("page").write_page(results), "A training step")
    place = (
        "2 cores of Some CPU with bfloat16, 24 GiB, no GPU; python 3.11.7, torch 2.15.0, commit 0123456 with changes."
    )
    assert f"2026-01-02, {place}" in lines


def test_results_of_different_days_say_so_each(script: Script, results: dict[str, Any]) -> None:
    lines = section(script("page").write_page(results), "Memory")
    assert [line.partition(", ")[0] for line in lines if line.startswith("- ")] == [
        "- memory/320: 2026-01-03",
        "- memory/800: 2026-01-02",
    ]


def test_what_failed_and_what_is_missing_is_named(script: Script, results: dict[str, Any]) -> None:
    page = script("page").write_page(results)
    assert "memory/800 **failed**: `no 'm' (1)`" in section(page, "Memory")
    assert "Not measured yet: evaluation, evaluation/masks." in section(page, "Evaluation")
    assert "python bench/evaluation.py --images 5000 --detections 500000" in section(page, "Evaluation")


def test_a_row_of_a_gpu_is_held_against_torchvision_at_its_batch_and_precision(
    script: Script, results: dict[str, Any]
) -> None:
    shared = {"peak_memory_bytes": 5e9, "host_waits": 3, "fraction_of_peak": None}
    rows = [
        {"side": "torchvision", "batch": 2, "seconds": 0.2, "spread": [0.1, 0.4], "images_per_second": 10.0, **shared},
        {"side": "megdet", "batch": 2, "seconds": 0.05, "spread": [0.04, 0.1], "images_per_second": 40.0, **shared},
        {"side": "torchvision", "batch": 8, "error": "out of memory"},
    ]
    rows = [{"precision": "bf16", "stage_milliseconds": {"rest": 1.5}, **row} for row in rows]
    found = {"device": "G", "size": "800x1344", "cuda": "13", "rounds": 5, "steps": 10, "rows": rows}
    results["gpu"] = {**results["memory/320"], "result": found}
    lines = section(script("page").write_page(results), "GPU")
    assert "| 2 | bf16 | torchvision | 10.0 (5.00 to 20.0) | 1.00 | | 5.0 | 3 |" in lines
    assert "| 2 | bf16 | **megdet** | 40.0 (20.0 to 50.0) | 4.00 | | 5.0 | 3 |" in lines
    assert "| 8 | bf16 | torchvision | out of memory | | | | |" in lines
    assert "| 2 | **megdet** | 1.50 |" in lines


def test_a_prediction_stands_beside_the_real_run(script: Script, results: dict[str, Any]) -> None:
    row = {"devices": 2, "micro_batch": 6, "lane_width": 1, "recompute": "block", "rounds": 1}
    row |= {"predicted_seconds": 2.0, "seconds": 2.5, "spread": [2.2, 3.0], "seconds_ratio": 0.8}
    row |= {"predicted_bytes": 1.5 * 2**30, "bytes": 1.2 * 2**30, "bytes_ratio": 1.25}
    row |= {"within": {"memory": False, "time": True}}
    found = {"backbone": "resnet18", "size": 256, "batch": 12, "bn": 6, "sizes": "1,2,4", "rows": [row]}
    found |= {"limits": {"memory": 0.15, "time": 0.25}}
    results["plan"] = {**results["memory/320"], "result": found}
    lines = section(script("page").write_page(results), "Planner")
    assert "| 2 | 1 | 6 | 1 | `block` | 2.00 | 2.50 (2.20 to 3.00) | -20% | 1.50 | 1.20 | +25%, **missed** |" in lines
    assert (
        "resnet18, 256 px, 12 images a step, BN size 6, float32; measured with micro-batches of 1,2,4 images." in lines
    )
    held = "memory is within 15% in 0 of 1 and time is within 25% in 1 of 1"
    assert f"Of these predictions {held}; the others are marked as missed." in lines


def test_a_convolution_has_the_times_of_both_sides(script: Script, results: dict[str, Any]) -> None:
    times = {"output": [12.0, 6.0], "input gradient": [10.0, 12.5], "weight gradient": [9.0, 4.5]}
    found = {"cases": [{"case": [2, 40, 256, 720], "ms": times, "error": [6e-7, 1.3e-6]}]}
    results["winograd"] = {**results["memory/320"], "result": found}
    lines = section(script("page").write_page(results), "3 x 3 convolutions")
    assert "| maps, channels | output | input gradient | weight gradient | error, oneDNN's and ours |" in lines
    cells = "12.0, 6.0: 2.00 | 10.0, 12.5: 0.80 | 9.0, 4.5: 2.00 | 6.0e-07 and 1.3e-06"
    assert f"| 2 x 40 x 40, 256 to 720 | {cells} |" in lines


def test_stages_have_their_limits_and_those_without_time_are_left_out(script: Script, results: dict[str, Any]) -> None:
    nothing = {"forward": 0.0, "backward": 0.0}
    backbone = {
        "ms": {"forward": 98.76, "backward": 198.31},
        "ms_at_limit": {"forward": 60.9, "backward": 120.0},
        "gflop": {"forward": 33.4, "backward": 65.8},
    }
    stages = {"backbone": backbone, "RoI sampling": dict.fromkeys(backbone, nothing)}
    whole = {"side": "megdet fp32", "size": 320, "batch": 2, "rounds": 7, "ms": 400.0, "gflop": 99.2}
    found = {"stages": stages, "limit_gflop_per_second": 500.0, **whole}
    results["stages/320"] = {**results["memory/320"], "result": found}
    lines = section(script("page").write_page(results), "Where a step's time goes")
    assert "| 320 px, batch 2 | forward, ms | at the limit | backward, ms | at the limit | GFLOP |" in lines
    assert "| backbone | 98.8 | 60.9 | 198.3 | 120.0 | 99.2 |" in lines
    assert not any("RoI sampling" in line for line in lines)
    assert "megdet fp32: 400 ms a step, 50% of the limit of 500 GFLOP/s; 7 steps." in lines


def test_pointwise_convolutions_have_both_times(script: Script, results: dict[str, Any]) -> None:
    ms = {"torch": {"output": 140.0}, "megdet": {"output": 70.0}}
    found = {"size": 320, "batch": 2, "flops": 14e9, "ms": ms}
    results["pointwise"] = {**results["memory/320"], "result": found}
    lines = section(script("page").write_page(results), "1 x 1 convolutions on one thread")
    assert "| output | 140.0 | 70.0 | 2.00 | 200 |" in lines


def test_the_scale_has_what_was_measured_and_what_was_predicted(script: Script, results: dict[str, Any]) -> None:
    row = {
        "devices": 2,
        "lane_width": 1,
        "rounds": 2,
        "micro_batch": 4,
        "seconds": 2.0,
        "spread": [1.9, 2.2],
        "images_per_second": 8.0,
        "efficiency": 0.81,
        "waiting": 0.02,
        "collectives": 0.11,
        "predicted_seconds": 2.1,
        "predicted_collectives": 0.09,
    }
    found = {"backbone": "resnet18", "size": 256, "batch": 16, "bn": 8, "cores": 2, "rows": [row]}
    results["scale"] = {**results["memory/320"], "result": found}
    lines = section(script("page").write_page(results), "Scale")
    assert "| 2 | 1 x 2 x 4 | 2.00 (1.90 to 2.20) | 8.00 | 81% | 2% | 11% | 2.10 | 9% |" in lines
    assert "resnet18, 256 px, 16 images a step, BN size 8; 2 cores, one a process." in lines


def test_the_sections_stand_in_their_order(script: Script) -> None:
    titles = re.findall(r"^## (.*)", script("page").write_page({}), flags=re.MULTILINE)
    assert titles == [
        *(
            "A training step",
            "Where a step's time goes",
            "1 x 1 convolutions on one thread",
            "A training step of other detectors",
            "3 x 3 convolutions",
            "Memory",
            "Inference",
            "A busy machine",
            "Cross-device batch norm",
            "Recompute",
        ),
        *("Input", "Images far away", "Starting on a large data set", "Evaluation", "Gradient noise scale", "Planner"),
        *("Scale", "Start", "GPU"),
    ]
