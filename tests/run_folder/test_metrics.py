import json
import math
import os
from pathlib import Path

import pytest

from megdet.errors import InputError
from megdet.run_folder.metrics import MetricsWriter, read_metrics


def test_what_is_written_is_read_back_line_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": 0.1 + 0.2, "rate": math.inf})
        assert read_metrics(path) == [{"step": 1, "loss": 0.1 + 0.2, "rate": math.inf}], "each line is flushed"
        writer.write({"step": 2, "loss": math.nan, "evaluation": {"AP": 0.5}})
    assert math.isnan(read_metrics(path)[1]["loss"])

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_resume_removes_the_steps_that_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(1, 6):
            writer.write({"step": step, "part": 1})
    with MetricsWriter(path, resume_step=3) as writer:
        for step in range(4, 7):
            writer.write({"step": step, "part": 2})
    assert [(line["step"], line["part"]) for line in read_metrics(path)] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)
    ]  # fmt: skip


def test_a_start_from_the_beginning_removes_all_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsWriter(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("half", ['{"step": 3, "lo', '{"step"', "3", "\0\0\0", '{"step": 3, "loss": "\udce4'])
def test_half_a_line_at_the_end_is_dropped(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + half.encode("utf-8", "surrogateescape"))
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    with MetricsWriter(path, resume_step=9) as writer:
        writer.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with MetricsWriter(path, resume_step=2) as writer:
        writer.write({"step": 3})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_refused_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    content = '{"step": 1}\nnot json\n{"step": 3}\n'
    path.write_text(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2 is not a JSON object"):
        read_metrics(path)
    with pytest.raises(InputError, match="line 2"):
        MetricsWriter(path, resume_step=1)
    assert path.read_text() == content


def test_a_record_without_a_step_is_a_bug(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer, pytest.raises(ValueError, match="integer 'step'"):
        writer.write({"loss": 1.0})


FULL = Path("/dev/full")


def write_to_a_full_disk(path: Path) -> None:
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        os.dup2(os.open(FULL, os.O_WRONLY), writer._file.fileno())
        writer.write({"step": 2})


@pytest.mark.skipif(not FULL.exists(), reason="a disk that is always full is a file of Linux")
def test_a_full_disk_is_told_once_and_not_again_when_the_file_is_closed(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be written: No space left on device"):
        write_to_a_full_disk(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_disk_that_fails_as_the_file_is_closed_is_told_unless_something_worse_was(tmp_path, monkeypatch):
    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="No space left on device"), MetricsWriter(tmp_path / "metrics.jsonl"):
        pass
    with pytest.raises(ValueError, match="worse"), MetricsWriter(tmp_path / "metrics.jsonl"):
        raise ValueError("worse")


def test_metrics_that_cannot_be_written_or_read_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        MetricsWriter(tmp_path / "file" / "metrics.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")
