"""What tests of the command line share."""

from collections.abc import Callable

import pytest

from megdet.cli.main import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; returns its one line."""

    def run(*words: object) -> str:
        code = main([str(word) for word in words])
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("megdet")]
        assert code == 2, error
        assert len(lines) == 1, error
        assert "Traceback" not in error
        return lines[0]

    return run
