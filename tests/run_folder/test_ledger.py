"""A ledger is a chain: no line of it can be changed, lost or moved without notice."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledgers import images, start, state, steps, written
from megdet.errors import InputError
from megdet.run_folder import ledger as ledger_module
from megdet.run_folder.ledger import (
    BrokenChainError,
    append_line,
    course,
    digest_of_images,
    digest_of_numbers,
    read_chain,
    sealed,
)

ENTRIES = [start(), steps(0, 3), images(3), steps(3, 10), start(3), steps(3, 6), steps(6, 10)]
CONTENT, HASHES = written(ENTRIES)
LINES = CONTENT.splitlines(keepends=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger") / "ledger.jsonl"


def test_a_chain_that_was_written_is_read_as_it_was(file: Path) -> None:
    file.write_bytes(CONTENT)
    chain = read_chain(file)
    assert [type(entry) for entry in chain.entries] == [type(entry) for entry in ENTRIES]
    assert (list(chain.hashes), chain.head, chain.size, chain.is_torn) == (HASHES, HASHES[-1], len(CONTENT), False)
    assert chain.entries[5] == steps(3, 6, line=6, previous=HASHES[4])


@given(place=st.integers(0, len(CONTENT) - 1), byte=st.integers(0, 255), how=st.sampled_from(["put", "cut", "change"]))
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_is_found_and_its_line_named(file: Path, place: int, byte: int, how: str) -> None:
    behind = {"put": CONTENT[place:], "cut": CONTENT[place + 1 :], "change": CONTENT[place + 1 :]}[how]
    changed = CONTENT[:place] + (b"" if how == "cut" else bytes([byte])) + behind
    file.write_bytes(changed)
    if changed == CONTENT:
        return
    number = CONTENT.count(b"\n", 0, place) + 1
    if number == len(LINES) and not changed.endswith(b"\n"):
        assert HASHES[-1] not in read_chain(file).hashes, "half a line, which whoever knows the head misses"
        return
    with pytest.raises(BrokenChainError) as caught:
        read_chain(file)
    assert f"{file} line {number} is not what was written" in str(caught.value)


@given(order=st.lists(st.integers(0, len(LINES) - 1), max_size=len(LINES) + 1))
def test_lines_that_are_missing_moved_or_there_twice_are_found(file: Path, order: list[int]) -> None:
    file.write_bytes(b"".join(LINES[place] for place in order))
    right = next((place for place, own in enumerate(order) if own != place), len(order))
    if right == len(order):  # only lines at the end are missing: a chain, but not that of the head
        chain = read_chain(file)
        assert list(chain.hashes) == HASHES[:right]
        assert (HASHES[-1] in chain.hashes) == (right == len(LINES))
        return
    with pytest.raises(BrokenChainError, match=f"line {right + 1}: here stands what was line {order[right] + 1}: "):
        read_chain(file)


def test_a_line_of_another_ledger_is_found(file: Path) -> None:
    other, _ = written([start(num_images=14), *ENTRIES[1:]])
    file.write_bytes(b"".join([*LINES[:4], *other.splitlines(keepends=True)[4:]]))
    with pytest.raises(BrokenChainError, match="line 5: it does not follow from the line before"):
        read_chain(file)


def test_a_line_that_is_whole_but_not_ours_is_named(file: Path) -> None:
    line, _ = sealed(images(3))
    file.write_bytes(line.replace(b"images", b"poster"))
    with pytest.raises(BrokenChainError, match="line 1 is not what was written"):
        read_chain(file)


@given(size=st.integers(0, len(CONTENT)))
def test_a_kill_in_the_middle_of_a_line_leaves_a_chain_that_goes_on(file: Path, size: int) -> None:
    file.write_bytes(CONTENT[:size])
    chain = read_chain(file)
    whole = CONTENT[:size].count(b"\n")
    assert list(chain.hashes) == HASHES[:whole]
    assert chain.is_torn == (size > chain.size == len(b"".join(LINES[:whole])))
    if whole < len(LINES):
        append_line(file, LINES[whole], chain.size)
        assert file.read_bytes() == b"".join(LINES[: whole + 1])


def test_a_line_that_the_disk_refuses_leaves_the_file_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(CONTENT)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger_module.os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        append_line(file, LINES[-1], len(CONTENT))
    assert file.read_bytes() == CONTENT


def test_lines_of_steps_that_are_made_again_do_not_count() -> None:
    counted = course(ENTRIES)
    assert [(type(entry).__name__, entry.step) for entry in counted] == [
        ("Start", 0),
        ("Steps", 3),
        ("Start", 3),
        ("Steps", 6),
        ("Steps", 10),
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([steps(0, 3)], "there is no start of the run before it"),
        ([start(), steps(2, 3)], "it has the steps from 2 on, and the last line that counts ends at 0"),
        ([start(), steps(0, 3), start(5)], "went on from step 5, and what it did after step 3 is in no line"),
        (
            [start(), steps(0, 3), start(3, state=state(4))],
            "went on from step 3 with another state than line 1 has: model",
        ),
        ([start(), steps(0, 3), steps(3, 3)], "it has the steps from 3 on, and the last line that counts ends at 3"),
    ],
)
def test_a_line_that_does_not_continue_the_run_is_named(entries: list[ledger_module.Entry], message: str) -> None:
    with pytest.raises(BrokenChainError, match=message):
        course(entries)


def test_the_digest_of_numbers_leaves_out_what_belongs_to_the_machine_and_nothing_else() -> None:
    line = {"step": 1, "loss": 0.1, "agvm": {"rpn": float("nan")}}
    own = digest_of_numbers([line])
    assert digest_of_numbers([{**line, "seconds": 2.0, "data_seconds": 1.0, "peak_memory_bytes": 5}]) == own
    assert digest_of_numbers([dict(reversed(line.items()))]) == own
    assert digest_of_numbers([{**line, "loss": 0.10000000000000002}]) != own
    assert digest_of_numbers([line, line]) != own


def test_the_digest_of_images_knows_their_order_and_their_steps() -> None:
    own = digest_of_images([[1, 2], [3, 4]])
    assert len({own, digest_of_images([[1, 2, 3], [4]]), digest_of_images([[2, 1], [3, 4]])}) == 3
    assert digest_of_images([["1"]]) != digest_of_images([[1]])
