"""One real server, on the shipped model, for all end-to-end tests of a run."""

from collections.abc import Iterator

import pytest

from tests.e2e.running import RunningServer

CHAT_TEMPLATE = (
    '{{ bos_token }}{% for m in messages %}{% if m.role == "assistant" %}"{{ m.content }}" he said.{{ eos_token }}'
    '{% elif m.role == "system" %}{{ m.content }}\n{% elif m.role == "user" %}"{{ m.content }}" she said.\n'
    '{% else %}{{ raise_exception("Nobody is called " ~ m.role ~ " here.") }}{% endif %}{% endfor %}'
    '{% if add_generation_prompt %}"{{ opening }}{% endif %}'
)
"""A conversation in a novel: the shipped model has no template, having read only books."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A running server with default settings and a chat template. Tests may use it, but must not stop it."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    with RunningServer(folder, "--chat-template", str(folder / "chat.jinja")) as running:
        yield running


@pytest.fixture(scope="session")
def base_url(server: RunningServer) -> str:
    """Where the server of this run listens, without ``/v1``."""
    return server.base_url
