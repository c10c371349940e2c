"""Where parked snapshots lie, and which of them move down or are given up for want of room. Torch-free.

Tiers have budgets in bytes. One that is full hands its least recently used snapshot down to the next, and the last one
gives it up. What a saved state holds may move down, but is not given up; if it is in the state's file, too, it moves
there at once, and takes no room.
"""

import enum
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from server.engine.radix import Node

logger = logging.getLogger(__name__)

P = TypeVar("P")


class Tier(enum.IntEnum):
    """Where a snapshot lies, the fastest first."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    SAVED = 3
    """In the files of saved states, which are not the cache's to count or remove."""


class Store(Protocol[P]):
    """What holds the bytes. None of these waits for the device or for a disk."""

    def move(self, payload: P, tier: Tier) -> P | None:
        """Bring a snapshot to another tier and give the old copy up; None: not now, and nothing has changed."""

    def drop(self, payload: P) -> None:
        """Give a snapshot up."""

    def ready(self, payload: P) -> bool:
        """Whether a snapshot can be restored without waiting; if not, it is being made so.

        Raises:
            SnapshotLostError: it cannot be read any more.
        """

    def unread(self, payload: P) -> None:
        """Nobody waits any longer until a snapshot is ready; memory that was only for that is given back."""

    def take_unwritten(self) -> list[P]:
        """Snapshots of the tier DISK whose files could not be written, since this was last asked. They are in memory
        until they are moved or given up."""


class SnapshotLostError(Exception):
    """A parked snapshot turned out to be unreadable; str() says why."""


@dataclass(slots=True, eq=False)
class Entry(Generic[P]):
    """One snapshot.

    Attributes:
        node: its place in the tree.
        complete: whether it holds the logits of the last position, too.
        nbytes: what it takes of its tier; 0 once it has been given up.
        pins: as long as there are any, it is neither moved down nor dropped.
        holds: as long as there are any, it is not given up for want of room, but may be moved down.
        favours: as long as there are any, it is given up only where nothing without them can be.
        files: the same snapshot in files of saved states.
    """

    node: Node[Any]
    scope: str
    complete: bool
    nbytes: int
    payload: P
    tier: Tier
    pins: int = 0
    holds: int = 0
    favours: int = 0
    files: list[P] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that its state has absorbed."""
        return self.node.depth


class Tiers(Generic[P]):
    """Snapshots by tier, the least recently used first.

    Args:
        budgets: most bytes in each tier; without one, a tier is not used.
        store: moves and drops the bytes.
        forget: called with each snapshot that has been given up.

    Attributes:
        evictions: snapshots given up for want of room, since the start.
    """

    def __init__(self, budgets: Mapping[Tier, int], store: Store[P], forget: Callable[[Entry[P]], None]) -> None:
        self._budgets = {tier: budgets.get(tier, 0) for tier in Tier}
        self._fastest = next((tier for tier in Tier if self._budgets[tier]), Tier.SAVED)
        self._store = store
        self._forget = forget
        self._entries: dict[Tier, OrderedDict[Entry[P], None]] = {tier: OrderedDict() for tier in Tier}
        self._used = dict.fromkeys(Tier, 0)
        self._held = dict.fromkeys(Tier, (0, 0))
        self.evictions = 0

    def __iter__(self) -> Iterator[Entry[P]]:
        for entries in self._entries.values():
            yield from entries

    def usage(self, tier: Tier) -> tuple[int, int]:
        """Snapshots in a tier, and their bytes."""
        return len(self._entries[tier]), self._used[tier]

    def held(self, tier: Tier) -> tuple[int, int]:
        """Those of them that somebody holds, and their bytes."""
        return self._held[tier]

    def resize(self, tier: Tier, budget: int) -> None:
        """Give a tier another budget; what is too much moves on."""
        self._budgets[tier] = budget
        self._make_room(tier, 0)

    def add(self, entry: Entry[P]) -> None:
        """Enter a snapshot as the most recently used of its tier, which has room for it."""
        self._account(entry, +1)

    def touch(self, entry: Entry[P]) -> None:
        """A snapshot is the most recently used of its tier."""
        self._entries[entry.tier].move_to_end(entry)

    def replace(self, entry: Entry[P], payload: P, tier: Tier, nbytes: int, *, complete: bool) -> None:
        """Put a better snapshot, for which there is room, in one's place; whoever holds that one has this one."""
        self._account(entry, -1)
        self._store.drop(entry.payload)
        entry.complete, entry.nbytes, entry.payload, entry.tier = complete, nbytes, payload, tier
        self._account(entry, +1)

    def lift(self, entry: Entry[P]) -> None:
        """Bring a snapshot to the fastest memory that has room for it."""
        if entry.tier is self._fastest:
            self.touch(entry)
            return
        # Out of its tier meanwhile: those that have to make room for it may take its place there.
        self._account(entry, -1)
        for tier in Tier:
            if tier < min(entry.tier, Tier.DISK) and self._make_room(tier, entry.nbytes):
                moved = self._store.move(entry.payload, tier)
                if moved is not None:
                    entry.payload, entry.tier = moved, tier
                    break
        self._account(entry, +1)

    def place(self, payload: P, tier: Tier, nbytes: int) -> tuple[P, Tier] | None:
        """Bring a new snapshot to the fastest tier, from its own on, that has room for it, else to a faster one; None:
        none has."""
        for target in sorted(Tier, key=lambda target: (target < tier, target)):
            if self._make_room(target, nbytes):
                moved = payload if target is tier else self._store.move(payload, target)
                if moved is not None:
                    return moved, target
        return None

    def hold(self, entry: Entry[P]) -> None:
        """Keep a snapshot until ``release``."""
        self._hold(entry, +1)

    def release(self, entry: Entry[P]) -> None:
        """One holder less of a snapshot, which may be lost meanwhile."""
        self._hold(entry, -1)

    def back(self, entry: Entry[P], payload: P, *, complete: bool) -> None:
        """Note that a snapshot is in the file of a saved state, too; one without logits does not stand for one with."""
        if entry.nbytes and (complete or not entry.complete):
            entry.files.append(payload)
            if entry.tier is Tier.DISK:
                self._store.drop(entry.payload)
                self._move(entry, payload, Tier.SAVED)

    def unback(self, entry: Entry[P], payload: P) -> None:
        """The file of a saved state is about to be removed: what lies there only has to go."""
        if payload in entry.files:
            entry.files.remove(payload)
        if entry.payload is not payload or not entry.nbytes:
            return
        if entry.files:
            entry.payload = entry.files[0]
        else:
            self.drop(entry)

    def lose(self, entry: Entry[P]) -> None:
        """A snapshot cannot be read where it lies."""
        if entry.payload in entry.files:
            entry.files.remove(entry.payload)
        if not entry.files:
            self.drop(entry)
            return
        self._store.drop(entry.payload)
        self._move(entry, entry.files[0], Tier.SAVED)

    def drop(self, entry: Entry[P]) -> None:
        """Give a snapshot up."""
        self._account(entry, -1)
        self._store.drop(entry.payload)
        entry.nbytes = 0
        entry.files.clear()
        self._forget(entry)

    def recover(self) -> None:
        """Deal with snapshots whose files could not be written: those that are held go back to the host's memory, the
        others are given up."""
        for payload in self._store.take_unwritten():
            entry = next((entry for entry in self._entries[Tier.DISK] if entry.payload is payload), None)
            if entry is None:
                continue
            moved = None
            if entry.holds and self._make_room(Tier.HOST, entry.nbytes):
                moved = self._store.move(payload, Tier.HOST)
            if moved is None:
                self.evictions += 1
                self.drop(entry)
            else:
                self._move(entry, moved, Tier.HOST)

    def _hold(self, entry: Entry[P], sign: int) -> None:
        entry.holds += sign
        if entry.nbytes and entry.holds == max(sign, 0):
            self._count_held(entry, sign)

    def _count_held(self, entry: Entry[P], sign: int) -> None:
        count, nbytes = self._held[entry.tier]
        self._held[entry.tier] = count + sign, nbytes + sign * entry.nbytes

    def _make_room(self, tier: Tier, nbytes: int) -> bool:
        """Hand snapshots down until so many bytes fit; whether they do. What sessions need is given up last."""
        return self._hand_down_until(tier, nbytes, spare=True) or self._hand_down_until(tier, nbytes, spare=False)

    def _hand_down_until(self, tier: Tier, nbytes: int, *, spare: bool) -> bool:
        """Make room; ``spare``: without giving up what sessions need."""
        if nbytes > self._budgets[tier]:
            return False
        stuck: set[Entry[P]] = set()
        while self._used[tier] + nbytes > self._budgets[tier]:
            victim = next((entry for entry in self._entries[tier] if not entry.pins and entry not in stuck), None)
            if victim is None:
                return False
            if not self._hand_down(victim, spare=spare):
                stuck.add(victim)
        return True

    def _hand_down(self, entry: Entry[P], *, spare: bool) -> bool:
        """Move a snapshot down, or give it up; False: there is no room below, and it is held, or to be spared."""
        if entry.files:
            self._store.drop(entry.payload)
            self._move(entry, entry.files[0], Tier.SAVED)
            return True
        for tier in Tier:
            if tier > entry.tier and self._hand_down_until(tier, entry.nbytes, spare=spare):
                moved = self._store.move(entry.payload, tier)
                if moved is not None:
                    self._move(entry, moved, tier)
                    return True
        if entry.holds or (spare and entry.favours):
            return False
        self.evictions += 1
        self.drop(entry)
        return True

    def _move(self, entry: Entry[P], payload: P, tier: Tier) -> None:
        self._account(entry, -1)
        entry.payload, entry.tier = payload, tier
        self._account(entry, +1)

    def _account(self, entry: Entry[P], sign: int) -> None:
        """Enter a snapshot into its tier as the most recently used, or take it out."""
        entries = self._entries[entry.tier]
        if sign > 0:
            entries[entry] = None
        else:
            del entries[entry]
        self._used[entry.tier] += sign * entry.nbytes
        if entry.holds:
            self._count_held(entry, sign)
