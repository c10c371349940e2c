"""Pinned host memory in pieces of one size, reserved once: the driver takes tens of milliseconds for each."""

import logging
import threading
import time
from collections import deque

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ALIGNMENT = 256
_POLL_SECONDS = 0.01
_SLAB_BYTES = 1 << 30
"""The host allocator rounds to powers of two, so that pieces are cut from these."""


class PinnedPiece:
    """One piece, until the last reference to this is gone.

    Copies of the device's that still read or write it then are no danger: whoever gets the piece next uses it in the
    order of the same streams.
    """

    __slots__ = ("_free", "memory")

    def __init__(self, memory: Tensor, free: "deque[Tensor]") -> None:
        self.memory = memory
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.memory)


class PinnedPieces:
    """As many pieces as a budget holds. They are reserved by a thread of its own, while serving begins.

    Args:
        piece_bytes: at least what one takes.
        budget: most bytes of all.
    """

    def __init__(self, piece_bytes: int, budget: int) -> None:
        self._free: deque[Tensor] = deque()
        self._piece_bytes = -(-piece_bytes // ALIGNMENT) * ALIGNMENT
        self._coming = budget // self._piece_bytes
        self._reserving = threading.Thread(target=self._reserve, name="pinned-memory", daemon=True)
        self._reserving.start()

    def _reserve(self) -> None:
        start = time.monotonic()
        try:
            while self._coming:
                count = min(self._coming, max(1, _SLAB_BYTES // self._piece_bytes))
                slab = torch.empty(count * self._piece_bytes, dtype=torch.uint8, pin_memory=True)
                # In this order: a piece may be counted twice for a moment, but never be missing.
                self._free.extend(slab.split(self._piece_bytes))
                self._coming -= count
        except Exception as error:  # the host has less memory to give than was asked for
            logger.warning("no more pinned memory, %d states' less: %s", self._coming, error)
            self._coming = 0
        logger.info(
            "%d pieces of %d pinned bytes reserved in %.2f s",
            *(len(self._free), self._piece_bytes, time.monotonic() - start),
        )

    def __len__(self) -> int:
        """Pieces that nobody uses, those to come included."""
        return self._coming + len(self._free)

    def take(self) -> PinnedPiece | None:
        """A piece that nobody uses; None: there is none. Waits for one that is still to come."""
        while True:
            try:
                return PinnedPiece(self._free.popleft(), self._free)
            except IndexError:
                if not self._reserving.is_alive():
                    return PinnedPiece(self._free.popleft(), self._free) if self._free else None
            self._reserving.join(_POLL_SECONDS)
