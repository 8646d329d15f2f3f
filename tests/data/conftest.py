"""What tests of the data share."""

import pytest


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """The folder of the user's cache, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megdet"
