"""Clients that people use, against a real server on the shipped model; ``make test-clients`` runs them.

They need packages that Gale does not, so they have an environment of their own (``requirements.txt``), from which the
server is started with the interpreter that ``SERVER_PYTHON`` names. ``--record`` writes what came of it to
``RESULTS.md``.
"""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.e2e.running import RunningServer
from tests.recording import Recorder

# Before the clients are imported: none of them may look for anything on a network.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",
    "DO_NOT_TRACK": "1",
}

MODEL = "classics-11m"
KEY = "sk-clients"
CLIENTS = ("openai", "langchain-openai", "litellm", "lm_eval", "schemathesis")
RESULTS = Path(__file__).parent / "RESULTS.md"
# As small as a template can be that keeps roles apart.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a key and a chat template."""
    folder = tmp_path_factory.mktemp("server")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    # The examples do not say when a chat should end, and old books do not either.
    flags = ("--api-key", KEY, "--chat-template", str(template), "--max-model-len", "512")
    with RunningServer(folder, *flags) as running:
        yield running


@pytest.fixture(scope="session")
def v1(server: RunningServer) -> str:
    """The base URL that OpenAI's clients want."""
    return f"{server.base_url}/v1"


# What the last run gave.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the outcome to tests/clients/RESULTS.md")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        versions = ", ".join(f"{name} {version(name)}" for name in CLIENTS)
        command = "make test-clients CLIENTS_ARGS=--record"
        config.pluginmanager.register(Recorder(RESULTS, "Clients", command, versions))
