"""The server's Prometheus metrics: every name, in one place.

The engine counts; an API process shows the newest snapshot it was sent. Names follow Prometheus'
conventions (base units, ``_total`` for counters, no colons).

==================================== ========= ==============================================================
name                                 type      meaning
==================================== ========= ==============================================================
gale_engine_ready                    gauge     1 if new requests are accepted, else 0
gale_requests_running                gauge     choices that hold a state slot
gale_requests_waiting                gauge     choices that wait for a slot
gale_slots_used                      gauge     state slots in use
gale_slots_capacity                  gauge     state slots there are
gale_prompt_tokens_total             counter   prompt tokens absorbed
gale_generated_tokens_total          counter   tokens generated
gale_requests_finished_total         counter   choices ended, by ``reason``: stop, length, cancelled, error, abort
gale_time_to_first_token_seconds     histogram from a request's arrival to a choice's first token
gale_time_per_output_token_seconds   histogram a choice's mean time between tokens after its first
gale_request_duration_seconds        histogram from a request's arrival to the end of a choice
gale_queue_time_seconds              histogram from a request's arrival to the lease of a slot
gale_step_tokens                     histogram tokens absorbed in one engine step
==================================== ========= ==============================================================
"""

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from server.types import EngineStats, HistogramSnapshot

_GAUGES: Final = (
    ("gale_requests_running", "Choices that hold a state slot.", "running"),
    ("gale_requests_waiting", "Choices that wait for a state slot.", "waiting"),
    ("gale_slots_used", "State slots in use.", "slots_used"),
    ("gale_slots_capacity", "State slots there are.", "slots_total"),
)
_COUNTERS: Final = (
    ("gale_prompt_tokens_total", "Prompt tokens absorbed.", "prompt_tokens"),
    ("gale_generated_tokens_total", "Tokens generated.", "generated_tokens"),
)
_HISTOGRAMS: Final = (
    (
        "gale_time_to_first_token_seconds",
        "From a request's arrival to a choice's first token.",
        "time_to_first_token",
    ),
    (
        "gale_time_per_output_token_seconds",
        "A choice's mean time between tokens after its first.",
        "time_per_output_token",
    ),
    ("gale_request_duration_seconds", "From a request's arrival to the end of a choice.", "end_to_end"),
    ("gale_queue_time_seconds", "From a request's arrival to the lease of a state slot.", "queue_time"),
    ("gale_step_tokens", "Tokens absorbed in one engine step.", "tokens_per_step"),
)


class EngineCollector(Collector):
    """Shows the engine's newest figures.

    Args:
        stats: returns the newest snapshot; None before the first.
        ready: returns whether new requests are accepted.
    """

    def __init__(self, stats: Callable[[], EngineStats | None], ready: Callable[[], bool]) -> None:
        self._stats = stats
        self._ready = ready

    def collect(self) -> Iterator[Metric]:
        """All metrics; only ``gale_engine_ready`` before the first snapshot."""
        yield GaugeMetricFamily("gale_engine_ready", "1 if new requests are accepted, else 0.", value=self._ready())
        stats = self._stats()
        if stats is None:
            return
        for name, text, field in _GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))
        for name, text, field in _COUNTERS:
            yield CounterMetricFamily(name, text, value=getattr(stats, field))
        finished = CounterMetricFamily("gale_requests_finished_total", "Choices ended, by reason.", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
        for name, text, field in _HISTOGRAMS:
            yield _histogram(name, text, getattr(stats, field))


def _histogram(name: str, text: str, snapshot: HistogramSnapshot) -> HistogramMetricFamily:
    bounds = [*map(str, snapshot.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(snapshot.counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=snapshot.sum)
