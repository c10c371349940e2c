"""The server's Prometheus metrics: every name, in one place.

The engine counts; an API process shows the newest snapshot it was sent. API processes count HTTP requests in files
that they share, so each shows the sums of all. Names follow Prometheus'
conventions (base units, ``_total`` for counters, no colons).

==================================== ========= ==============================================================
name                                 type      meaning
==================================== ========= ==============================================================
gale_engine_ready                    gauge     1 if new requests are accepted, else 0
gale_engine_asleep                   gauge     1 if the engine has been sent to sleep, else 0
gale_engine_deaths_total             counter   engine processes that died and were replaced
gale_api_process_deaths_total        counter   API processes that died and were replaced
gale_requests_running                gauge     choices that hold a state slot
gale_requests_waiting                gauge     choices that wait for a slot
gale_slots_used                      gauge     state slots in use
gale_slots_capacity                  gauge     state slots there are
gale_requests_accepted_total         counter   choices queued: those that run, that wait and that have ended
gale_prompt_tokens_total             counter   prompt tokens absorbed
gale_generated_tokens_total          counter   tokens generated
gale_prefix_hits_total               counter   prompts that began from a parked state
gale_prefix_misses_total             counter   prompts that could have, had there been one
gale_prefix_tokens_saved_total       counter   prompt tokens that were not absorbed therefore
gale_states_evicted_total            counter   parked states given up for want of room
gale_requests_finished_total         counter   choices ended, by ``reason``: stop, length, cancelled, error, abort
gale_states_parked                   gauge     parked states, by ``tier``: device, host, disk
gale_states_parked_bytes             gauge     their bytes, by ``tier``
gale_time_to_first_token_seconds     histogram from a request's arrival to a choice's first token
gale_time_per_output_token_seconds   histogram a choice's mean time between tokens after its first
gale_request_duration_seconds        histogram from a request's arrival to the end of a choice
gale_queue_time_seconds              histogram from a request's arrival to the lease of a slot
gale_step_tokens                     histogram tokens absorbed in one engine step
gale_state_restore_seconds           histogram copying a parked state to a slot
gale_state_save_seconds              histogram copying a slot's state, to be parked
gale_state_read_seconds              histogram reading and checking a parked state's file
gale_state_write_seconds             histogram writing one
gale_step_seconds                    histogram one engine step, by ``part``: schedule, launch, device, retire
gale_http_requests_total             counter   HTTP requests ended, by ``method``, ``route``, ``status``
gale_http_request_duration_seconds   histogram from a request's head to the end of its answer, by ``route``
gale_http_requests_in_progress       gauge     HTTP requests being answered
==================================== ========= ==============================================================
"""

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from server.types import EngineStats, HistogramSnapshot, SavedStats

disable_created_metrics()  # a second series for each, which nobody asks for

MULTIPROCESS_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
_METHODS: Final = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"})
_HTTP_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

_GAUGES: Final = (
    ("gale_requests_running", "Choices that hold a state slot.", "running"),
    ("gale_requests_waiting", "Choices that wait for a state slot.", "waiting"),
    ("gale_requests_swapped", "Waiting choices that have run, and gave their slot to a more urgent one.", "swapped"),
    ("gale_slots_used", "State slots in use.", "slots_used"),
    ("gale_slots_capacity", "State slots there are.", "slots_total"),
)
_COUNTERS: Final = (
    ("gale_requests_accepted_total", "Choices queued: those that run, that wait and that have ended.", "accepted"),
    ("gale_prompt_tokens_total", "Prompt tokens absorbed.", "prompt_tokens"),
    ("gale_generated_tokens_total", "Tokens generated.", "generated_tokens"),
    ("gale_prefix_hits_total", "Prompts that began from a parked state.", "prefix_hits"),
    ("gale_prefix_misses_total", "Prompts that could have, had there been one.", "prefix_misses"),
    ("gale_prefix_tokens_saved_total", "Prompt tokens that were not absorbed therefore.", "prefix_tokens_saved"),
    ("gale_states_evicted_total", "Parked states given up for want of room.", "states_evicted"),
    ("gale_swaps_out_total", "States of running choices moved to the host's memory.", "swaps_out"),
    ("gale_swaps_in_total", "States of waiting choices moved back.", "swaps_in"),
    ("gale_swap_bytes_total", "Bytes of states moved either way.", "swapped_bytes"),
)
_TIERS: Final = (
    ("gale_states_parked", "Parked states.", "states_parked"),
    ("gale_states_parked_bytes", "Bytes of parked states.", "states_parked_bytes"),
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
    ("gale_state_restore_seconds", "Copying a parked state to a slot.", "state_restore"),
    ("gale_state_save_seconds", "Copying a slot's state, to be parked.", "state_save"),
    ("gale_state_read_seconds", "Reading and checking a parked state's file.", "state_read"),
    ("gale_state_write_seconds", "Writing a parked state's file.", "state_write"),
)


class EngineCollector(Collector):
    """Shows the engine's newest figures.

    Args:
        stats: returns the newest snapshot; None before the first.
        ready: returns whether new requests are accepted.
        asleep: returns whether the engine has been sent to sleep.
        deaths: returns how many engines have died.
        api_deaths: returns how many API processes have.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats | None],
        ready: Callable[[], bool],
        asleep: Callable[[], bool],
        deaths: Callable[[], int],
        api_deaths: Callable[[], int],
    ) -> None:
        self._stats = stats
        self._ready = ready
        self._asleep = asleep
        self._deaths = deaths
        self._api_deaths = api_deaths

    def collect(self) -> Iterator[Metric]:
        """All metrics; only the first four before the first snapshot."""
        yield GaugeMetricFamily("gale_engine_ready", "1 if new requests are accepted, else 0.", value=self._ready())
        yield GaugeMetricFamily(
            "gale_engine_asleep", "1 if the engine has been sent to sleep, else 0.", value=self._asleep()
        )
        yield CounterMetricFamily(
            "gale_engine_deaths_total", "Engine processes that died and were replaced.", value=self._deaths()
        )
        yield CounterMetricFamily(
            "gale_api_process_deaths_total", "API processes that died and were replaced.", value=self._api_deaths()
        )
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
        for name, text, field in _TIERS:
            parked = GaugeMetricFamily(name, text, labels=["tier"])
            for tier, value in getattr(stats, field).items():
                parked.add_metric([tier], value)
            yield parked
        for name, text, field in _HISTOGRAMS:
            yield _histogram(name, text, getattr(stats, field))
        yield from _saved(stats.saved)
        steps = HistogramMetricFamily("gale_step_seconds", "One engine step, by part.", labels=["part"])
        for part, snapshot in stats.step_parts.items():
            steps.add_metric([part], _buckets(snapshot), snapshot.sum)
        yield steps


def _saved(saved: SavedStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("gale_saved_states", "Saved states.", value=saved.states)
    yield GaugeMetricFamily("gale_saved_states_bytes", "Bytes of their files, or else in memory.", value=saved.nbytes)
    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    text = "Bytes of their transcripts in memory."
    yield gauge("gale_saved_transcripts_bytes", text, value=saved.transcript_bytes)
    yield _labelled(gauge("gale_saved_snapshots", "Their snapshots.", labels=["tier"]), saved.snapshots)
    yield _labelled(gauge("gale_saved_snapshots_bytes", "Bytes of these.", labels=["tier"]), saved.snapshots_bytes)
    text = "What was done with saved states."
    yield _labelled(counter("gale_saved_state_operations_total", text, labels=["operation"]), saved.operations)
    seconds = HistogramMetricFamily("gale_saved_state_seconds", "Until a state's file was there.", labels=["operation"])
    for operation, snapshot in saved.seconds.items():
        seconds.add_metric([operation], _buckets(snapshot), snapshot.sum)
    yield seconds
    text = "States whose files could not be written."
    yield counter("gale_saved_states_failed_total", text, value=saved.failed)
    text = "Files found at the start that are not used."
    yield _labelled(gauge("gale_saved_state_files_skipped", text, labels=["reason"]), saved.skipped)
    yield _labelled(
        gauge("gale_saved_state_files_skipped_bytes", "Their bytes.", labels=["reason"]), saved.skipped_bytes
    )


def _labelled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, int]) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family


class HttpMetrics:
    """Counts HTTP requests.

    Where the environment names a folder in ``PROMETHEUS_MULTIPROC_DIR``, which must be so before prometheus_client is
    imported, all processes that share it count together, and the figures of those that died are kept.
    """

    def __init__(self) -> None:
        self._own = CollectorRegistry()
        self._requests = Counter(
            "gale_http_requests", "HTTP requests ended.", ["method", "route", "status"], registry=self._own
        )
        self._seconds = Histogram(
            "gale_http_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=_HTTP_SECONDS,
            registry=self._own,
        )
        self._running = Gauge(
            "gale_http_requests_in_progress",
            "HTTP requests being answered.",
            registry=self._own,
            multiprocess_mode="livesum",
        )

    def begin(self) -> None:
        """A request has come."""
        self._running.inc()

    def end(self, method: str, route: str, status: int, seconds: float) -> None:
        """It has been answered.

        Args:
            method: as sent; unknown ones count as one.
            route: the template of its path, so that there are few.
        """
        self._running.dec()
        self._requests.labels(method if method in _METHODS else "(other)", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def register(self, registry: CollectorRegistry) -> None:
        """Let a registry show the figures."""
        folder = os.environ.get(MULTIPROCESS_FOLDER)
        if folder is None:
            registry.register(_Forward(self._own))
        else:
            MultiProcessCollector(registry, path=folder)


class _Forward(Collector):
    """What another registry holds."""

    def __init__(self, source: CollectorRegistry) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        yield from self._source.collect()


def _histogram(name: str, text: str, snapshot: HistogramSnapshot) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, buckets=_buckets(snapshot), sum_value=snapshot.sum)


def _buckets(snapshot: HistogramSnapshot) -> list[tuple[str, float]]:
    bounds = [*map(str, snapshot.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(snapshot.counts)), strict=True))
