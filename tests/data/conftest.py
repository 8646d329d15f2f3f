"""What tests of the data share."""

import pytest

from far_servers import far_server
from megdet.data.far import reading


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """The folder of the user's cache, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megdet"


@pytest.fixture
def short_pauses(monkeypatch):
    """Requests are made again at once."""
    monkeypatch.setattr(reading, "_FIRST_PAUSE", 0.001)


@pytest.fixture
def server(tmp_path, short_pauses):
    """A server of the folder `served`."""
    (tmp_path / "served").mkdir()
    with far_server(tmp_path / "served") as running:
        yield running
