"""The sequences that wait for a slot, in the order in which they get one."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator

from server.engine.sequence import Sequence


class WaitingQueue:
    """Waiting sequences by priority, the lower value first, and among equals by arrival.

    Iterating yields them in this order. A sequence must not be added twice, and its priority must not change while it
    waits.
    """

    def __init__(self) -> None:
        # Ordered dictionaries: an ordinary one is slow to find its first entry once many before it are gone.
        self._classes: dict[int, OrderedDict[Sequence, None]] = {}
        self._priorities: list[int] = []
        self._length = 0

    def add(self, seq: Sequence) -> None:
        """Put a sequence behind those of its priority."""
        same = self._classes.get(seq.priority)
        if same is None:
            same = self._classes[seq.priority] = OrderedDict()
            insort(self._priorities, seq.priority)
        same[seq] = None
        self._length += 1

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands.

        Raises:
            KeyError: it does not wait here.
        """
        same = self._classes[seq.priority]
        del same[seq]
        self._length -= 1
        if not same:
            del self._classes[seq.priority]
            del self._priorities[bisect_left(self._priorities, seq.priority)]

    def __iter__(self) -> Iterator[Sequence]:
        for priority in self._priorities:
            yield from self._classes[priority]

    def __len__(self) -> int:
        return self._length

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._classes.get(seq.priority, ())
