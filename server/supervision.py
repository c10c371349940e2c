"""The launcher's children: started, watched, replaced when they die, and ended in order.

A server that has been ready once outlives the death of its parts. An API process that dies, or hangs, is replaced,
and its siblings go on. An engine that does takes the running requests along: their streams end with an error, and
requests are refused until a new engine has loaded the model. A part that keeps dying ends the server.

The engine can also be sent to sleep (:mod:`server.engine_sleep`).
"""

import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from server.child import ApiDied, Drain, EngineDied, EngineStarting, Stop, ToApi
from server.children import KILLED_SECONDS, Child, Place
from server.component_settings import ApiSettings, EngineConfig, ProcessSettings
from server.engine_sleep import EngineSleep
from server.listeners import close_all
from server.logs import LogSettings
from server.metrics import MULTIPROCESS_FOLDER
from server.spawning import private_folder, signals_blocked, spawn_api, spawn_engine
from server.types import EngineInfo
from server.watchdog import Watchdog

logger = logging.getLogger(__name__)

_API_END_SECONDS = 5.0
"""Beyond the drain's own time, before an API process is killed. Longer than its own grace."""
_ENGINE_END_SECONDS = 2.0


class _SignalledAgain(Exception):
    """A second signal: end at once."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


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
        self._engine_place = Place("engine")
        self._api_places: list[Place] = []
        self._engine_deaths = 0
        self._api_deaths = 0
        self._engine_starts = 0
        self._watchdog = Watchdog(settings.watchdog_timeout, settings.startup_timeout)
        self._sleep = EngineSleep(self._engine_place, settings.shutdown_timeout, self._tell_apis)
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
        self._api_places = [Place(f"api-{index}", listeners=sockets) for index, sockets in enumerate(listeners)]
        with private_folder() as self._folder:
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
                    child.process.join(KILLED_SECONDS)
        return 0

    @property
    def _engine(self) -> Child | None:
        return self._engine_place.child

    @property
    def _apis(self) -> list[Child]:
        return [place.child for place in self._api_places if place.child is not None]

    @property
    def _children(self) -> list[Child]:
        return [*([self._engine] if self._engine is not None else []), *self._apis]

    @property
    def _address(self) -> str:
        """Where the engine binds. Each one has an address of its own: nothing meant for its predecessor reaches it."""
        return f"ipc://{self._folder}/engine-{self._engine_starts}"

    @property
    def _metrics(self) -> str:
        """Where the API processes count together."""
        return f"{self._folder}/metrics"

    # Starting.

    def _start_all(self) -> None:
        # Python's helper process; starting it unblocks signals, so it must not start in what follows.
        resource_tracker.ensure_running()
        with signals_blocked():
            self._start_engine()
            for place in self._api_places:
                self._start_api(place)
            signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
            for signum in self._signals:
                signal.signal(signum, lambda signum, frame: self._received.append(signum))

    def _start_engine(self) -> None:
        self._engine_starts += 1
        place = self._engine_place
        place.child = spawn_engine(place.name, self._address, self._logs, self._engine_config)

    def _start_api(self, place: Place) -> None:
        deaths = (self._engine_deaths, self._api_deaths)
        timeout = self._settings.shutdown_timeout
        place.child = api = spawn_api(
            place.name, self._address, self._logs, self._api_settings, timeout, deaths, place.listeners
        )
        self._sleep.introduce(api)

    # Watching.

    def _watch(self) -> None:
        """Return on the first signal.

        Raises:
            ChildError: a child failed at the first start, or once too often; all have ended.
        """
        while not self._received:
            self._wait(self._next_look())
            # An engine that was told to end has been at its last turn for as long as that takes.
            self._watchdog.look(None if self._sleep.ending else self._engine, self._apis)
            self._sleep.bound_ending()
            for place in (self._engine_place, *self._api_places):
                if place.child is not None and place.child.dead:
                    self._replace(place, place.child)
                elif place.child is None and time.monotonic() >= place.due:
                    self._restart(place)
            self._note_ready()
            if self._announced:
                self._sleep.answer(self._apis)

    def _next_look(self) -> float | None:
        """When something has to be done even if nothing happens."""
        moments = [place.due for place in (self._engine_place, *self._api_places) if place.child is None]
        soonest = min(*moments, self._watchdog.next_look(), self._sleep.ending_until)
        return None if soonest == math.inf else soonest

    def _note_ready(self) -> None:
        """Say what serves, or serves again."""
        engine = self._engine
        if not self._announced and engine is not None and all(child.ready for child in self._children):
            self._announced = True
            assert engine.info is not None
            self._on_ready(engine.info)
        for child in self._children:
            if child.replacing and child.ready:
                child.replacing = False
                logger.info("the %s process serves again", child.name)
                if child is engine:
                    self._sleep.note_ready()

    def _replace(self, place: Place, child: Child) -> None:
        """Note a death, and see to it that the next child is started; or give up."""
        error = child.error()
        if place is self._engine_place and self._sleep.note_death(child, error):
            return
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
            self._api_deaths += 1
            self._tell_apis(ApiDied(self._api_deaths))
        seconds = place.bury(child)
        logger.error("%s; starting it again in %g s (%d of %d)", error, seconds, place.deaths, most)

    def _restart(self, place: Place) -> None:
        with signals_blocked():
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
        # An engine that is loading, or that was told to end, has no requests.
        engine = None if self._sleep.ending else self._engine
        if engine is not None and not engine.ready:
            engine = None
        timeout = self._settings.shutdown_timeout if engine is not None else 0.0
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

    def _give_up(self, place: Place, child: Child) -> None:
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
