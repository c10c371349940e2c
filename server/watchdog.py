"""Finds children that hang."""

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
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._between_looks = min(_MOST_SECONDS_BETWEEN_LOOKS, limit / 4)
        self._last_look = self._counts_from = time.monotonic()

    def next_look(self) -> float:
        """By ``time.monotonic``."""
        return time.monotonic() + self._between_looks if self._limit else math.inf

    def look(self, children: Iterable[Child]) -> None:
        """Count those that hang as failed."""
        now = time.monotonic()
        if now - self._last_look > 2 * self._between_looks:
            self._counts_from = now
        self._last_look = now
        if not self._limit:
            return
        for child in children:
            since = child.heartbeat.value
            if since and now - max(since, self._counts_from) > self._limit:
                child.failure = Failed(f"the {child.name} process hung for more than {self._limit:g} s")
