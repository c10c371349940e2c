"""What the launcher and its child processes share: control messages, and how a child begins.

The launcher holds one pipe to each child. A child that reads end-of-file from its pipe has lost the
launcher and ends.
"""

import contextlib
import ctypes
import gc
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn, TypeAlias

from server.errors import GaleError, SettingsError
from server.logs import LogSettings, setup_logging
from server.types import EngineInfo

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that only the launcher acts on."""

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


@dataclass(frozen=True, slots=True)
class Ready:
    """Child to launcher: it can serve. The engine adds what it found out while loading."""

    info: EngineInfo | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """Child to launcher, its last words: why it ends, and what the launcher should exit with."""

    reason: str
    exit_code: int = 1


@dataclass(frozen=True, slots=True)
class SleepRequest:
    """API process to launcher: a client wants the engine to end and free the device.

    Attributes:
        wait: whether running requests may finish first.
    """

    wait: bool


@dataclass(frozen=True, slots=True)
class WakeRequest:
    """API process to launcher: a client wants an engine again."""


@dataclass(frozen=True, slots=True)
class Quiet:
    """API process to launcher, after :class:`FallAsleep`: nothing of it runs any more.

    Attributes:
        number: of the message that this answers.
    """

    number: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Launcher to API process: accept no more, end what runs within ``timeout`` seconds, exit."""

    timeout: float


@dataclass(frozen=True, slots=True)
class EngineDied:
    """Launcher to API process: end open streams with an error and answer 503.

    Attributes:
        deaths: of engines since the server's start.
        final: no other engine will follow: exit after a moment.
    """

    deaths: int
    final: bool


@dataclass(frozen=True, slots=True)
class ApiDied:
    """Launcher to API process, for its metrics: one of its kind has died.

    Attributes:
        deaths: of API processes since the server's start.
    """

    deaths: int


@dataclass(frozen=True, slots=True)
class EngineStarting:
    """Launcher to API process: another engine is loading the model; connect to it."""

    address: str


@dataclass(frozen=True, slots=True)
class FallAsleep:
    """Launcher to API process: take no requests, end what runs within ``timeout`` seconds, answer :class:`Quiet`.

    Attributes:
        number: of the occasion; an engine may die while it falls asleep, and its successor be sent to sleep again.
    """

    timeout: float
    number: int


@dataclass(frozen=True, slots=True)
class EngineAsleep:
    """Launcher to API process: the engine has ended, and another one starts when somebody asks for it.

    Attributes:
        failure: why the last one that was asked for did not start; None: none was.
    """

    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Launcher to engine process: the API processes are gone, exit."""


Heartbeat: TypeAlias = ctypes.c_double
"""In memory that the launcher and a child share, by ``time.monotonic``: since when the child has been at something
that must come to an end. Of the engine, when it began the turn of its loop that it is in; of an API process, when its
event loop was, or is, to come round next. 0: it waits for work, or is not yet at it."""

ToLauncher: TypeAlias = Ready | Failed | SleepRequest | WakeRequest | Quiet
ToApi: TypeAlias = Drain | EngineDied | ApiDied | EngineStarting | FallAsleep | EngineAsleep
ToEngine: TypeAlias = Stop


@dataclass(frozen=True, slots=True)
class ChildContext:
    """Given to each child at its start.

    Attributes:
        name: in log lines and in process listings.
        launcher_pid: the parent.
        address: where the engine binds its socket.
        control: this child's end of its pipe.
    """

    name: str
    launcher_pid: int
    address: str
    control: "Connection[ToLauncher, ToApi | ToEngine]"
    logs: LogSettings

    @contextlib.contextmanager
    def role(self) -> Iterator[None]:
        """Around all that a child does, imports included.

        The child dies with the launcher, ignores the signals that a terminal sends to the whole process
        group (the launcher spawned it with these blocked, so none was deadly before), logs under its
        name, and tells the launcher in one line why it failed, if it does.

        Exits:
            At the end, at once: with the process go its memory and sockets, and taking torch apart piece by
            piece would cost a second. 0, or 1 after an exception.
        """
        self._begin()
        try:
            yield
        except GaleError as error:
            self._fail(str(error), exit_code=2 if isinstance(error, SettingsError) else 1)
        except Exception as error:
            logger.exception("the %s process failed", self.name)
            first_line = (str(error).splitlines() or [""])[0]
            self._fail(f"the {self.name} process failed: {type(error).__name__}: {first_line}")
        logging.shutdown()
        os._exit(0)

    def tell(self, message: ToLauncher) -> None:
        """Send to the launcher; a launcher that is gone needs no news."""
        with contextlib.suppress(OSError):
            self.control.send(message)

    def _begin(self) -> None:
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NAME, f"gale-{self.name}".encode()[:15])
        if os.getppid() != self.launcher_pid:
            os._exit(1)  # The launcher died before it could take this child along.
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        setup_logging(self.logs, self.name)

    def _fail(self, reason: str, exit_code: int = 1) -> NoReturn:
        self.tell(Failed(reason, exit_code))
        logging.shutdown()
        os._exit(1)


def keep_loaded() -> None:
    """Called once a child can serve: the garbage collector leaves alone what is loaded by then.

    Looking through torch's modules takes a tenth of a second, during which no stream moves.
    """
    gc.collect()
    gc.freeze()
