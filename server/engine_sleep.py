"""The engine's sleep: it has ended, and all it held on the device is free until somebody wakes the server.

The launcher waits for none of this: it is a state of its loop, which goes on to see deaths, hangs and signals.
"""

import enum
import logging
import math
import time
from collections.abc import Callable, Sequence

from server.child import EngineAsleep, Failed, FallAsleep, SleepRequest, Stop, ToApi
from server.children import Child, ChildError, Place

logger = logging.getLogger(__name__)

_END_SECONDS = 60.0
"""An engine that nobody uses any more writes what it was keeping, and ends."""


class _Phase(enum.Enum):
    """In the order in which one follows the other; an engine that dies on its own leads back to the first."""

    AWAKE = enum.auto()
    FALLING = enum.auto()
    """The API processes are ending what runs."""
    ENDING = enum.auto()
    """Nothing runs, and the engine has been told to end."""
    ASLEEP = enum.auto()
    """There is no engine, and none is due."""
    WAKING = enum.auto()
    """Somebody has asked for an engine, and it has not been ready yet."""


class EngineSleep:
    """Sends the engine to sleep and wakes it, as clients ask for it.

    Args:
        place: the engine's.
        shutdown_timeout: seconds that running requests may take to finish, where clients do not want it at once.
        tell_apis: sends a message to every API process.
    """

    def __init__(self, place: Place, shutdown_timeout: float, tell_apis: Callable[[ToApi], None]) -> None:
        self._place = place
        self._shutdown_timeout = shutdown_timeout
        self._tell_apis = tell_apis
        self._phase = _Phase.AWAKE
        self._occasions = 0
        self._ending_until = math.inf

    @property
    def ending(self) -> bool:
        """Whether there is an engine that has been told to end."""
        return self._phase is _Phase.ENDING

    @property
    def ending_until(self) -> float:
        """When it counts as failed, by ``time.monotonic``; infinite where there is none."""
        return self._ending_until

    def introduce(self, api: Child) -> None:
        """Tell an API process that has just been started."""
        if self._phase in (_Phase.FALLING, _Phase.ENDING, _Phase.ASLEEP):
            api.tell(FallAsleep(0.0, self._occasions))
        if self._phase is _Phase.ASLEEP:
            api.tell(EngineAsleep())

    def answer(self, apis: Sequence[Child]) -> None:
        """Do what clients want of the engine."""
        if self._place.child is not None:
            self._place.child.listen()  # A client may know that it is ready before the launcher has looked.
        for api in apis:
            while api.requests:
                request = api.requests.pop(0)
                if isinstance(request, SleepRequest):
                    self._fall_asleep(request.wait)
                elif self._phase is _Phase.ASLEEP:
                    self._wake()
        if self._phase is _Phase.FALLING and all(api.quiet == self._occasions for api in apis):
            self._end_engine()

    def bound_ending(self) -> None:
        """An engine that does not end counts as failed."""
        if self._place.child is not None and time.monotonic() >= self._ending_until:
            self._place.child.failure = Failed(f"the engine process did not end within {_END_SECONDS:g} s")

    def note_ready(self) -> None:
        """There is an engine again."""
        if self._phase is _Phase.WAKING:
            self._phase = _Phase.AWAKE

    def note_death(self, engine: Child, error: ChildError) -> bool:
        """Whether the engine's death is a part of its sleep, so that its place stays empty until somebody wakes it.

        Any other death ends the sleep.
        """
        if self._phase is _Phase.ENDING:
            self._sleep_now(engine, error)
            return True
        if self._phase is _Phase.WAKING and not engine.ready:
            self._sleep_on(engine, error)
            return True
        self._phase = _Phase.AWAKE
        return False

    def _fall_asleep(self, wait: bool) -> None:
        """Have the API processes end what runs; while they do, a second request may make them hurry."""
        engine = self._place.child
        if engine is None or not engine.ready or self._phase is _Phase.ENDING:
            return  # Whoever asked sees the engine's state.
        if self._phase is not _Phase.FALLING:
            self._occasions += 1
        elif wait:
            return
        self._phase = _Phase.FALLING
        self._tell_apis(FallAsleep(self._shutdown_timeout if wait else 0.0, self._occasions))

    def _end_engine(self) -> None:
        """Tell the engine, which has nothing more to do, to end."""
        assert self._place.child is not None
        self._phase = _Phase.ENDING
        self._ending_until = time.monotonic() + _END_SECONDS
        self._place.child.tell(Stop())

    def _sleep_now(self, engine: Child, error: ChildError) -> None:
        """The engine that was told to end has ended."""
        if engine.failure is not None or engine.process.exitcode != 0:
            logger.error("%s when it was sent to sleep", error)
        self._leave_empty(engine, EngineAsleep())
        logger.info("asleep: the engine has ended; POST /wake_up starts another")

    def _sleep_on(self, engine: Child, error: ChildError) -> None:
        """The engine that somebody asked for did not start: the device may still be in use. They may ask again."""
        self._leave_empty(engine, EngineAsleep(str(error)))
        logger.error("%s; asleep again", error)

    def _leave_empty(self, engine: Child, news: EngineAsleep) -> None:
        engine.kill()
        self._place.child = None
        self._place.due = self._ending_until = math.inf
        self._phase = _Phase.ASLEEP
        self._tell_apis(news)

    def _wake(self) -> None:
        self._phase = _Phase.WAKING
        self._place.due = 0.0
        logger.info("waking up")
