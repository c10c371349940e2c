"""How long copies of states take, without waiting for them."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from server.engine.stats import Histogram

_BOUNDS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


class CopyClock:
    """Times what is put into the device's queue, by the device's own clock; on the CPU, what is done.

    Args:
        device: where the copies take place.

    Attributes:
        restores: seconds to bring a parked state to its slots.
        saves: seconds to copy a slot's state.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._running: deque[tuple[Histogram, torch.cuda.Event, torch.cuda.Event]] = deque()
        # Making two events takes as long as launching two copies.
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.restores = Histogram(_BOUNDS)
        self.saves = Histogram(_BOUNDS)

    @contextmanager
    def time(self, histogram: Histogram) -> Iterator[None]:
        """Enter into a histogram what the body takes, now or when ``collect`` finds it completed."""
        if not self._on_cuda:
            begin = time.perf_counter()
            yield
            histogram.observe(time.perf_counter() - begin)
            return
        if not self._spare:
            self._spare.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        start, end = self._spare.pop()
        start.record()
        yield
        end.record()
        self._running.append((histogram, start, end))

    def collect(self) -> None:
        """Enter the copies that the device has completed."""
        while self._running and self._running[0][2].query():
            histogram, start, end = self._running.popleft()
            histogram.observe(start.elapsed_time(end) / 1000)
            self._spare.append((start, end))
