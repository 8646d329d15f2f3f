"""bench/gpu.py without a GPU: what it writes and when it stops; its measurements need a device."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

OUT_OF_MEMORY = {"error": "out of memory"}
WORDS = ["--batches", "16,2", "--precisions", "bf16", "--sides", "torchvision,megdet"]
ROWS = [("torchvision", 16), ("megdet", 16), ("torchvision", 2), ("megdet", 2)]


@pytest.fixture
def bench(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    return module


def test_the_file_has_every_line_as_soon_as_it_is_measured(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    lengths: list[int] = []

    def measured(*_: Any) -> dict[str, Any]:
        lengths.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
        return OUT_OF_MEMORY

    monkeypatch.setattr(bench, "measured", measured)
    assert bench.main([*WORDS, "--out", str(out), "--json"]) == 0
    assert lengths == [0, 1, 2, 3]
    found = json.loads(out.read_text())
    assert [(row["side"], row["batch"]) for row in found["rows"]] == ROWS
    assert found["peak_tflops"]["bf16"] == 989.5
    assert json.loads(capsys.readouterr().out) == found


def test_what_there_is_no_time_for_is_listed(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*WORDS, "--minutes", "0"]) == 0
    assert capsys.readouterr().out.count("ms: no time was left") == len(ROWS)


def test_a_failed_gpu_test_fails_the_command(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "gpu_tests", lambda: {"exit_code": 1, "last_lines": ["1 failed, 5 passed"]})
    assert bench.main([*WORDS, "--minutes", "0", "--tests"]) == 1
    assert "GPU tests: 1 failed, 5 passed" in capsys.readouterr().out
