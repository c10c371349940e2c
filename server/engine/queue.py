"""Who waits for a slot, and whose turn it is.

The tenant (API key) with the fewest running sequences is next; between tenants with equally many, the one whose last
turn is longest ago. Within a tenant, lower priority values go first, and among equals the oldest sequence. So every
tenant with work waiting gets the same share of the slots, and the thousands of choices that one has queued do not
delay another's first, however urgent it calls them. Without keys, all is one tenant's.

Whoever could do nothing with a slot yet stands aside: it is not looked at until it is called back, to the place that it
had.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from operator import itemgetter
from typing import TypeAlias, TypeVar

from server.engine.sequence import Sequence

K = TypeVar("K")

_Line: TypeAlias = list[tuple[int, Sequence]]
"""Sequences with their places, in order; no two places are the same."""
_place = itemgetter(0)


class WaitingQueue:
    """The waiting sequences, and how many of each tenant run.

    Iterating yields them in the order in which they would be given slots now, without those that stand aside; the queue
    must not change meanwhile. A sequence must not be added twice, and neither its priority nor its tenant may change
    while it waits.

    Attributes:
        aside: sequences that wait, but not for a slot.
    """

    def __init__(self) -> None:
        # By tenant and priority; neither level keeps empty entries.
        self._classes: dict[str, dict[int, _Line]] = {}
        self._places: dict[Sequence, int] = {}
        self._behind, self._before = count(), count(-1, -1)
        self.aside: set[Sequence] = set()
        self._running: Counter[str] = Counter()
        # By tenant, how many of each priority run.
        self._priorities: dict[str, Counter[int]] = {}
        self._waiting: Counter[str] = Counter()
        self._last_turn: dict[str, int] = {}
        self._turns = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._places

    def __iter__(self) -> Iterator[Sequence]:
        running, last_turn, turn = Counter(self._running), dict(self._last_turn), self._turns
        # Between tenants that never had a turn, the one that came first: so sequences are never compared.
        turns = [
            (running[tenant], last_turn.get(tenant, 0), place, tenant, _by_priority(lines))
            for place, (tenant, lines) in enumerate(self._classes.items())
        ]
        heapq.heapify(turns)
        while turns:
            _, _, place, tenant, line = turns[0]
            seq = next(line, None)
            if seq is None:
                heapq.heappop(turns)
                continue
            yield seq
            running[tenant] += 1
            turn += 1
            last_turn[tenant] = turn
            heapq.heapreplace(turns, (running[tenant], turn, place, tenant, line))

    def num_waiting(self, tenant: str) -> int:
        """How many of a tenant's sequences wait."""
        return self._waiting[tenant]

    def num_open(self, tenant: str) -> int:
        """How many of a tenant's sequences wait or run."""
        return self._waiting[tenant] + self._running[tenant]

    def add(self, seq: Sequence, *, first: bool = False) -> None:
        """Put a sequence behind those of its tenant and priority; ``first``: before them."""
        self._places[seq] = next(self._before if first else self._behind)
        self._waiting[seq.tenant] += 1
        self._join_line(seq)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that is no longer wanted.

        Raises:
            KeyError: it does not wait.
        """
        if seq in self.aside:
            self.aside.remove(seq)
        else:
            self._leave_line(seq)
        del self._places[seq]
        _lower(self._waiting, seq.tenant)

    def set_aside(self, seq: Sequence) -> None:
        """Let a waiting sequence stand aside until it is called back.

        Raises:
            KeyError: it does not wait.
        """
        if seq not in self.aside:
            self._leave_line(seq)
            self.aside.add(seq)

    def call_back(self, seq: Sequence) -> None:
        """Give a sequence its place again, if it stands aside."""
        if seq in self.aside:
            self.aside.remove(seq)
            self._join_line(seq)

    def start(self, seq: Sequence) -> None:
        """Take out a sequence that has been given a slot: its tenant has had a turn, and one more runs.

        Raises:
            KeyError: it does not wait.
        """
        self.remove(seq)
        self._running[seq.tenant] += 1
        self._priorities.setdefault(seq.tenant, Counter())[seq.priority] += 1
        self._turns += 1
        self._last_turn[seq.tenant] = self._turns

    def end(self, seq: Sequence) -> None:
        """A sequence that ran has ended."""
        _lower(self._running, seq.tenant)
        priorities = self._priorities[seq.tenant]
        _lower(priorities, seq.priority)
        if not priorities:
            del self._priorities[seq.tenant]

    def swap(self, seq: Sequence) -> None:
        """Put a sequence that ran before those of its tenant and priority, who came later."""
        self.end(seq)
        self.add(seq, first=True)

    def overtaken(self) -> Iterator[str]:
        """The tenants of whom a sequence waits that is more urgent than one that runs."""
        for tenant, lines in self._classes.items():
            running = self._priorities.get(tenant)
            if running and min(lines) < max(running):
                yield tenant

    def line(self, tenant: str) -> Iterator[Sequence]:
        """A tenant's waiting sequences, the most urgent first; the queue must not change meanwhile."""
        return _by_priority(self._classes.get(tenant, {}))

    def _join_line(self, seq: Sequence) -> None:
        line = self._classes.setdefault(seq.tenant, {}).setdefault(seq.priority, [])
        insort(line, (self._places[seq], seq), key=_place)

    def _leave_line(self, seq: Sequence) -> None:
        place = self._places[seq]
        lines = self._classes[seq.tenant]
        line = lines[seq.priority]
        del line[bisect_left(line, place, key=_place)]
        if not line:
            del lines[seq.priority]
            if not lines:
                del self._classes[seq.tenant]


def in_turns(sequences: Iterable[Sequence]) -> list[Sequence]:
    """The first sequence of every tenant, then the second of every tenant ...; a tenant's most urgent come first.

    Args:
        sequences: in the order that counts among equals of a tenant, and between the n-th of two tenants.
    """
    seen: Counter[str] = Counter()
    ranks: list[tuple[int, int, Sequence]] = []
    for place, seq in sorted(enumerate(sequences), key=lambda entry: entry[1].priority):
        ranks.append((seen[seq.tenant], place, seq))
        seen[seq.tenant] += 1
    ranks.sort(key=lambda rank: rank[:2])
    return [seq for *_, seq in ranks]


def _by_priority(lines: dict[int, _Line]) -> Iterator[Sequence]:
    for priority in sorted(lines):
        for _, seq in lines[priority]:
            yield seq


def _lower(counts: "Counter[K]", key: K) -> None:
    """Count one less; nothing is kept of those that have nothing."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
