"""One real server, on the shipped model, for all end-to-end tests of a run."""

from collections.abc import Iterator

import pytest

from tests.e2e.running import RunningServer


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A running server with default settings. Tests may use it, but must not stop it."""
    with RunningServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def base_url(server: RunningServer) -> str:
    """Where the server of this run listens, without ``/v1``."""
    return server.base_url
