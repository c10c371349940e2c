"""The engine's figures, kept as plain counters and sent as snapshots to the API processes."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from server.types import FinishReason, HistogramSnapshot

_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0),
)
_SECONDS_PER_TOKEN = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
_STEP_SECONDS = tuple(base * 10.0**exponent for exponent in range(-5, 1) for base in (1.0, 2.0, 5.0))
_TOKENS = tuple(float(1 << exponent) for exponent in range(15))


class Histogram:
    """Counts of values by upper bound, and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def snapshot(self) -> HistogramSnapshot:
        """A copy that can travel."""
        return HistogramSnapshot(self._bounds, list(self._counts), self._sum)


def seconds_histogram() -> Histogram:
    """Of times between a millisecond and a quarter of an hour."""
    return Histogram(_SECONDS)


@dataclass(slots=True)
class Figures:
    """What the engine counts since its start. Times in seconds.

    Attributes:
        accepted: choices queued; each is waiting, running or counted as finished, once.
        time_to_first_token: from a request's arrival to its choice's first token.
        time_per_output_token: per choice, the mean gap between its tokens after the first.
        end_to_end: from a request's arrival to its choice's end.
        queue_time: from a request's arrival to the lease of a slot.
        tokens_per_step: tokens absorbed by a step.
        step_parts: of a step: choosing its batch, launching it, the device's work on it, and retiring it, which
            includes waiting for the device. Where the processor is the device, its work is part of the launch.
        state_read: reading and checking a state's file.
        state_write: writing one.
    """

    accepted: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(
        default_factory=lambda: Counter({reason.name.lower(): 0 for reason in FinishReason if reason})
    )
    time_to_first_token: Histogram = field(default_factory=seconds_histogram)
    time_per_output_token: Histogram = field(default_factory=lambda: Histogram(_SECONDS_PER_TOKEN))
    end_to_end: Histogram = field(default_factory=seconds_histogram)
    queue_time: Histogram = field(default_factory=seconds_histogram)
    tokens_per_step: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    step_parts: dict[str, Histogram] = field(
        default_factory=lambda: {part: Histogram(_STEP_SECONDS) for part in ("schedule", "launch", "device", "retire")}
    )
    state_read: Histogram = field(default_factory=seconds_histogram)
    state_write: Histogram = field(default_factory=seconds_histogram)
