"""Host memory in pieces of one size, reserved once: pinning one takes the driver tens of milliseconds, and so does new
memory of that size when it is first written to."""

import logging
import time
from collections import deque

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ALIGNMENT = 256
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
    """As many pieces as a budget holds.

    Args:
        piece_bytes: at least what one takes.
        budget: most bytes of all.
        pin: whether a CUDA device is to copy from and to it.
    """

    def __init__(self, piece_bytes: int, budget: int, *, pin: bool = True) -> None:
        self._free: deque[Tensor] = deque()
        piece_bytes = -(-piece_bytes // ALIGNMENT) * ALIGNMENT
        start, left = time.monotonic(), budget // piece_bytes
        while left:
            count = min(left, max(1, _SLAB_BYTES // piece_bytes))
            slab = torch.empty(count * piece_bytes, dtype=torch.uint8, pin_memory=pin)
            self._free.extend(slab.split(piece_bytes))
            left -= count
        logger.info("%d pieces of %d bytes reserved in %.2f s", len(self._free), piece_bytes, time.monotonic() - start)

    def __len__(self) -> int:
        """Pieces that nobody uses."""
        return len(self._free)

    def take(self) -> PinnedPiece | None:
        """A piece that nobody uses; None: there is none."""
        return PinnedPiece(self._free.popleft(), self._free) if self._free else None
