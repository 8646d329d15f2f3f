import math
import os
import platform
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from megdet.errors import InputError
from megdet.files import (
    delete_leftovers,
    read_json,
    read_text,
    replace_file,
    temporary_name,
    write_json_atomically,
    write_text_atomically,
)


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
    folder = tmp_path / f".folder.{here}.{dead}.tmp"
    (folder / "inside").mkdir(parents=True)
    os.utime(folder, (old, old))
    delete_leftovers(tmp_path)
    assert names_in(tmp_path) == sorted([*kept, young.name, "inside"])
    assert inside.exists()
    delete_leftovers(tmp_path, inside=True)
    assert not inside.exists()
    delete_leftovers(tmp_path / "nowhere", inside=True)


def test_names_of_any_script_survive_json_and_bytes_that_are_no_text_are_written_out(tmp_path):
    path = tmp_path / "a.json"
    names = ["猫", "Кошка", "🐈", "broken \udc80", 'quote " and \\']
    write_json_atomically(path, names)
    assert read_json(path) == [*names[:3], "broken \\udc80", names[4]]
    assert "猫" in path.read_text(encoding="utf-8"), "readable as it is"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b'{"a": [1, 2', "line 1, column 12"),
        (b"", "line 1, column 1: the file is empty"),
        (b"\xff\xfe", "is not UTF-8 text but UTF-16"),
        (b'"\xff"', "is not UTF-8 text"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, "nested too deeply"),
        (b'"\\ud800 and more"', "surrogate"),
        (b"[NaN]", "line 1, column 2: NaN and Infinity"),
        (b"[1, -Infinity]", "line 1, column 6: NaN and Infinity"),
        (b"1" * 5000, "out of range"),
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


@dataclass
class Row:
    name: str
    sides: tuple[float, float]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": "a"}', "a.json: object missing required field sides, here stands {'name': 'a'}"),
        ('{"name": "a", "sides": [1, "2"]}', "a.json: sides[1]: expected float, got str, here stands '2'"),
        ('{"name": "a", "sides": [1]}', "a.json: sides: expected array of length 2, here stands [1]"),
        ('{"name": true, "sides": [1, 2]}', "a.json: name: expected str, got bool, here stands True"),
        ('{"name": "a", "sides": [1, 1' + 400 * "0" + "]}", "a.json: sides[1]: number out of range"),
        ("[]", "a.json: expected object, got array, here stands []"),
        ("[" * 200_000, "a.json: expected object, got array"),
    ],
)
def test_what_is_not_of_the_type_asked_for_is_refused_with_its_place_and_value(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError) as refused:
        read_json(tmp_path / "a.json", Row)
    assert str(refused.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_json_is_read_as_the_type_asked_for(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "a", "sides": [1, 2.5], "more": 1}')
    assert read_json(tmp_path / "a.json", Row) == Row("a", (1.0, 2.5))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a plain file"):
        read_text(tmp_path / "pipe")


def test_a_huge_text_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="1099511627776 bytes, more than"):
        read_text(tmp_path / "a")


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    (tmp_path / temporary_name("other")).symlink_to(tmp_path / "precious")
    replace_file(tmp_path / "out", b"new")
    replace_file(tmp_path / "other", b"new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "out").read_text() == (tmp_path / "other").read_text() == "new"
    assert names_in(tmp_path) == ["other", "out", "precious"]


def test_a_file_may_have_the_longest_name_that_the_system_allows(tmp_path):
    for name in ("x" * 255, "猫" * 85):
        replace_file(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
