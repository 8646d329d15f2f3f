"""What the tests of the web demo share."""

from collections.abc import Iterator

import pytest

from app_servers import Command, command


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """One process for all tests that only ask it something."""
    with command(tmp_path_factory.mktemp("serve")) as own:
        yield own
