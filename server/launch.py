"""The launcher: what ``gale serve`` does before and around its processes.

It binds the port, starts and watches the engine and API processes (:mod:`server.supervision`) and decides the exit
code. It alone acts on signals. It imports neither torch nor the HTTP framework: it is up at once, while its children
import.
"""

import logging
import resource
import signal
import sys
import time
from pathlib import Path

from server import __version__
from server.child import SIGNALS
from server.engine.config import GLAConfig
from server.hub import resolve_model
from server.listeners import base_url, listen
from server.logs import LogSettings, setup_logging
from server.settings import Settings
from server.supervision import Supervisor
from server.types import EngineInfo

logger = logging.getLogger(__name__)

SHIPPED_MODEL = Path(__file__).parent / "assets" / "classics-11m"
_FILES = 1 << 16


def serve(settings: Settings) -> int:
    """Run the server until it is told to stop.

    Returns:
        The exit code: 0 after an orderly stop, 128 + n when a second signal n cut it short.

    Raises:
        SettingsError: something that was asked for does not exist.
        GaleError: the server could not start, or a part of it failed once too often.
    """
    started = time.monotonic()
    logs = LogSettings(settings.log_level, settings.log_format)
    setup_logging(logs, "launcher")
    # Nothing runs yet: the first signal ends the launcher by the usual way out.
    signals = [s for s in SIGNALS if not (s == signal.SIGHUP and signal.getsignal(s) == signal.SIG_IGN)]
    for signum in signals:
        signal.signal(signum, lambda signum, frame: sys.exit(0))
    model_folder = SHIPPED_MODEL if settings.model is None else resolve_model(settings.model, settings.revision)
    GLAConfig.from_folder(model_folder)
    tokenizer_folder = model_folder if settings.tokenizer is None else resolve_model(settings.tokenizer, None)
    _raise_file_limit()
    listeners = listen(settings.host, settings.port, settings.api_server_count)
    url = base_url(settings.host, listeners[0][0])
    names = settings.model_names(model_folder)
    logger.info("Gale %s: loading %s from %s; listening on %s", __version__, names[0], model_folder, url)
    skip = settings.skip_tokenizer_init
    supervisor = Supervisor(
        settings.process_settings(), logs, signals, lambda info: _log_ready(info, names[0], url, started)
    )
    return supervisor.run(
        settings.engine_config(model_folder, None if skip else tokenizer_folder),
        settings.api_settings(model_folder, None if skip else tokenizer_folder),
        listeners,
    )


def _log_ready(info: EngineInfo, name: str, url: str, started: float) -> None:
    seconds = time.monotonic() - started
    logger.info(
        "ready after %.1f s: %s on %s in %s, %d requests at once, %s",
        *(seconds, name, info.device, info.dtype, info.max_num_seqs, url),
    )


def _raise_file_limit() -> None:
    """Each connection takes a file descriptor, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
