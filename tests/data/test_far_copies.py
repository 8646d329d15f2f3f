"""Copies of far files: never too many bytes, never a wrong one, whatever processes share or kill."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from megdet.data.far import copies as copies_module
from megdet.data.far.copies import FileCopies

OVERHEAD = 24
"""Bytes of a copy beside its content."""


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.copy"))


def test_a_copy_is_read_back_by_any_process_and_only_under_its_key(tmp_path):
    FileCopies(tmp_path, 1000).write("a", b"content")
    other = FileCopies(tmp_path, 1000)
    assert other.read("a") == b"content"
    assert other.read("b") is None
    other.write("empty", b"")
    assert other.read("empty") == b""


def test_those_used_longest_ago_leave_first_and_the_limit_holds(tmp_path):
    copies = FileCopies(tmp_path, 10 * (100 + OVERHEAD))
    for number in range(10):
        copies.write(str(number), bytes(100))
        assert bytes_in(tmp_path) <= copies.most_bytes
    for old in ("0", "3"):
        assert copies.read(old) is not None  # used again
    copies.write("10", bytes(100))
    kept = [name for name in map(str, range(11)) if copies.read(name) is not None]
    assert kept == ["0", "3", "4", "5", "6", "7", "8", "9", "10"]  # nine tenths are left
    for number in range(11, 60):
        copies.write(str(number), bytes(number))
        assert bytes_in(tmp_path) <= copies.most_bytes
    assert copies.read("59") == bytes(59)


def test_a_file_that_is_larger_than_the_limit_is_not_kept_and_pushes_none_out(tmp_path):
    copies = FileCopies(tmp_path, 1000)
    copies.write("small", b"1")
    copies.write("large", bytes(990))
    assert copies.read("large") is None
    assert copies.read("small") == b"1"


def test_without_room_nothing_is_written(tmp_path):
    FileCopies(tmp_path / "none", 0).write("a", b"1")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("change", ["cut", "flip", "empty"])
def test_a_damaged_copy_is_found_out_and_made_again(tmp_path, change):
    copies = FileCopies(tmp_path, 1000)
    copies.write("a", b"content")
    (file,) = tmp_path.rglob("*.copy")
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-1], "flip": whole[:-1] + b"x", "empty": b""}[change])
    assert copies.read("a") is None
    (notice,) = copies.take_notices()
    assert str(file) in notice
    assert copies.take_notices() == []
    copies.write("a", b"content")
    assert copies.read("a") == b"content"


def test_the_count_is_made_again_where_a_crash_left_none_or_a_wrong_one(tmp_path):
    copies = FileCopies(tmp_path, 10 * (100 + OVERHEAD))
    for number in range(9):
        copies.write(str(number), bytes(100))
    for wrong in (b"", b"123", (1 << 40).to_bytes(8, "little")):
        (tmp_path / "bytes").write_bytes(wrong)
        copies.write(f"new {len(wrong)}", bytes(100))
        assert copies.read(f"new {len(wrong)}") == bytes(100)
        assert bytes_in(tmp_path) <= copies.most_bytes
        assert int.from_bytes((tmp_path / "bytes").read_bytes(), "little") == bytes_in(tmp_path)


def test_what_a_killed_process_was_writing_is_no_copy_and_is_cleared(tmp_path):
    gone = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    gone.start()
    gone.join()
    left = tmp_path / f".{'0' * 40}.copy.1.{copies_module.temporary_name('x').split('.', 3)[2]}.{gone.pid}.tmp"
    left.write_bytes(b"MegDetF1 half")
    os.utime(left, (0, 0))
    FileCopies(tmp_path, 1000)
    assert not left.exists()


def _write_many(folder: Path, first: int) -> None:
    copies = FileCopies(folder, 10_000)
    for number in range(first, first + 60):
        content = bytes([number % 256]) * (200 + number)
        copies.write(str(number), content)
        assert copies.read(str(number)) in (content, None)  # another process may have pushed it out
        assert copies.take_notices() == []
        with FileLock(folder / "lock"):  # nobody deletes meanwhile
            assert bytes_in(folder) <= 10_000


def test_several_processes_share_a_folder_and_its_limit(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(tmp_path, 20 * number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 5_000 < bytes_in(tmp_path) <= 10_000
    assert not [*tmp_path.glob(".*.tmp")]


def test_a_full_disk_is_said_once_and_what_is_there_is_still_read(tmp_path, monkeypatch):
    copies = FileCopies(tmp_path, 1000)
    copies.write("a", b"1")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copies_module.Path, "write_bytes", full)
    copies.write("b", b"2")
    copies.write("c", b"3")
    (notice,) = copies.take_notices()
    assert "no more copies of far images can be kept (No space left on device)" in notice
    assert copies.read("a") == b"1"


def test_a_process_that_holds_the_lock_too_long_costs_a_copy_only(tmp_path, monkeypatch):
    copies = FileCopies(tmp_path, 1000)
    monkeypatch.setattr(copies_module, "_LONGEST_LOCK", 0.05)
    with FileLock(tmp_path / "lock"):
        copies.write("a", b"1")
    assert copies.read("a") is None
    assert copies.take_notices() == []
    copies.write("a", b"1")
    assert copies.read("a") == b"1"


def test_the_folder_may_be_deleted_at_any_time(tmp_path):
    copies = FileCopies(tmp_path / "files", 1000)
    copies.write("a", b"1")
    shutil.rmtree(tmp_path / "files")
    assert copies.read("a") is None
    copies.write("a", b"1")
    assert copies.read("a") == b"1"
