"""Finds children that hang, or never get ready."""

import math
import time
from collections.abc import Iterable

from server.child import Failed
from server.children import Child

_MOST_SECONDS_BETWEEN_LOOKS = 1.0


class Watchdog:
    """Looks now and then at what children note in shared memory.

    Time during which the launcher itself did not run counts for nobody: where the whole server was stopped, by Ctrl-Z
    or by a container that was frozen, nothing hangs when it goes on.

    Args:
        limit: seconds that a child may be overdue, see :data:`server.child.Heartbeat`; 0: any time.
        loading_limit: seconds that an engine may take until it is ready; 0: any time.
    """

    def __init__(self, limit: float, loading_limit: float) -> None:
        self._limit = limit or math.inf
        self._loading_limit = loading_limit or math.inf
        self._between_looks = min(_MOST_SECONDS_BETWEEN_LOOKS, self._limit / 4, self._loading_limit / 4)
        self._last_look = self._counts_from = time.monotonic()

    def next_look(self) -> float:
        """By ``time.monotonic``."""
        watches = min(self._limit, self._loading_limit) < math.inf
        return time.monotonic() + self._between_looks if watches else math.inf

    def look(self, engine: Child | None, apis: Iterable[Child]) -> None:
        """Count those that hang as failed."""
        now = time.monotonic()
        if now - self._last_look > 2 * self._between_looks:
            self._counts_from = now
        self._last_look = now
        # Of the engine alone: API processes are not ready before it is.
        if engine is not None and not engine.ready and self._seconds_since(engine.started) > self._loading_limit:
            engine.failure = Failed(f"the engine process was not ready within {self._loading_limit:g} s")
        for child in (*apis, *([engine] if engine is not None else [])):
            since = child.heartbeat.value
            if since and self._seconds_since(since) > self._limit:
                child.failure = Failed(f"the {child.name} process hung for more than {self._limit:g} s")

    def _seconds_since(self, moment: float) -> float:
        return self._last_look - max(moment, self._counts_from)
