"""Conversations that clients have named: which snapshot the next message of each will go on from. Torch-free."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Protocol

from server.engine.tiers import Entry

SESSION_SECONDS: Final = 3600.0
"""How long a session lasts after its newest answer."""
MAX_SESSIONS: Final = 256
"""Of each tenant; beyond it, the one whose newest answer is the oldest ends."""


class Parking(Protocol):
    """What holds the snapshots; see :class:`server.engine.reuse.PrefixReuse`."""

    def favour(self, tenant: str, tokens: bytes) -> Entry[Any] | None:
        """The snapshot of the longest beginning of these tokens, from now on given up after others; None: none."""

    def unfavour(self, entry: Entry[Any]) -> None:
        """One session less needs it."""


class Sessions:
    """The sessions of every tenant.

    Args:
        parking: holds the snapshots.
        clock: seconds.
    """

    def __init__(self, parking: Parking, clock: Callable[[], float] = time.monotonic) -> None:
        self._parking = parking
        self._clock = clock
        # By tenant and name, in the order of their newest answers, which is that of their ends.
        self._sessions: OrderedDict[tuple[str, str], tuple[Entry[Any], float]] = OrderedDict()
        self._names: dict[str, OrderedDict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def note(self, tenant: str, name: str, tokens: bytes) -> None:
        """A session's newest answer has ended; its next message will come behind these tokens."""
        entry = self._parking.favour(tenant, tokens)
        if (tenant, name) in self._sessions:
            self._end(tenant, name)
        if entry is None:
            return
        names = self._names.get(tenant)
        if names is not None and len(names) == MAX_SESSIONS:
            self._end(tenant, next(iter(names)))
        self._sessions[tenant, name] = entry, self._clock() + SESSION_SECONDS
        self._names.setdefault(tenant, OrderedDict())[name] = None

    def expire(self) -> None:
        """End the sessions that have lasted long enough."""
        now = self._clock()
        while self._sessions:
            (tenant, name), (_, end) = next(iter(self._sessions.items()))
            if end > now:
                return
            self._end(tenant, name)

    def _end(self, tenant: str, name: str) -> None:
        entry, _ = self._sessions.pop((tenant, name))
        self._parking.unfavour(entry)
        names = self._names[tenant]
        del names[name]
        if not names:
            del self._names[tenant]
