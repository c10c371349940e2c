"""Who may have the free slots of a step, and who stands aside meanwhile, for a slot would be of no use yet.

Hundreds may wait for one snapshot that a prompt is about to leave. They keep no slot from others, and no step looks at
them, until it has come or turns out not to.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from server.engine.queue import WaitingQueue
from server.engine.sequence import Sequence
from server.engine.state_pool import SlotAllocator

if TYPE_CHECKING:
    from server.engine.prefix_cache import Awaited

_MAX_SKIPPED = 256
"""Most sequences that a step looks at beyond those for which there are slots."""


class Admission:
    """The waiting sequences of whom a slot is of use to.

    Args:
        waiting: all that wait.
        allocator: the slots.

    Attributes:
        awaiting: those that stand aside, by the snapshot that they wait for; some may have ended.
    """

    def __init__(self, waiting: WaitingQueue, allocator: SlotAllocator) -> None:
        self._waiting = waiting
        self._allocator = allocator
        self.awaiting: dict[Awaited[Any], list[Sequence]] = {}

    def candidates(self) -> list[Sequence]:
        """Who may have the free slots, in order; those found to have to wait for a snapshot stand aside from now on.

        Whoever comes before the last free slot has one, and a follower keeps it free until its leader is ready.
        """
        for awaited in [awaited for awaited in self.awaiting if not awaited.is_coming]:
            for seq in self.awaiting.pop(awaited):
                self._waiting.call_back(seq)
        free = self._allocator.num_free
        candidates: list[Sequence] = []
        blocked: list[Sequence] = []
        for seq in islice(self._waiting, free + _MAX_SKIPPED if free else 0):
            (blocked if seq.blocked else candidates).append(seq)
            if len(candidates) == free:
                break
        for seq in blocked:
            self.set_aside(seq)
        return candidates

    def others(self, candidates: Iterable[Sequence]) -> Iterator[Sequence]:
        """Prompts that come next, up to somebody who wants something else; the queue must not change meanwhile."""
        placed = set(candidates)
        for seq in islice(self._waiting, len(placed) + _MAX_SKIPPED):
            # Followers begin at the end of their leader's prompt at the earliest.
            if seq in placed or seq.leader in placed or seq.blocked:
                continue
            if seq.leader is not None or seq.snapshot is not None:
                return
            placed.add(seq)
            yield seq

    def unblocked(self, waiting: Iterable[Sequence]) -> Iterator[Sequence]:
        """Of these, in order, those to whom a slot is of use, of as many as are worth looking at in a step."""
        return (seq for seq in islice(waiting, self._allocator.num_free + _MAX_SKIPPED) if not seq.blocked)

    def set_aside(self, seq: Sequence) -> None:
        """Let a sequence stand aside as long as the snapshot that it waits for is to come, if it waits for one."""
        awaited = seq.awaited
        if awaited is not None:
            self._waiting.set_aside(seq)
            self.awaiting.setdefault(awaited, []).append(seq)
