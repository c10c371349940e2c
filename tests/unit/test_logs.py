"""Log lines as text and as JSON."""

import json
import logging
from collections.abc import Iterator

import pytest

from server.logs import LogSettings, setup_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogSettings("info", "json"), "engine")
    log = logging.getLogger("server.test")
    log.info('first "line"\nand second')
    log.debug("not shown")
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("failed")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "process": "engine",
        "logger": "server.test",
        "message": 'first "line"\nand second',
    }
    assert "ValueError: bad" in second["exception"]


def test_text_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogSettings("warning", "text"), "api-0")
    logging.getLogger("server.test").info("not shown")
    logging.getLogger("server.test").warning("%d%% of %s", 100, "it")
    assert capsys.readouterr().err.endswith(" WARNING [api-0] 100% of it\n")


def test_libraries_everyday_lines_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogSettings("info", "text"), "api-0")
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert capsys.readouterr().err.count("\n") == 1
