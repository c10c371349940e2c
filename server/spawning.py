"""How the launcher starts its children."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import sharedctypes

from server.child import SIGNALS, ChildContext, Heartbeat
from server.children import Child, ChildError
from server.component_settings import ApiSettings, EngineConfig
from server.logs import LogSettings

_spawn_context = multiprocessing.get_context("spawn")


def spawn_engine(name: str, address: str, logs: LogSettings, config: EngineConfig) -> Child:
    """Start an engine process.

    Args:
        name: in log lines and in process listings.
        address: where it binds its socket.
    """
    return _spawn(_run_engine, name, address, logs, config)


def spawn_api(
    name: str,
    address: str,
    logs: LogSettings,
    settings: ApiSettings,
    shutdown_timeout: float,
    deaths: tuple[int, int],
    listeners: list[socket.socket],
) -> Child:
    """Start an API process.

    Args:
        name: in log lines and in process listings.
        address: where the engine binds its socket.
        shutdown_timeout: most seconds that a drain may take.
        deaths: of engines and of API processes so far.
        listeners: bound sockets.
    """
    return _spawn(_run_api, name, address, logs, settings, shutdown_timeout, deaths, listeners)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Children inherit the block, and ignore these signals before they lift it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A folder for this user alone, removed afterwards.

    Raises:
        ChildError: there can be none.
    """
    # The path of a Unix socket has at most 107 bytes, and TMPDIR may be long.
    parent = tempfile.gettempdir()
    try:
        folder = tempfile.mkdtemp(prefix="gale-", dir=parent if len(os.fsencode(parent)) <= 80 else "/tmp")
    except OSError as error:
        raise ChildError(f"cannot make a temporary folder: {error}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _spawn(target: Callable[..., None], name: str, address: str, logs: LogSettings, *arguments: object) -> Child:
    ours, theirs = _spawn_context.Pipe()
    heartbeat = sharedctypes.RawValue("d", 0.0)
    context = ChildContext(name, os.getpid(), address, theirs, logs)
    process = _spawn_context.Process(target=target, args=(context, heartbeat, *arguments), name=f"gale-{name}")
    process.start()
    theirs.close()
    return Child(name, process, ours, heartbeat)


def _run_engine(context: ChildContext, heartbeat: Heartbeat, config: EngineConfig) -> None:
    """Runs in the engine process."""
    with context.role():
        from server.engine.process import main

        main(context, config, heartbeat)


def _run_api(
    context: ChildContext,
    heartbeat: Heartbeat,
    settings: ApiSettings,
    shutdown_timeout: float,
    deaths: tuple[int, int],
    listeners: list[socket.socket],
) -> None:
    """Runs in an API process."""
    with context.role():
        from server.api.process import main

        main(context, settings, shutdown_timeout, deaths, listeners, heartbeat)
