"""Pinned memory in pieces, which come while whoever wants them is at work already."""

import threading

import pytest
import torch

from server.engine import pinned
from server.engine.pinned import PinnedPieces


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Slabs of two pieces, which come one by one as this is released; of ordinary memory."""
    gate = threading.Semaphore(0)
    empty = torch.empty

    def late(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        gate.acquire()
        return empty(size, dtype=dtype)

    monkeypatch.setattr(pinned, "_SLAB_BYTES", 2 * 512)
    monkeypatch.setattr(torch, "empty", late)
    return gate


def test_whoever_wants_a_piece_waits_for_it(gate: threading.Semaphore) -> None:
    pieces = PinnedPieces(500, 5 * 512)
    assert len(pieces) == 5
    timer = threading.Timer(0.1, gate.release)
    timer.start()
    first, second = pieces.take(), pieces.take()
    timer.join()
    assert first is not None and second is not None
    assert first.memory.shape == (512,) and first.memory.data_ptr() != second.memory.data_ptr()
    assert len(pieces) == 3
    gate.release(2)
    others = [pieces.take() for _ in range(4)]
    assert [other is None for other in others] == [False, False, False, True]
    assert len(pieces) == 0
    address = first.memory.data_ptr()
    del first
    again = pieces.take()
    assert again is not None and again.memory.data_ptr() == address


def test_a_host_that_has_no_more_gives_what_it_has(gate: threading.Semaphore, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = PinnedPieces(512, 6 * 512)

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "empty", fail)
    gate.release()  # the slab that is under way
    taken = [pieces.take() for _ in range(3)]
    assert [piece is None for piece in taken] == [False, False, True]
    assert len(pieces) == 0
