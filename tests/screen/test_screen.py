"""The screen of a training in a real terminal, and what is written where there is none."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli_runs import OVERRIDES, TinyData, make_data
from terminals import SHOW, Seen, run_in_terminal

TINY = [*OVERRIDES, "--model.backbone.name", "test_resnet", "--precision", "float32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A run that was trained in a terminal, and what was seen there."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    return folder, run_in_terminal("train", "demo", "--run", folder, *data.options, *TINY)


def test_a_terminal_shows_the_numbers_of_the_training_and_is_left_as_it_was(trained: tuple[Path, Seen]) -> None:
    _, seen = trained
    assert seen.code == 0, seen.text
    last = seen.text[seen.text.rindex("epoch 1/1") :]
    for part in ("step 3 of 3", "100%", "rpn objectness", "rate", "images/s", "memory", "positive", "mmAP"):
        assert part in last, part
    assert "evaluating step 3" in seen.text
    assert (
        " ".join(seen.text.split()).count("starting, 3 steps;") == 1
    )  # a message stays where it is and is not drawn again
    assert seen.is_cursor_left_visible
    assert "Traceback" not in seen.text


def test_an_interrupt_leaves_the_terminal_sane_and_says_what_is_saved(data: TinyData, tmp_path: Path) -> None:
    options = [*data.options, *TINY, "--schedule.epochs", "500", "--evaluation.every_epochs", "0"]
    seen = run_in_terminal(*("train", "demo", "--run", tmp_path / "run", *options), until=b"images/s")
    assert seen.code == 130
    assert seen.is_cursor_left_visible
    end = seen.raw[seen.raw.rindex(SHOW) :].decode()
    assert "stopped by Ctrl-C: step" in end
    assert (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
def test_piped_output_has_no_control_codes(data: TinyData, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megdet", "train", "demo", *data.options, *TINY]
    done = subprocess.run([*command, "--run", str(tmp_path / "a")], capture_output=True, check=True, timeout=300)
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"step      3/3  loss " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("words", "term"), [(["--plain"], "xterm"), ([], "dumb")])
def test_a_terminal_gets_lines_where_they_are_asked_for_or_it_can_do_no_more(
    words: list[str], term: str, data: TinyData, tmp_path: Path
) -> None:
    seen = run_in_terminal("train", "demo", "--run", tmp_path / "b", *data.options, *TINY, *words, term=term)
    assert seen.code == 0
    assert "step 3/3 loss " in " ".join(seen.text.split())
    assert b"\x1b[2K" not in seen.raw  # nothing is erased, so nothing is drawn twice
    assert seen.is_cursor_left_visible


def test_watch_shows_a_finished_run_in_a_narrow_terminal(trained: tuple[Path, Seen]) -> None:
    seen = run_in_terminal("watch", trained[0], columns=40)
    assert seen.code == 0, seen.text
    assert "done: every step is made and" in seen.text
    lines = re.split(rb"\r|\n|\x1b\[\d*A", seen.raw)  # it is drawn again over itself
    assert max(len(re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", line).decode()) for line in lines) <= 40
    assert seen.is_cursor_left_visible


def test_watch_waits_for_a_run_that_is_not_there_until_it_is_interrupted(tmp_path: Path) -> None:
    waiting = run_in_terminal("watch", tmp_path / "none", until=b"no run in", then=signal.SIGINT)
    assert waiting.code == 0
    assert waiting.is_cursor_left_visible
