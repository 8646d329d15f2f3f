"""One command runs all benchmarks, keeps what it has, and goes on where one fails."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]

# prints its argument, and counts in a file that it was run
FAKE = """
import sys
from pathlib import Path
with (Path(__file__).parent / "ran").open("a") as file:
    file.write(sys.argv[1] + "\\n")
if sys.argv[1] == "fails":
    sys.exit("it went wrong")
print(sys.argv[1])
"""


@pytest.fixture
def runner(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/all.py with three fake benchmarks, of which the second fails; the page shows what they print as it is."""
    (tmp_path / "fake.py").write_text(FAKE)
    module, page = script("all"), script("page")
    commands = {"data": """fake.py '{"n": 1}'""", "memory/320": "fake.py fails", "memory/800": """fake.py '{"n": 3}'"""}
    monkeypatch.setattr(module, "COMMANDS", commands)
    monkeypatch.setattr(module, "BENCH", tmp_path)
    monkeypatch.setattr(page, "SECTIONS", (page.Section("Some", "Text.", commands, lambda result: [str(result)]),))
    return module


def run(runner: ModuleType, folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and results."""
    code = runner.main([*words, "--results", str(folder / "b.json")])
    return code, json.loads((folder / "b.json").read_text())["results"]


def test_one_that_fails_leaves_its_error_and_the_others_go_on(runner: ModuleType, tmp_path: Path) -> None:
    code, found = run(runner, tmp_path)
    assert code == 1
    assert [found[name].get("result") for name in runner.COMMANDS] == [{"n": 1}, None, {"n": 3}]
    assert found["memory/320"]["error"] == "it went wrong (exit code 1)"
    page = (tmp_path / "b.md").read_text()
    assert "{'n': 1}" in page
    assert "memory/320 **failed**: `it went wrong (exit code 1)`" in page


def test_an_entry_says_when_where_with_what_and_how(runner: ModuleType, tmp_path: Path) -> None:
    entry = run(runner, tmp_path, "--only", "data")[1]["data"]
    assert set(entry) == {"date", "command", "machine", "versions", "git", "result"}
    assert entry["command"] == """python bench/fake.py '{"n": 1}' --json"""
    assert set(entry["versions"]) == {"python", "torch", "torchvision", "timm", "megdet"}
    assert entry["machine"]["cpu"]["cores"] >= 1


def test_only_runs_what_it_names_again_and_keeps_the_others(runner: ModuleType, tmp_path: Path) -> None:
    before = run(runner, tmp_path)[1]
    runner.COMMANDS["data"] = """fake.py '{"n": 7}'"""
    code, found = run(runner, tmp_path, "--only", "data")
    assert code == 0
    assert found["data"]["result"] == {"n": 7}
    assert {**found, "data": None} == {**before, "data": None}
    (tmp_path / "ran").unlink()
    run(runner, tmp_path, "--only", "memory")
    assert (tmp_path / "ran").read_text().splitlines() == ["fails", '{"n": 3}']


def test_missing_goes_on_after_an_interruption(runner: ModuleType, tmp_path: Path) -> None:
    run(runner, tmp_path, "--only", "data")
    run(runner, tmp_path, "--missing")
    assert (tmp_path / "ran").read_text().splitlines() == ['{"n": 1}', "fails", '{"n": 3}']


def test_an_interruption_keeps_what_was_finished(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner.run

    def interrupted(command: str) -> dict[str, Any]:
        if "fails" in command:
            raise KeyboardInterrupt
        return real(command)

    monkeypatch.setattr(runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(runner, tmp_path)
    assert list(json.loads((tmp_path / "b.json").read_text())["results"]) == ["data"]
    assert "{'n': 1}" in (tmp_path / "b.md").read_text()


def test_results_of_another_machine_are_taken_over(runner: ModuleType, tmp_path: Path) -> None:
    run(runner, tmp_path, "--only", "data")
    other = tmp_path / "other.json"
    runner.main(["--only", "memory/800", "--results", str(other)])
    found = run(runner, tmp_path, "--merge", str(other))[1]
    assert {name: entry["result"] for name, entry in found.items()} == {"data": {"n": 1}, "memory/800": {"n": 3}}


@pytest.mark.parametrize("printed", ["nothing", "[1]", "{}{}", "NaN"])
def test_what_is_not_one_object_is_a_failure(runner: ModuleType, tmp_path: Path, printed: str) -> None:
    runner.COMMANDS["data"] = f"fake.py '{printed}'"
    code, found = run(runner, tmp_path, "--only", "data")
    assert code == 1
    assert "JSON object" in found["data"]["error"]


def test_a_name_that_is_none_is_refused_and_nothing_runs(
    runner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(["--only", "data,speed", "--results", str(tmp_path / "b.json")]) == 2
    assert "no benchmark 'speed'; there are data, memory/320, memory/800" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "b.json").exists()
