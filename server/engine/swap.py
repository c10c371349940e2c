"""Host memory for the states of running sequences that have to wait: what a slot holds, bit for bit, and nothing else.

A sequence that gives up its slot for a more urgent one absorbs no token twice. Everything that its slot held, the ring
included, is copied to the host, and later to whatever slot it gets; what the sampler knows of it is written anew.
"""

from collections import deque

import torch

from server.engine.pinned import PinnedPieces
from server.engine.snapshot import Snapshot, take_snapshot, to_host
from server.engine.state_pool import StateTensors

MAX_LEAVING = 2
"""States on their way from the device to the host at once; each takes memory on the device until it has left."""


class SwapSpace:
    """Takes states out of their slots.

    Args:
        states: the pool.
        capacity: most states that are out of their slots at once.
        nbytes: at least what one takes, every tensor aligned.

    Attributes:
        num_out, num_in: states taken out, and brought back, since the start.
        num_bytes: copied by both.
    """

    def __init__(self, states: StateTensors, capacity: int, nbytes: int) -> None:
        self._states = states
        self._capacity = capacity
        self._pieces: PinnedPieces | None = None
        if states.device.type == "cuda":
            self._pieces = PinnedPieces(nbytes, capacity * nbytes)
        self._leaving: deque[torch.cuda.Event] = deque()
        self.num_out = 0
        self.num_in = 0
        self.num_bytes = 0

    def room(self, num_swapped: int) -> int:
        """How many more states may be taken out in the next step.

        Args:
            num_swapped: states that are out of their slots now.
        """
        if self._pieces is None:
            return self._capacity - num_swapped
        while self._leaving and self._leaving[0].query():
            self._leaving.popleft()
        return min(self._capacity - num_swapped, len(self._pieces), MAX_LEAVING - len(self._leaving))

    def take(self, slot: int, *, num_tokens: int, num_folded: int) -> Snapshot:
        """Copy what a slot holds to the host, in the order of the stream: the slot may be written from now on.

        Args:
            slot: of the sequence.
            num_tokens, num_folded: as in :class:`Snapshot`.
        """
        snapshot = take_snapshot(self._states, slot, None, num_tokens=num_tokens, num_folded=num_folded)
        if self._pieces is not None:
            piece = self._pieces.take()
            assert piece is not None, "there was no room"
            snapshot = to_host(snapshot, piece)
            assert snapshot.copied is not None
            self._leaving.append(snapshot.copied)
        self.num_out += 1
        self.num_bytes += snapshot.nbytes
        return snapshot

    def brought_back(self, snapshot: Snapshot) -> None:
        """Count a state that is in a slot again."""
        self.num_in += 1
        self.num_bytes += snapshot.nbytes
