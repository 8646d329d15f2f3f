"""What the doctor finds, on machines that a test makes up."""

import json
from pathlib import Path

import pytest

from megdet.cli import examining
from megdet.cli.main import main
from megdet.studies.doctor import limits
from megdet.studies.doctor.finding import Finding
from megdet.studies.doctor.limits import core_quota, look_at_cores, look_at_disk, look_at_shared_memory, look_at_threads
from megdet.studies.doctor.versions import version_fault


def test_versions_that_do_not_fit_are_named() -> None:
    assert version_fault("2.15.0+cu132", "0.29.2", ">=2.14.0") == ("", "")
    assert version_fault("2.11.0", "0.26.0", "==2.11.0")[0] == ""
    assert "megdet needs torch 2.11" in version_fault("2.9.1", "0.26.0")[0]
    assert "asks for torch ==2.11.0" in version_fault("2.12.0", "0.26.0", "==2.11.0")[0]
    assert "asks for torch >=2.14.0" in version_fault("2.13.0", "0.29.0", ">=2.14.0")[0]
    assert version_fault("2.15.0+cpu", "0.29.2+cu132")[0] == "two builds, cpu and cu132"


@pytest.mark.parametrize(
    ("there", "usable", "quota", "ranks", "state"),
    [(8, 8, None, 1, "good"), (8, 8, 2.0, 1, "look"), (8, 1, None, 1, "look"), (8, 4, None, 8, "look")],
)
def test_cores_are_compared_with_the_container_and_the_ranks(
    there: int, usable: int, quota: float | None, ranks: int, state: str
) -> None:
    finding = look_at_cores(there, usable, quota, ranks)
    assert finding.state == state
    assert bool(finding.next_step) == (state != "good")


def test_the_quota_of_a_container_is_read_in_both_versions(tmp_path: Path) -> None:
    assert core_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert core_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert core_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert core_quota(tmp_path) == 4.0


def test_too_many_and_too_few_threads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    for value, cores, state in (
        ("1", 4, "look"),
        ("4", 4, "good"),
        ("64", 4, "look"),
        ("many", 4, "look"),
        ("1", 1, "good"),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert look_at_threads(cores).state == state, value


def test_a_full_disk_is_bad_and_a_small_shared_memory_is_to_be_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Usage:
        total, free = 100 * limits.MIB, 50 * limits.MIB

    monkeypatch.setattr(limits.shutil, "disk_usage", lambda _: Usage)
    assert [finding.state for finding in look_at_disk(tmp_path / "not/there")] == ["bad"]
    shared = look_at_shared_memory(tmp_path)
    assert shared.state == "look"
    assert "--shm-size" in shared.next_step


def test_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    found = list(look_at_disk(tmp_path))
    assert [finding.subject for finding in found] == ["disk", "disk speed"]
    assert found[1].numbers["bytes_a_second"] > 0
    assert not list(tmp_path.iterdir())


def test_the_verb_prints_one_object_and_fails_where_something_is_bad(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json", "--run", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    subjects = {finding["subject"] for finding in found["findings"]}
    assert subjects >= {"versions", "machine", "devices", "precision", "cores", "open files", "disk", "loading"}
    assert "fit to train" in printed.err
    bad = Finding("disk", "bad", "0.1 GiB free", "make room")
    monkeypatch.setattr(examining, "look_at_machine", lambda *_: iter([bad]))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--run", str(tmp_path)])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "not fit to train: 0 good, 0 to look at, 1 bad" in printed
    assert "make room" in printed
