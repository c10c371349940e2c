"""Servers with a scripted engine, shared by the tests of a module that do not change them."""

from collections.abc import Iterator

import pytest

from tests.api.scripted import Server, serve


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with a tokenizer and no keys."""
    with serve() as running:
        yield running
