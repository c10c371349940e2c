"""Which states of which beginnings are kept, where, and for whom: the policy of prefix reuse. Torch-free.

Unlike a KV cache, a recurrent state cannot be cut back to a shorter prefix: what can be reused is a snapshot taken at
exactly some position. So the cache decides where on its way a prompt leaves snapshots:

- at its end, with the logits there, so that the same prompt need not be absorbed at all;
- where it leaves the path of an earlier prompt: what two have in common, a third is likely to have, too;
- at positions that double, so that a prompt which leaves a long one's path finds at least half of what they share;
- wherever the request says.

A prompt whose beginning another one is just absorbing waits for that one's snapshot instead of absorbing it again.

Where they lie, and what is given up for want of room, is decided in :mod:`server.engine.tiers`. Nothing is visible
across scopes (the API keys' tenants).
"""

import logging
from bisect import insort
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from server.component_settings import CHUNK
from server.engine.radix import TOKEN_BYTES, Node, RadixTree
from server.engine.tiers import Entry, SnapshotLostError, Store, Tier, Tiers

logger = logging.getLogger(__name__)

P = TypeVar("P")

LEAST_GAIN = 16
"""Tokens below which a snapshot at a junction is not worth its copy."""
LEAST_WAIT = 64
"""Tokens below which another prompt's snapshot is not worth waiting for: a step takes longer than absorbing them."""
FIRST_SPACING = 2048
"""The first of the doubling positions: what a step of default size absorbs."""


@dataclass(slots=True, eq=False)
class _Spot(Generic[P]):
    """What is known at one place of the tree: a snapshot, or who is about to take one."""

    entry: Entry[P] | None = None
    promised_by: "Ticket[P] | None" = None


@dataclass(frozen=True, slots=True)
class Awaited(Generic[P]):
    """A snapshot that a prompt has promised to leave, and that others wait for."""

    promised_by: "Ticket[P]"
    position: int

    @property
    def is_coming(self) -> bool:
        """Whether it is still to come: it may have come, or turned out not to."""
        return self.position in self.promised_by._promises


@dataclass(slots=True, eq=False)
class Ticket(Generic[P]):
    """One prompt's dealings with the cache, from the queue to the end of its prefill.

    Attributes:
        tokens: the prompt, int32 bytes.
        reuse: whether it may begin from a snapshot.
        priority: it waits for nobody of a higher value, who may be kept from going on.
        grows: whether these are not all of the prompt's tokens. It then leaves no snapshot at their end, and begins
            where at least one piece of them is left.
        entry: the snapshot to begin from, pinned until :meth:`PrefixCache.started`; None: none.
        start: tokens that need not be absorbed.
        points: positions still ahead at which to take a snapshot, ascending. A step's piece must not cross one.
    """

    scope: str
    tokens: bytes
    checkpoints: tuple[int, ...]
    reuse: bool
    priority: int = 0
    grows: bool = False
    entry: Entry[P] | None = None
    start: int = 0
    points: list[int] = field(default_factory=list)
    _promises: "dict[int, Node[_Spot[P]]]" = field(default_factory=dict)
    _waits_for: Awaited[P] | None = None
    _reads: P | None = None
    _position: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def awaited(self) -> Awaited[P] | None:
        """The snapshot that this prompt waits for, as long as it is to come."""
        return self._waits_for if self._waits_for is not None and self._waits_for.is_coming else None


@dataclass(slots=True)
class CacheFigures:
    """What the cache counts since its start."""

    hits: int = 0
    misses: int = 0
    tokens_saved: int = 0


class PrefixCache(Generic[P]):
    """Snapshots by scope and tokens.

    Args:
        budgets: most bytes in each tier; without one, a tier is not used.
        store: moves and drops the bytes.

    Attributes:
        tiers: where the snapshots lie.
        figures: hits, misses and the like.
    """

    def __init__(self, budgets: Mapping[Tier, int], store: Store[P]) -> None:
        self._store = store
        self.tiers: Tiers[P] = Tiers(budgets, store, self._forget)
        self._trees: dict[str, RadixTree[_Spot[P]]] = {}
        self._active: dict[Ticket[P], None] = {}
        # How many tickets wait until a snapshot is ready.
        self._readers: Counter[P] = Counter()
        self.figures = CacheFigures()

    # A prompt's way: admit, started, then advance and put as it is absorbed, close.

    def admit(self, ticket: Ticket[P]) -> bool:
        """Decide where a prompt begins and where it leaves snapshots; to be asked when it could start now.

        Returns:
            False if it should wait and ask again, because a snapshot that it can begin from is on its way.
        """
        if ticket.awaited is not None:
            return False
        ticket._waits_for = None
        self.tiers.recover()
        tree = self._trees.get(ticket.scope)
        while True:
            found, shared = ([], 0) if tree is None else tree.walk(ticket.tokens)
            entry = _longest(found, ticket) if ticket.reuse else None
            start = 0 if entry is None else entry.num_tokens
            if ticket.reuse and self._await_other(ticket, found, start, shared):
                return False
            if entry is None:
                break
            try:
                if not self._store.ready(entry.payload):
                    self._await_read(ticket, entry.payload)
                    return False
                break
            except SnapshotLostError as error:
                logger.warning("a parked state of %d tokens is lost: %s", entry.num_tokens, error)
                self.tiers.lose(entry)
        self._active[ticket] = None
        node = None
        if entry is not None:
            self._use(ticket, entry)
            node = entry.node
        self._await_read(ticket, None)
        for position in _points(ticket, shared):
            node = self._promise(ticket, position, node)
        return True

    def started(self, ticket: Ticket[P]) -> None:
        """The prompt is on its way: its snapshot has been read, or its reading is in the device's queue."""
        self._unpin(ticket)
        self.figures.hits += ticket.start > 0
        self.figures.misses += ticket.reuse and ticket.start == 0
        self.figures.tokens_saved += ticket.start

    def advance(self, ticket: Ticket[P], position: int) -> bool:
        """Note how far launched steps absorb a prompt; whether to take a snapshot there, and hand it to ``put``."""
        ticket._position = position
        return position in ticket._promises

    def put(self, ticket: Ticket[P], payload: P, tier: Tier, nbytes: int, *, complete: bool) -> None:
        """Take the snapshot of where a prompt stands, as wanted by ``advance``."""
        self._keep(ticket.scope, self._settle(ticket), payload, tier, nbytes, complete=complete)

    def disappoint(self, ticket: Ticket[P]) -> None:
        """There is no snapshot of where a prompt stands, although ``advance`` wanted one."""
        self._tidy(ticket.scope, self._settle(ticket))

    @staticmethod
    def _settle(ticket: Ticket[P]) -> "Node[_Spot[P]]":
        """Where the snapshot was promised that a prompt is to leave where it stands; it is no promise any more."""
        node = ticket._promises.pop(ticket._position)
        ticket.points.remove(ticket._position)
        assert node.value is not None
        node.value.promised_by = None
        return node

    def close(self, ticket: Ticket[P]) -> None:
        """The prompt has been absorbed, or never will be. May be called for a ticket that was never admitted."""
        self._unpin(ticket)
        self._await_read(ticket, None)
        self._active.pop(ticket, None)
        for node in ticket._promises.values():
            assert node.value is not None
            node.value.promised_by = None
            self._tidy(ticket.scope, node)
        ticket._promises.clear()
        ticket.points.clear()

    def keep(self, scope: str, tokens: bytes, payload: P, tier: Tier, nbytes: int, *, complete: bool) -> bool:
        """Take a snapshot, of at least one token, that no prompt has promised: the end of an answer.

        Returns:
            Whether there is one now.
        """
        node = self._trees.setdefault(scope, RadixTree()).insert(tokens)
        if node.value is None:
            node.value = _Spot()
        return self._keep(scope, node, payload, tier, nbytes, complete=complete)

    def has(self, scope: str, tokens: bytes) -> bool:
        """Whether there is a snapshot of just these tokens, with the logits."""
        entry = self._longest(scope, tokens)
        return entry is not None and entry.complete and entry.num_tokens == len(tokens) // TOKEN_BYTES

    def hold(self, scope: str, tokens: bytes) -> Entry[P] | None:
        """Have the snapshot of the longest beginning of these tokens kept until ``release``; None: there is none."""
        entry = self._longest(scope, tokens)
        if entry is not None:
            self.tiers.hold(entry)
        return entry

    def find_saved(self, scope: str, tokens: bytes, payload: P, nbytes: int, *, complete: bool) -> Entry[P]:
        """Take in a snapshot that is in the file of a saved state, and hold it."""
        node = self._trees.setdefault(scope, RadixTree()).insert(tokens)
        if node.value is None:
            node.value = _Spot()
        entry = node.value.entry
        if entry is None:
            entry = node.value.entry = Entry(node, scope, complete, nbytes, payload, Tier.SAVED)
            self.tiers.add(entry)
        self.tiers.back(entry, payload, complete=complete)
        self.tiers.hold(entry)
        return entry

    def favour(self, scope: str, tokens: bytes) -> Entry[P] | None:
        """Have the snapshot of the longest beginning of these tokens given up after others, until ``unfavour``."""
        entry = self._longest(scope, tokens)
        if entry is not None:
            entry.favours += 1
        return entry

    def unfavour(self, entry: Entry[P]) -> None:
        """One favour less for a snapshot, which may be lost meanwhile."""
        entry.favours -= 1

    def _longest(self, scope: str, tokens: bytes) -> Entry[P] | None:
        """The snapshot of the longest beginning of these tokens."""
        tree = self._trees.get(scope)
        found = [] if tree is None else tree.walk(tokens)[0]
        entries = [node.value.entry for node in found if node.value is not None and node.value.entry is not None]
        return entries[-1] if entries else None

    def _await_other(self, ticket: Ticket[P], found: "list[Node[_Spot[P]]]", start: int, shared: int) -> bool:
        """Whether another prompt in flight will leave a snapshot that saves this one enough; remembers which."""
        if shared < ticket.length and shared - start >= LEAST_WAIT:
            prefix = ticket.tokens[: shared * TOKEN_BYTES]
            for other in self._active:
                is_ahead = other.scope == ticket.scope and other._position < shared < other.length
                if is_ahead and other.priority <= ticket.priority and other.tokens.startswith(prefix):
                    self._promise(other, shared, found[-1] if found else None)
                    if shared in other._promises:
                        ticket._waits_for = Awaited(other, shared)
                        return True
        for node in reversed(found):
            assert node.value is not None
            promiser, gain = node.value.promised_by, node.depth - start
            if promiser is None or gain <= 0 or promiser.priority > ticket.priority:
                continue
            # Only the snapshot at a prompt's end has the logits that another one which ends there needs.
            is_end = node.depth == ticket.length
            if (is_end and promiser.length == node.depth) or (not is_end and gain >= LEAST_WAIT):
                ticket._waits_for = Awaited(promiser, node.depth)
                return True
        return False

    def _await_read(self, ticket: Ticket[P], payload: P | None) -> None:
        """Note what a prompt waits for that is not ready; None: for nothing, any longer."""
        before, ticket._reads = ticket._reads, payload
        if payload is not None:
            self._readers[payload] += 1
        if before is not None:
            self._readers[before] -= 1
            if not self._readers[before]:
                del self._readers[before]
                self._store.unread(before)

    def _use(self, ticket: Ticket[P], entry: Entry[P]) -> None:
        """Let a prompt begin from a snapshot, which moves to the fastest tier that has room for it."""
        ticket.entry, ticket.start, ticket._position = entry, entry.num_tokens, entry.num_tokens
        entry.pins += 1
        self.tiers.lift(entry)

    @staticmethod
    def _unpin(ticket: Ticket[P]) -> None:
        if ticket.entry is not None:
            ticket.entry.pins -= 1
            ticket.entry = None

    def _promise(self, ticket: Ticket[P], position: int, below: "Node[_Spot[P]] | None") -> "Node[_Spot[P]]":
        """Have a prompt take a snapshot at a position ahead of it, unless there is one or somebody else will.

        Args:
            below: something that is known of an earlier position of the prompt, so that it is not looked up again.

        Returns:
            What is known of this one.
        """
        node = self._trees.setdefault(ticket.scope, RadixTree()).insert(ticket.tokens, position, below=below)
        if node.value is None:
            node.value = _Spot()
        spot, entry = node.value, node.value.entry
        enough = entry is not None and (entry.complete or position < ticket.length)
        if not enough and spot.promised_by is None:
            spot.promised_by = ticket
            ticket._promises[position] = node
            insort(ticket.points, position)
        return node

    def _keep(self, scope: str, node: "Node[_Spot[P]]", payload: P, tier: Tier, nbytes: int, *, complete: bool) -> bool:
        spot = node.value
        assert spot is not None
        old = spot.entry
        if old is not None and (old.complete or not complete or old.pins or old.files):
            self.tiers.touch(old)
            self._store.drop(payload)
            return True
        if old is not None:
            old.pins += 1  # it stays where it is until there is a place for the new one
        place = self.tiers.place(payload, tier, nbytes)
        if old is not None:
            old.pins -= 1
        if place is None:
            self._store.drop(payload)
            self._tidy(scope, node)
            return False
        moved, target = place
        if old is None:
            spot.entry = Entry(node, scope, complete, nbytes, moved, target)
            self.tiers.add(spot.entry)
        else:
            self.tiers.replace(old, moved, target, nbytes, complete=complete)
        return True

    def _forget(self, entry: Entry[P]) -> None:
        """A snapshot has been given up."""
        assert entry.node.value is not None
        entry.node.value.entry = None
        self._tidy(entry.scope, entry.node)

    def _tidy(self, scope: str, node: "Node[_Spot[P]]") -> None:
        """Let the tree forget a place of which nothing is known any more."""
        spot = node.value
        assert spot is not None
        if spot.entry is None and spot.promised_by is None:
            tree = self._trees[scope]
            tree.discard(node)
            if not tree.root.children:
                del self._trees[scope]


def _longest(found: "list[Node[_Spot[P]]]", ticket: Ticket[P]) -> Entry[P] | None:
    """The deepest snapshot that a prompt can go on from: one at its very end must have the logits."""
    for node in reversed(found):
        entry = None if node.value is None else node.value.entry
        if entry is None:
            continue
        last = (ticket.length - 1) // CHUNK * CHUNK if ticket.grows else ticket.length
        if entry.num_tokens < last or (entry.complete and not ticket.grows):
            return entry
    return None


def _points(ticket: Ticket[P], shared: int) -> list[int]:
    """Where an admitted prompt should leave snapshots, of what it has yet to absorb.

    Args:
        shared: tokens that it has in common with an earlier prompt.
    """
    start, length = ticket.start, ticket.length
    points = set(ticket.checkpoints) if ticket.grows else {length, *ticket.checkpoints}
    if shared - start >= LEAST_GAIN:
        points.add(shared)
    spacing = FIRST_SPACING
    while spacing < length:
        points.add(spacing)
        spacing *= 2
    return sorted(point for point in points if start < point <= length)
