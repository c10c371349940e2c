"""The checks of a soak notice what they are there for."""

from array import array
from collections import Counter
from typing import Any

from tests.ops.soak.report import checks
from tests.ops.soak.traffic import Record
from tests.ops.soak.watch import GAUGES, Sample

MIB = 1 << 20


def record(*, milliseconds: float = 10, wrong: int = 0) -> Record:
    made = Record(Counter(answered=90, refused=5, left=5, wrong=wrong))
    made.first = array("d", [milliseconds / 1000] * 100)
    made.gaps = array("d", [milliseconds / 1000] * 100)
    return made


def sample(seconds: float = 0, engine: float = 500, **metrics: float) -> Sample:
    figures = dict.fromkeys((*GAUGES, "gale_engine_deaths_total", "gale_requests_accepted_total"), 0.0) | metrics
    return Sample(seconds, {"engine": int(engine * MIB)}, figures)


def failed(**changes: Any) -> list[str]:
    """The checks that fail after a soak that went well but for these."""
    ended = {"gale_requests_finished_total,reason=length": 92.0, "gale_requests_finished_total,reason=cancelled": 3.0}
    ended |= {"gale_requests_accepted_total": 95.0}
    went = {
        "records": [record() for _ in range(9)],
        "samples": [sample(10 * number) for number in range(90)],
        "idle": (sample(), sample(**ended)),
        "choices": Counter(answered=90, perhaps=5),
        "cached": 10,
        "states_left": 0,
        "p99_factor": 1.5,
    }
    return [check.name for check in checks(**(went | changes)) if not check.passed]


def test_a_good_run_passes() -> None:
    assert failed() == []


def test_an_answer_that_was_wrong() -> None:
    records = [*(record() for _ in range(8)), record(wrong=1)]
    assert failed(records=records) == ["every request has one answer, and the right one"]


def test_a_server_error_that_no_client_saw() -> None:
    after = sample(**{"gale_http_requests_total,method=POST,route=/v1/completions,status=500": 1.0})
    after.metrics.update({"gale_requests_finished_total,reason=length": 92.0, "gale_requests_accepted_total": 92.0})
    assert failed(idle=(sample(), after)) == ["no status of 5xx, as clients and as the server count"]


def test_memory_that_grows() -> None:
    growing = [sample(10 * number, engine=500 + number) for number in range(90)]
    assert failed(samples=growing) == ["memory of engine is flat"]
    warming_up = [sample(10 * number, engine=500 + min(number, 30)) for number in range(90)]
    assert failed(samples=warming_up) == []


def test_latency_that_grows() -> None:
    records = [record(milliseconds=10 + 2 * number) for number in range(9)]
    assert failed(records=records) == ["ttft_p99_ms is stable", "gap_p99_ms is stable"]


def test_a_choice_that_the_engine_never_ended() -> None:
    short = sample(**{"gale_requests_finished_total,reason=length": 89.0, "gale_requests_accepted_total": 90.0})
    assert failed(idle=(sample(), short)) == [
        "the engine ended as many choices as were asked for",
        "every choice that was accepted has ended once",
    ]


def test_a_slot_and_a_state_that_stay() -> None:
    ended = {"gale_requests_finished_total,reason=length": 92.0, "gale_requests_accepted_total": 92.0}
    after = sample(gale_slots_used=1.0, **ended)
    assert failed(idle=(sample(), after), states_left=1) == [
        "no saved state is left",
        "idle again: " + ", ".join(GAUGES),
    ]
