"""States that come from the host layer by layer, while the layers before theirs are at work.

The bus takes a millisecond for 50 MB, which is longer than many a step lasts until it turns to the last layers. So the
copies of one restored state are cut into groups of layers on a stream of their own, and captured steps with prompts
wait before the first layer of each group until it is there. At 1.3B on an H200, a layer's copy takes 41 microseconds,
and a step of 64 tokens is at work on it for 70, so groups may grow by half each. Behind such a step everything has
come.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from server.engine.snapshot import Snapshot
from server.engine.state_pool import StateTensors


class Arrivals:
    """Brings states from the host to slots of a pool on a CUDA device.

    Args:
        states: the pool.

    Attributes:
        stream: of the copies.
    """

    def __init__(self, states: StateTensors) -> None:
        self._states = states
        device = states.device
        self.stream = torch.cuda.Stream(device)
        # Where each group begins, and what is recorded when it is there.
        self._events: dict[int, torch.cuda.Event] = {}
        start, size, layers = 0, 2, len(states.layers)
        while start < layers:
            self._events[start] = torch.cuda.Event(external=True)
            self._events[start].record()  # makes it: what has never been recorded cannot be captured
            start, size = start + size, size * 3 // 2
        bounds = [*self._events, layers]
        self._sizes = [end - start for start, end in pairwise(bounds)]
        self._parts = [name for name in states.parts if not name.startswith("ring_")]

    def takes(self, snapshot: Snapshot, slots: Sequence[int]) -> bool:
        """Whether a snapshot can come this way: to one slot, from pinned memory, of the pool's types, no ring."""
        return (
            len(slots) == 1
            and snapshot.num_folded == snapshot.num_tokens
            and all(name in snapshot.parts for name in self._parts)
            and all(
                snapshot.parts[name].is_pinned() and snapshot.parts[name].dtype == self._states.parts[name].dtype
                for name in self._parts
            )
        )

    def bring(self, snapshot: Snapshot, slot: int) -> None:
        """Put the copies of a snapshot that :meth:`takes` admits into :attr:`stream`, which must be the current one.

        Whoever uses the slot next waits for the layers (:meth:`wait_for`), or for the stream.
        """
        if snapshot.copied is not None:
            self.stream.wait_event(snapshot.copied)
        # All layers of a slot are contiguous, as what comes over the bus has to be.
        parts = [
            (self._states.parts[name][:, slot].split(self._sizes), snapshot.parts[name].split(self._sizes))
            for name in self._parts
        ]
        for group, event in enumerate(self._events.values()):
            for targets, sources in parts:
                targets[group].copy_(sources[group], non_blocking=True)
            event.record(self.stream)

    def wait_for(self, layer: int) -> None:
        """Make the current stream, which captures, wait until a layer's states are there; for each layer in turn."""
        event = self._events.get(layer)
        if event is not None:
            event.wait()
