"""States that clients have saved: which transcript each stands for, whose it is, and until when. Torch-free.

A saved state is a transcript and a hold on the parked snapshot of as much of it as has been absorbed. Whoever continues
it sends the transcript's tokens before new ones, so that whatever became of the snapshot, the answer is the same; the
hold is what makes it quick.
"""

import heapq
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from server.engine.prefix_cache import Entry
from server.engine.radix import TOKEN_BYTES
from server.types import STATE_ID_PREFIX, StateInfo

DEFAULT_TTL: Final = 86400.0
"""Seconds for which a state is kept if nobody says for how long."""
MAX_STATES: Final = 1 << 16
"""Forks take no room for snapshots, so something else has to bound their number."""


class Parking(Protocol):
    """What holds the snapshots; see :class:`server.engine.reuse.PrefixReuse`."""

    def hold(self, tenant: str, tokens: bytes) -> Entry[Any] | None:
        """The snapshot of the longest beginning of these tokens, from now on kept; None: there is none."""

    def release(self, entry: Entry[Any]) -> None:
        """One holder less."""


class NoRoomError(Exception):
    """As many states are kept as may be; str() says so in a sentence."""


@dataclass(frozen=True, slots=True, eq=False)
class NamedState:
    """A saved state.

    Attributes:
        id: unique in this server.
        name: unique among the tenant's; None: it has none.
        tenant: whose it is.
        tokens: the transcript, int32 bytes, at least one.
        created, expires: Unix time.
        entry: the snapshot, of as many of the tokens as had been absorbed; None: none was left.
        turn: the role of the chat message within which the transcript ends; None: of none.
    """

    id: str
    name: str | None
    tenant: str
    tokens: bytes
    created: float
    expires: float
    entry: Entry[Any] | None
    turn: str | None = None

    @property
    def info(self) -> StateInfo:
        """What clients are told of it."""
        return StateInfo(
            id=self.id,
            name=self.name,
            num_tokens=len(self.tokens) // TOKEN_BYTES,
            nbytes=0 if self.entry is None else self.entry.nbytes,
            created=self.created,
            expires=self.expires,
            turn=self.turn,
        )


class NamedStates:
    """Every saved state of one engine.

    Args:
        parking: holds the snapshots.
        capacity: most snapshots that may be held for saved states.
        clock: Unix time in seconds.
    """

    def __init__(self, parking: Parking, capacity: int, clock: Callable[[], float] = time.time) -> None:
        self._parking = parking
        self._capacity = capacity
        self._clock = clock
        self._states: dict[str, NamedState] = {}
        self._by_name: dict[tuple[str, str], NamedState] = {}
        self._expiries: list[tuple[float, str]] = []
        self._reserved = 0

    def __len__(self) -> int:
        return len(self._states)

    def reserve(self, count: int) -> None:
        """Set room aside for states about to be saved; each is followed by ``save`` or ``give_up``.

        Raises:
            NoRoomError: there is not enough.
        """
        self._expire()
        held = {id(state.entry) for state in self._states.values() if state.entry is not None}
        if len(held) + self._reserved + count > self._capacity:
            raise NoRoomError(
                f"no room for {count} more saved states: {len(held)} are kept and {self._reserved} are about to be, "
                f"of at most {self._capacity}, half of what --state-cache-gpu, --state-cache-host and "
                "--state-cache-dir hold; delete some"
            )
        self._check_number(count)
        self._reserved += count

    def give_up(self) -> None:
        """One state that room was reserved for will not be saved."""
        self._reserved -= 1

    def save(
        self, tenant: str, name: str | None, ttl: float | None, tokens: bytes, turn: str | None = None
    ) -> NamedState:
        """Save the state after these tokens, for which room is reserved. It takes over the name from an earlier one,
        which is deleted."""
        self._reserved -= 1
        return self._add(tenant, name, ttl, tokens, turn)

    def find(self, tenant: str, reference: str) -> NamedState | None:
        """A tenant's state by its id or name; None: there is none, or it has expired."""
        self._expire()
        state = self._states.get(reference)
        if state is not None and state.tenant == tenant:
            return state
        return self._by_name.get((tenant, reference))

    def of(self, tenant: str) -> Iterator[NamedState]:
        """A tenant's states, the oldest first."""
        self._expire()
        return (state for state in self._states.values() if state.tenant == tenant)

    def fork(self, state: NamedState, name: str | None, ttl: float | None) -> NamedState:
        """Another state of the same transcript; they share the snapshot.

        Raises:
            NoRoomError: there are too many states.
        """
        self._check_number(1)
        return self._add(state.tenant, name, ttl, state.tokens, state.turn)

    def delete(self, state: NamedState) -> None:
        """Forget a state; its snapshot lives on as long as any other."""
        del self._states[state.id]
        if state.name is not None:
            del self._by_name[state.tenant, state.name]
        if state.entry is not None:
            self._parking.release(state.entry)

    def _add(self, tenant: str, name: str | None, ttl: float | None, tokens: bytes, turn: str | None) -> NamedState:
        now = self._clock()
        expires = now + (DEFAULT_TTL if ttl is None else ttl)
        entry = self._parking.hold(tenant, tokens)
        state = NamedState(STATE_ID_PREFIX + secrets.token_hex(12), name, tenant, tokens, now, expires, entry, turn)
        if name is not None:
            if (older := self._by_name.get((tenant, name))) is not None:
                self.delete(older)
            self._by_name[tenant, name] = state
        self._states[state.id] = state
        heapq.heappush(self._expiries, (expires, state.id))
        return state

    def _check_number(self, count: int) -> None:
        if len(self._states) + self._reserved + count > MAX_STATES:
            raise NoRoomError(f"no room for {count} more saved states: at most {MAX_STATES} are kept; delete some")

    def _expire(self) -> None:
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            state = self._states.get(heapq.heappop(self._expiries)[1])
            if state is not None:
                self.delete(state)
