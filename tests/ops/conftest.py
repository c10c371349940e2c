"""``--record`` writes the outcome of these tests to ``RESULTS.md``."""

import subprocess
from pathlib import Path

import pytest

from tests.recording import Recorder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the outcome to tests/ops/RESULTS.md")


def pytest_configure(config: pytest.Config) -> None:
    # In a run of all tests, this file is read too late to add an option.
    if config.getoption("--record", default=False):
        told = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True)
        prometheus = f"prometheus {(told.stdout or told.stderr).split()[2]}"
        page = Path(__file__).parent / "RESULTS.md"
        config.pluginmanager.register(
            Recorder(page, "Operations", "make test-ops PYTEST_ARGS=--record", prometheus), "recorder"
        )
