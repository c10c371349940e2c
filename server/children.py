"""A child process as the launcher sees it, and the place that one holds after the other."""

import contextlib
import signal
import socket
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from server.child import Failed, Heartbeat, Quiet, Ready, SleepRequest, ToApi, ToEngine, ToLauncher, WakeRequest
from server.errors import GaleError
from server.types import EngineInfo

KILLED_SECONDS = 5.0
"""A process stuck inside a device driver may not even obey SIGKILL; do not wait for ever."""
_STABLE_SECONDS = 120.0
"""A child that has served for so long has nothing to do with the deaths before it."""
_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 30.0


class ChildError(GaleError):
    """A child process failed, and the server with it."""

    def __init__(self, reason: str, exit_code: int = 1) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


@dataclass(slots=True)
class Child:
    """A child process as the launcher sees it.

    Attributes:
        control: the launcher's end of the pipe; None after the child's end was seen.
        heartbeat: shared with the child.
        started: by ``time.monotonic``.
        failure: its last words.
        info: the engine's.
        ready_since: by ``time.monotonic``; None before it could serve.
    """

    name: str
    process: SpawnProcess
    control: "Connection[ToApi | ToEngine, ToLauncher] | None"
    heartbeat: Heartbeat
    started: float = field(default_factory=time.monotonic)
    failure: Failed | None = None
    info: EngineInfo | None = None
    ready_since: float | None = None
    replacing: bool = False
    """Whether it has yet to take over from one that is gone."""
    quiet: int = 0
    """The number of the last occasion to fall asleep on which nothing ran in it any more."""
    requests: list[SleepRequest | WakeRequest] = field(default_factory=list)
    """What clients want through it, in order; whoever acts on them empties the list."""

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self.process.exitcode is None

    @property
    def dead(self) -> bool:
        """Whether it has ended, or has said that it is about to."""
        return self.failure is not None or not self.alive

    @property
    def ready(self) -> bool:
        """Whether it can serve."""
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
                elif isinstance(message, Ready):
                    self.ready_since = time.monotonic()
                    self.info = message.info
                elif isinstance(message, Quiet):
                    self.quiet = message.number
                else:
                    self.requests.append(message)
        except (EOFError, OSError):
            self.control = None

    def kill(self) -> None:
        """End it now, whatever it does, and close the pipe."""
        self.process.kill()
        self.process.join(KILLED_SECONDS)
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
class Place:
    """What a child is started for, again and again if need be.

    Attributes:
        name: of the process.
        child: who holds the place; None while the next one waits to be started.
        deaths: in a row, without one that served for long between them.
        due: when to start the next one, by ``time.monotonic``.
    """

    name: str
    child: Child | None = None
    deaths: int = 0
    due: float = 0.0
    listeners: list[socket.socket] = field(default_factory=list)

    def bury(self, child: Child) -> float:
        """Count the death of the child; seconds until the next should start."""
        self.child = None
        if child.ready_since is not None and time.monotonic() - child.ready_since > _STABLE_SECONDS:
            self.deaths = 0
        self.deaths += 1
        seconds = min(_FIRST_BACKOFF_SECONDS * 2.0 ** (self.deaths - 1), _LONGEST_BACKOFF_SECONDS)
        self.due = time.monotonic() + seconds
        return seconds
