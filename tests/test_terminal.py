import io
import os
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from megdet.terminal import Terminal

NAMES = {"\x1b[2J\x07": "\\u001b[2J\\u0007", "a\u202eb": "a\\u202eb", "\udcff.jpg": "\\udcff.jpg", "\r x": "\\r x"}


def printed(*things):
    terminal = Terminal()
    terminal.file = io.StringIO()
    for thing in things:
        terminal.print(thing)
    return terminal.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_escape_sequences_and_direction_marks_are_written_out(name):
    table = Table("class")
    table.add_row(name)
    for thing in (name, table):
        output = printed(thing)
        assert NAMES[name] in output
        assert output.replace("\n", "").isprintable()
    other = Table(title=Text(name))
    other.add_column(Text(name))
    other.add_row(Text(name))
    assert printed(Text(name), other).replace("\n", "").isprintable()


def test_lines_and_brackets_stay():
    assert printed("a\n[bold]b\n\nc") == "a\n[bold]b\n\nc\n"


def test_json_stays_json():
    terminal = Terminal()
    terminal.file = io.StringIO()
    terminal.print_json(data=list(NAMES))
    assert "\\u202e" in terminal.file.getvalue()
    assert "\x1b" not in terminal.file.getvalue()


CODE = """
from megdet.terminal import Terminal, allow_any_character
allow_any_character()
Terminal().print("猫 \\udcff")
"""


@pytest.mark.parametrize(
    ("encoding", "expected"), [("latin-1", b"\\u732b \\udcff\n"), ("utf-8", "猫 \\udcff\n".encode())]
)
def test_a_terminal_that_lacks_a_character_shows_its_number(encoding, expected):
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False
    )
    assert (done.stdout, done.stderr) == (expected, b"")
