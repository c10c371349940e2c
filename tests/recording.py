"""Keeps the outcome of a run as a page, for tests that take programs or time that not every run has."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import pytest


class Recorder:
    """A pytest plugin that collects outcomes, and what tests say of themselves with ``record_property``.

    Args:
        page: where to write.
        title: of the page.
        command: that wrote it.
        versions: of what was used, beside Python's.
        models: that were served.
    """

    def __init__(self, page: Path, title: str, command: str, versions: str, models: str = "the shipped model") -> None:
        self._page, self._title, self._command, self._versions = page, title, command, versions
        self._models = models
        self._rows: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            remarks = "; ".join(f"{name}: {value}" for name, value in report.user_properties)
            name = report.nodeid.rsplit(f"{self._page.parent.name}/", 1)[-1].replace("|", "\\|")
            self._rows.append(f"| `{name}` | {report.outcome} | {report.duration:.1f} | {remarks} |")

    def pytest_sessionfinish(self) -> None:
        self._page.write_text(
            f"# {self._title}: the last recorded run\n\n"
            f"Written by `{self._command}`.\n\n"
            f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, {self._versions}; "
            f"{self._models} on a CPU ({platform.machine()}, {os.cpu_count()} cores).\n\n"
            "| test | outcome | seconds | remarks |\n| --- | --- | ---: | --- |\n" + "\n".join(self._rows) + "\n"
        )
