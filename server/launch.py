"""The launcher: binds the port, spawns the engine and API processes, watches them, ends them.

It is the only process that acts on signals and the only one that outlives a failure, so it decides the
exit code. It imports neither torch nor the HTTP framework: it is up at once, while its children import.
"""

import contextlib
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from server import __version__
from server.child import SIGNALS, ChildContext, Drain, EngineDied, Failed, Stop, ToApi, ToEngine, ToLauncher
from server.engine.config import GLAConfig
from server.errors import GaleError
from server.hub import resolve_model
from server.listeners import base_url, close_all, listen
from server.logs import LogSettings, setup_logging
from server.settings import ApiSettings, EngineConfig, Settings
from server.types import EngineInfo

logger = logging.getLogger(__name__)

SHIPPED_MODEL = Path(__file__).parent / "assets" / "classics-11m"

_API_END_SECONDS = 5.0
"""Beyond the drain's own time, before an API process is killed. Longer than its own grace."""
_ENGINE_END_SECONDS = 2.0
_KILLED_SECONDS = 5.0
"""A process stuck inside a device driver may not even obey SIGKILL; do not wait for ever."""
_FILES = 1 << 16

_spawn_context = multiprocessing.get_context("spawn")


class ChildError(GaleError):
    """A child process failed, and the server with it."""

    def __init__(self, reason: str, exit_code: int = 1) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class _SignalledAgain(Exception):
    """A second signal: end at once."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


@dataclass(slots=True)
class _Child:
    """A child process as the launcher sees it.

    Attributes:
        control: the launcher's end of the pipe; None after the child's end was seen.
        failure: its last words.
        info: the engine's.
    """

    name: str
    process: SpawnProcess
    control: "Connection[ToApi | ToEngine, ToLauncher] | None"
    ready: bool = False
    failure: Failed | None = None
    info: EngineInfo | None = None

    @property
    def alive(self) -> bool:
        return self.process.exitcode is None

    def tell(self, message: ToApi | ToEngine) -> None:
        """Send; where the child has just ended, its sentinel will say so."""
        if self.control is not None:
            with contextlib.suppress(OSError):
                self.control.send(message)

    def listen(self) -> None:
        """Take in what the child has said; never waits."""
        try:
            while self.control is not None and self.control.poll():
                message = self.control.recv()
                if isinstance(message, Failed):
                    self.failure = message
                else:
                    self.ready = True
                    self.info = message.info
        except (EOFError, OSError):
            self.control = None

    def error(self) -> ChildError:
        """Why it ended, in one line."""
        self.listen()  # Its last words may have come after the last look.
        if self.failure is not None:
            return ChildError(self.failure.reason, self.failure.exit_code)
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildError(f"the {self.name} process {how}")


def serve(settings: Settings) -> int:
    """Run the server until it is told to stop.

    Returns:
        The exit code: 0 after an orderly stop, 128 + n when a second signal n cut it short.

    Raises:
        SettingsError: something that was asked for does not exist.
        GaleError: the server could not start, or a part of it failed.
    """
    started = time.monotonic()
    setup_logging(LogSettings(settings.log_level, settings.log_format), "launcher")
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
    launcher = Launcher(settings, signals, lambda info: _log_ready(info, names[0], url, started))
    return launcher.run(
        settings.engine_config(model_folder, None if skip else tokenizer_folder),
        settings.api_settings(model_folder, None if skip else tokenizer_folder),
        listeners,
    )


class Launcher:
    """Spawns and supervises the processes.

    Args:
        settings: of logs and shutdown.
        signals: those to act on.
        on_ready: called once every process can serve.
    """

    def __init__(
        self, settings: Settings, signals: Sequence[signal.Signals], on_ready: Callable[[EngineInfo], None]
    ) -> None:
        self._logs = LogSettings(settings.log_level, settings.log_format)
        self._shutdown_timeout = settings.shutdown_timeout
        self._signals = signals
        self._on_ready = on_ready
        self._received: list[int] = []
        self._wakeup, self._wakeup_writer = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_writer.setblocking(False)
        self._children: list[_Child] = []  # the engine, then the API processes

    def run(self, engine: EngineConfig, api: ApiSettings, listeners: list[list[socket.socket]]) -> int:
        """Spawn, watch, end; leaves no process and no file behind, whatever happens.

        Raises:
            ChildError: a child failed.
        """
        with _private_folder() as folder:
            try:
                self._spawn_all(f"ipc://{folder}/engine", engine, api, listeners)
                self._watch()
                self._end()
            except _SignalledAgain as again:
                logger.warning("%s: ending at once", signal.Signals(again.signum).name)
                return 128 + again.signum
            finally:
                for child in self._children:
                    child.process.kill()
                for child in self._children:
                    child.process.join(_KILLED_SECONDS)
        return 0

    @property
    def _engine(self) -> _Child:
        return self._children[0]

    @property
    def _apis(self) -> list[_Child]:
        return self._children[1:]

    def _spawn_all(
        self, address: str, engine: EngineConfig, api: ApiSettings, listeners: list[list[socket.socket]]
    ) -> None:
        # Python's helper process; starting it unblocks signals, so it must not start in what follows.
        resource_tracker.ensure_running()
        # Children inherit the block, and ignore these signals before they lift it.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._spawn("engine", address, _run_engine, engine)
            for index, sockets in enumerate(listeners):
                self._spawn(f"api-{index}", address, _run_api, api, self._shutdown_timeout, sockets)
                close_all(sockets)
            signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
            for signum in self._signals:
                signal.signal(signum, lambda signum, frame: self._received.append(signum))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _spawn(self, name: str, address: str, target: Callable[..., None], *arguments: object) -> None:
        ours, theirs = _spawn_context.Pipe()
        context = ChildContext(name=name, launcher_pid=os.getpid(), address=address, control=theirs, logs=self._logs)
        process = _spawn_context.Process(target=target, args=(context, *arguments), name=f"gale-{name}")
        process.start()
        theirs.close()
        self._children.append(_Child(name, process, ours))

    def _watch(self) -> None:
        """Return on the first signal.

        Raises:
            ChildError: a child failed; all have ended.
        """
        announced = False
        while not self._received:
            self._wait()
            for child in self._children:
                if child.failure is not None or not child.alive:
                    self._end_after_failure(child)
                    raise child.error()
            if not announced and all(child.ready for child in self._children):
                announced = True
                assert self._engine.info is not None
                self._on_ready(self._engine.info)

    def _end(self) -> None:
        """End in order: requests, API processes, engine.

        Raises:
            ChildError: the engine died while requests were still running.
        """
        timeout = self._shutdown_timeout if self._engine.ready else 0.0
        name = signal.Signals(self._received[0]).name
        logger.info("%s: no new requests; those running have %g s; once more ends at once", name, timeout)
        self._tell_apis(Drain(timeout))
        deadline = time.monotonic() + timeout + _API_END_SECONDS
        engine_died = False
        while any(api.alive for api in self._apis) and time.monotonic() < deadline:
            self._wait(deadline)
            if not self._engine.alive and not engine_died:
                engine_died = True
                self._tell_apis(EngineDied())
        if engine_died:
            raise self._engine.error()
        self._end_engine()
        logger.info("stopped")

    def _end_after_failure(self, failed: _Child) -> None:
        serving = self._engine.ready
        if failed is self._engine:
            failed.process.kill()  # Where it has told why, it may still hang in its driver's clean-up.
        self._tell_apis(EngineDied() if failed is self._engine and serving else Drain(0))
        deadline = time.monotonic() + _API_END_SECONDS
        while any(api.alive for api in self._apis) and time.monotonic() < deadline:
            self._wait(deadline)
        self._end_engine()

    def _end_engine(self) -> None:
        if not self._engine.ready:
            return  # Busy loading, with nothing to lose; the end of run() kills it.
        self._engine.tell(Stop())
        deadline = time.monotonic() + _ENGINE_END_SECONDS
        while self._engine.alive and time.monotonic() < deadline:
            self._wait(deadline)

    def _tell_apis(self, message: ToApi) -> None:
        for api in self._apis:
            api.tell(message)

    def _wait(self, deadline: float | None = None) -> None:
        """Wait for a child's message, a child's end, a signal or the deadline.

        Raises:
            _SignalledAgain: a signal beyond the first.
        """
        sources: list[Any] = [self._wakeup]
        for child in self._children:
            if child.alive:
                sources.append(child.process.sentinel)
            if child.control is not None:
                sources.append(child.control)
        wait(sources, None if deadline is None else max(0.0, deadline - time.monotonic()))
        for child in self._children:
            child.listen()
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)
        if len(self._received) > 1:
            raise _SignalledAgain(self._received[1])


def _run_engine(context: ChildContext, config: EngineConfig) -> None:
    """Runs in the engine process."""
    with context.role():
        from server.engine.process import main

        main(context, config)


def _run_api(
    context: ChildContext, settings: ApiSettings, shutdown_timeout: float, listeners: list[socket.socket]
) -> None:
    """Runs in an API process."""
    with context.role():
        from server.api.process import main

        main(context, settings, shutdown_timeout, listeners)


@contextlib.contextmanager
def _private_folder() -> Iterator[str]:
    """A folder for this user alone, removed afterwards."""
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
