"""Log lines on stderr, as text or as JSON objects, each naming its process.

A record with an attribute ``fields``, a dictionary, has them as members of its JSON object.
"""

import json
import logging
import sys
import time
from dataclasses import dataclass

from server.component_settings import LogFormat, LogLevel

_NOISY = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "httpx", "httpcore", "urllib3", "filelock")


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How every process of the server logs."""

    level: LogLevel
    format: LogFormat


class _Text(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)-7s [{process}] %(message)s", "%Y-%m-%d %H:%M:%S")


class _Json(logging.Formatter):
    """One object per line; times in UTC."""

    def __init__(self, process: str) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def setup_logging(settings: LogSettings, process: str) -> None:
    """Send this process's log lines to stderr, replacing whatever was set up before.

    Args:
        process: ``launcher``, ``engine``, ``api-0`` ...; stands in every line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if settings.format == "json" else _Text(process))
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    if settings.level != "debug":
        # Libraries' everyday lines; their warnings still show.
        for name in _NOISY:
            logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
