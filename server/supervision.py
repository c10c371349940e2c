"""The launcher's children: started, watched, replaced when they die, and ended in order.

A server that has been ready once outlives the death of its parts. An API process that dies is replaced, and its
siblings go on. An engine that dies, or hangs, takes the running requests along: their streams end with an error, and
requests are refused until a new engine has loaded the model. A part that keeps dying ends the server.
"""

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker, sharedctypes
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from server.child import (
    SIGNALS,
    ChildContext,
    Drain,
    EngineDied,
    EngineStarting,
    Failed,
    Heartbeat,
    Stop,
    ToApi,
    ToEngine,
    ToLauncher,
)
from server.errors import GaleError
from server.listeners import close_all
from server.logs import LogSettings
from server.metrics import MULTIPROCESS_FOLDER
from server.settings import ApiSettings, EngineConfig, ProcessSettings
from server.types import EngineInfo

logger = logging.getLogger(__name__)

_API_END_SECONDS = 5.0
"""Beyond the drain's own time, before an API process is killed. Longer than its own grace."""
_ENGINE_END_SECONDS = 2.0
_KILLED_SECONDS = 5.0
"""A process stuck inside a device driver may not even obey SIGKILL; do not wait for ever."""
_STABLE_SECONDS = 120.0
"""A child that has served for so long has nothing to do with the deaths before it."""
_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 30.0

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
        heartbeat: where an engine notes when it began the turn that it is in.
        failure: its last words.
        info: the engine's.
        ready_since: by ``time.monotonic``; None before it could serve.
    """

    name: str
    process: SpawnProcess
    control: "Connection[ToApi | ToEngine, ToLauncher] | None"
    heartbeat: Heartbeat | None = None
    failure: Failed | None = None
    info: EngineInfo | None = None
    ready_since: float | None = None
    replacing: bool = False
    """Whether it has yet to take over from one that died."""

    @property
    def alive(self) -> bool:
        return self.process.exitcode is None

    @property
    def dead(self) -> bool:
        """Whether it has ended, or has said that it is about to."""
        return self.failure is not None or not self.alive

    @property
    def ready(self) -> bool:
        return self.ready_since is not None

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
                    self.ready_since = time.monotonic()
                    self.info = message.info
        except (EOFError, OSError):
            self.control = None

    def kill(self) -> None:
        """End it now, whatever it does, and close the pipe."""
        self.process.kill()
        self.process.join(_KILLED_SECONDS)
        if self.control is not None:
            self.control.close()
            self.control = None

    def error(self) -> ChildError:
        """Why it ended, in one line."""
        self.listen()  # Its last words may have come after the last look.
        if self.failure is not None:
            return ChildError(self.failure.reason, self.failure.exit_code)
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildError(f"the {self.name} process {how}")


@dataclass(slots=True)
class _Place:
    """What a child is started for, again and again if need be.

    Attributes:
        name: of the process.
        child: who holds the place; None while the next one waits to be started.
        deaths: in a row, without one that served for long between them.
        due: when to start the next one, by ``time.monotonic``.
    """

    name: str
    child: _Child | None = None
    deaths: int = 0
    due: float = 0.0
    listeners: list[socket.socket] = field(default_factory=list)

    def bury(self, child: _Child) -> float:
        """Count the death of the child; seconds until the next should start."""
        self.child = None
        if child.ready_since is not None and time.monotonic() - child.ready_since > _STABLE_SECONDS:
            self.deaths = 0
        self.deaths += 1
        seconds = min(_FIRST_BACKOFF_SECONDS * 2.0 ** (self.deaths - 1), _LONGEST_BACKOFF_SECONDS)
        self.due = time.monotonic() + seconds
        return seconds


class Supervisor:
    """Starts and watches the engine process and the API processes.

    Args:
        settings: of shutdown and restarts.
        logs: of the children.
        signals: those to act on.
        on_ready: called once every process can serve.
    """

    def __init__(
        self,
        settings: ProcessSettings,
        logs: LogSettings,
        signals: Sequence[signal.Signals],
        on_ready: Callable[[EngineInfo], None],
    ) -> None:
        self._settings = settings
        self._logs = logs
        self._signals = signals
        self._on_ready = on_ready
        self._announced = False
        self._received: list[int] = []
        self._wakeup, self._wakeup_writer = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_writer.setblocking(False)
        self._engine_place = _Place("engine")
        self._api_places: list[_Place] = []
        self._engine_deaths = 0
        self._folder = ""

    def run(self, engine: EngineConfig, api: ApiSettings, listeners: list[list[socket.socket]]) -> int:
        """Start, watch, end; leaves no process and no file behind, whatever happens.

        Args:
            listeners: the sockets of each API process.

        Returns:
            The exit code: 0 after an orderly stop, 128 + n when a second signal n cut it short.

        Raises:
            ChildError: a child failed at the first start, or once too often.
        """
        self._engine_config, self._api_settings = engine, api
        self._api_places = [_Place(f"api-{index}", listeners=sockets) for index, sockets in enumerate(listeners)]
        with _private_folder() as self._folder:
            os.mkdir(self._metrics)
            os.environ[MULTIPROCESS_FOLDER] = self._metrics  # of the children; they must know before they import
            try:
                self._start_all()
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
    def _engine(self) -> _Child | None:
        return self._engine_place.child

    @property
    def _apis(self) -> list[_Child]:
        return [place.child for place in self._api_places if place.child is not None]

    @property
    def _children(self) -> list[_Child]:
        return [*([self._engine] if self._engine is not None else []), *self._apis]

    @property
    def _address(self) -> str:
        """Where the engine binds. Each one has an address of its own: nothing meant for its predecessor reaches it."""
        return f"ipc://{self._folder}/engine-{self._engine_deaths}"

    @property
    def _metrics(self) -> str:
        """Where the API processes count together."""
        return f"{self._folder}/metrics"

    # Starting.

    def _start_all(self) -> None:
        # Python's helper process; starting it unblocks signals, so it must not start in what follows.
        resource_tracker.ensure_running()
        with _signals_blocked():
            self._start_engine()
            for place in self._api_places:
                self._start_api(place)
            signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
            for signum in self._signals:
                signal.signal(signum, lambda signum, frame: self._received.append(signum))

    def _start_engine(self) -> None:
        heartbeat = sharedctypes.RawValue("d", 0.0)
        self._spawn(self._engine_place, _run_engine, self._engine_config, heartbeat).heartbeat = heartbeat

    def _start_api(self, place: _Place) -> None:
        timeout = self._settings.shutdown_timeout
        self._spawn(place, _run_api, self._api_settings, timeout, self._engine_deaths, place.listeners)

    def _spawn(self, place: _Place, target: Callable[..., None], *arguments: object) -> _Child:
        ours, theirs = _spawn_context.Pipe()
        context = ChildContext(place.name, os.getpid(), self._address, theirs, self._logs)
        process = _spawn_context.Process(target=target, args=(context, *arguments), name=f"gale-{place.name}")
        process.start()
        theirs.close()
        place.child = _Child(place.name, process, ours)
        return place.child

    # Watching.

    def _watch(self) -> None:
        """Return on the first signal.

        Raises:
            ChildError: a child failed at the first start, or once too often; all have ended.
        """
        while not self._received:
            self._wait(self._next_look())
            self._find_hang()
            for place in (self._engine_place, *self._api_places):
                if place.child is not None and place.child.dead:
                    self._replace(place, place.child)
                elif place.child is None and time.monotonic() >= place.due:
                    self._restart(place)
            engine = self._engine
            if not self._announced and engine is not None and all(child.ready for child in self._children):
                self._announced = True
                assert engine.info is not None
                self._on_ready(engine.info)
            for child in self._children:
                if child.replacing and child.ready:
                    child.replacing = False
                    logger.info("the %s process serves again", child.name)

    def _next_look(self) -> float | None:
        """When something has to be done even if nothing happens."""
        moments = [place.due for place in (self._engine_place, *self._api_places) if place.child is None]
        if self._settings.watchdog_timeout and self._engine is not None and self._engine.ready:
            moments.append(time.monotonic() + min(1.0, self._settings.watchdog_timeout / 4))
        return min(moments, default=None)

    def _find_hang(self) -> None:
        """Kill an engine that has been in one step for too long."""
        engine, limit = self._engine, self._settings.watchdog_timeout
        if engine is None or engine.heartbeat is None or not limit:
            return
        began = engine.heartbeat.value
        if began and time.monotonic() - began > limit:
            engine.failure = Failed(f"the engine process hung: one step took more than {limit:g} s")

    def _replace(self, place: _Place, child: _Child) -> None:
        """Note a death, and see to it that the next child is started; or give up."""
        error = child.error()
        most = self._settings.max_restarts
        if not self._announced or place.deaths >= most:
            self._give_up(place, child)
            raise error
        pid = child.process.pid
        child.kill()  # Where it has told why, it may still hang in its driver's clean-up.
        if place is self._engine_place:
            self._engine_deaths += 1
            self._tell_apis(EngineDied(self._engine_deaths, final=False))
        else:
            # What it counted stays; the requests that it was answering are no longer being answered.
            mark_process_dead(pid, self._metrics)
        seconds = place.bury(child)
        logger.error("%s; starting it again in %g s (%d of %d)", error, seconds, place.deaths, most)

    def _restart(self, place: _Place) -> None:
        with _signals_blocked():
            if place is self._engine_place:
                self._start_engine()
                self._tell_apis(EngineStarting(self._address))
            else:
                self._start_api(place)
        assert place.child is not None
        place.child.replacing = True

    # Ending.

    def _end(self) -> None:
        """End in order: requests, API processes, engine.

        Raises:
            ChildError: the engine died while requests were still running.
        """
        engine = self._engine
        timeout = self._settings.shutdown_timeout if engine is not None and engine.ready else 0.0
        name = signal.Signals(self._received[0]).name
        logger.info("%s: no new requests; those running have %g s; once more ends at once", name, timeout)
        self._close_listeners()
        self._tell_apis(Drain(timeout))
        deadline = time.monotonic() + timeout + _API_END_SECONDS
        died = False
        while any(api.alive for api in self._apis) and time.monotonic() < deadline:
            self._wait(deadline)
            if engine is not None and not engine.alive and not died:
                died = True
                self._tell_apis(EngineDied(self._engine_deaths + 1, final=True))
        if died:
            assert engine is not None
            raise engine.error()
        self._end_engine()
        logger.info("stopped")

    def _give_up(self, place: _Place, child: _Child) -> None:
        serving = self._announced
        if place is self._engine_place:
            child.process.kill()
        self._close_listeners()
        if place is self._engine_place and serving:
            self._tell_apis(EngineDied(self._engine_deaths + 1, final=True))
        else:
            self._tell_apis(Drain(0))
        deadline = time.monotonic() + _API_END_SECONDS
        while any(api.alive for api in self._apis) and time.monotonic() < deadline:
            self._wait(deadline)
        self._end_engine()

    def _end_engine(self) -> None:
        engine = self._engine
        if engine is None or not engine.ready:
            return  # Busy loading, with nothing to lose; the end of run() kills it.
        engine.tell(Stop())
        deadline = time.monotonic() + _ENGINE_END_SECONDS
        while engine.alive and time.monotonic() < deadline:
            self._wait(deadline)

    def _close_listeners(self) -> None:
        """Once the API processes have closed theirs, the port is closed."""
        for place in self._api_places:
            close_all(place.listeners)

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


def _run_engine(context: ChildContext, config: EngineConfig, heartbeat: Heartbeat) -> None:
    """Runs in the engine process."""
    with context.role():
        from server.engine.process import main

        main(context, config, heartbeat)


def _run_api(
    context: ChildContext,
    settings: ApiSettings,
    shutdown_timeout: float,
    engine_deaths: int,
    listeners: list[socket.socket],
) -> None:
    """Runs in an API process."""
    with context.role():
        from server.api.process import main

        main(context, settings, shutdown_timeout, engine_deaths, listeners)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Children inherit the block, and ignore these signals before they lift it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


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
