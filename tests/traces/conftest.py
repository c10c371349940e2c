"""How many traces and saves there are, and ``--record-traces``, which writes the outcome to ``RESULTS.md``."""

from pathlib import Path

import pytest
import torch

from tests.recording import Recorder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--traces", type=int, default=20, help="random traces of operations on states")
    parser.addoption("--saves", type=int, default=300, help="saves in the midst of which a server is killed")
    parser.addoption("--record-traces", action="store_true", help="write the outcome to tests/traces/RESULTS.md")


def pytest_configure(config: pytest.Config) -> None:
    # In a run of all tests, this file is read too late to add an option.
    if config.getoption("--record-traces", default=False):
        page = Path(__file__).parent / "RESULTS.md"
        command, versions = "make test-traces PYTEST_ARGS=--record-traces", f"torch {torch.__version__}"
        config.pluginmanager.register(
            Recorder(page, "States", command, versions, "the tests' small models"), "recorder"
        )
