import math
import os
import platform
import signal
import stat
import subprocess
import sys
import time

import pytest

from megdet.errors import InputError
from megdet.files import delete_leftovers, read_json, write_json_atomically, write_text_atomically


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "evaluation.json"
    write_json_atomically(path, {"AP": 0.5})

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"evaluation\.json cannot be written: No space left on device"):
        write_json_atomically(path, {"AP": 0.6})
    assert read_json(path) == {"AP": 0.5}
    assert names_in(tmp_path) == ["evaluation.json"]


def test_a_value_that_json_cannot_say_leaves_the_old_file(tmp_path):
    path = tmp_path / "evaluation.json"
    write_json_atomically(path, {"AP": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomically(path, {"AP": math.nan})
    assert read_json(path) == {"AP": 0.5}


def test_written_files_have_the_permissions_of_any_new_file(tmp_path):
    write_text_atomically(tmp_path / "a", "text")
    (tmp_path / "b").write_text("text")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_of_this_machine_left_is_deleted_and_nothing_else(tmp_path, dead):
    here, old = platform.node(), time.time() - 100
    script = f"""
import os, pathlib, signal
from megdet.files import write_json_atomically
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_json_atomically(pathlib.Path({str(tmp_path / "killed.json")!r}), [1])
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    left = [leftover.name, f".a.json.{here}.{dead}.tmp"]
    kept = [
        *(f".a.json.{here}.{os.getpid()}.tmp", f".a.json.other{here}.{dead}.tmp", f"a.json.{here}.{dead}.tmp"),
        *(f".a.json.{here}.{dead}", f".a.json.{here}.x.tmp", f".a.json.{here}.{10**30}.tmp", ".tmp"),
    ]
    (tmp_path / "inside").mkdir()
    inside = tmp_path / "inside" / f".b.{here}.{dead}.tmp"
    young = tmp_path / f".young.{here}.{dead}.tmp"
    for path in (*(tmp_path / name for name in (*left, *kept)), inside):
        path.touch()
        os.utime(path, (old, old))
    young.touch()
    delete_leftovers(tmp_path)
    assert names_in(tmp_path) == sorted([*kept, young.name, "inside"])
    assert inside.exists()
    delete_leftovers(tmp_path, inside=True)
    assert not inside.exists()
    delete_leftovers(tmp_path / "nowhere", inside=True)


def test_names_of_any_script_and_broken_file_names_survive_json(tmp_path):
    path = tmp_path / "a.json"
    names = ["猫", "Кошка", "🐈", "broken \udc80", 'quote " and \\']
    write_json_atomically(path, names)
    assert read_json(path) == names
    assert "猫" in path.read_text(encoding="utf-8"), "readable as it is"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b'{"a": [1, 2', "line 1, column 12"),
        (b"", "line 1, column 1: the file is empty"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[" * 200_000, "line|nested"),
    ],
)
def test_corrupt_json_is_refused_with_its_place(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        read_json(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "a.json") == [1]
