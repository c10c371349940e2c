"""Who counts as hung, on a clock that the tests turn."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from server import watchdog
from server.watchdog import Watchdog


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def child(name: str, heartbeat: float) -> Any:
    return SimpleNamespace(name=name, heartbeat=ctypes.c_double(heartbeat), failure=None, ready=True, started=0.0)


def look_for(dog: Watchdog, clock: Clock, seconds: float, children: list[Any], *, beating: list[Any]) -> None:
    """As the launcher does, several times a second."""
    until = clock.now + seconds
    while clock.now < until:
        clock.now += 0.25
        for one in beating:
            one.heartbeat.value = clock.now
        dog.look(children[0], children[1:])


def test_who_is_late_has_failed_and_nobody_else(clock: Clock) -> None:
    dog = Watchdog(10, 0)
    hanging, beating, waiting = child("engine", clock.now), child("api-0", clock.now), child("api-1", 0.0)
    look_for(dog, clock, 10, [hanging, beating, waiting], beating=[beating])
    assert hanging.failure is None
    look_for(dog, clock, 1, [hanging, beating, waiting], beating=[beating])
    assert hanging.failure.reason == "the engine process hung for more than 10 s"
    assert beating.failure is None and waiting.failure is None


def test_time_in_which_everything_stood_still_does_not_count(clock: Clock) -> None:
    dog = Watchdog(10, 0)
    stopped = child("engine", clock.now)
    look_for(dog, clock, 8, [stopped], beating=[])
    clock.now += 3600
    look_for(dog, clock, 9, [stopped], beating=[])
    assert stopped.failure is None
    look_for(dog, clock, 2, [stopped], beating=[])
    assert stopped.failure is not None, "it still hangs"


def test_without_a_limit_nobody_hangs_and_nobody_is_looked_at(clock: Clock) -> None:
    dog = Watchdog(0, 0)
    hanging = child("engine", clock.now)
    look_for(dog, clock, 1000, [hanging], beating=[])
    assert hanging.failure is None
    assert dog.next_look() == float("inf")


def test_an_engine_that_never_gets_ready_has_failed_and_one_that_does_may_go_on(clock: Clock) -> None:
    dog = Watchdog(0, 60)
    loading = child("engine", 0.0)
    loading.ready, loading.started = False, clock.now
    look_for(dog, clock, 60, [loading], beating=[])
    assert loading.failure is None
    look_for(dog, clock, 1, [loading], beating=[])
    assert loading.failure.reason == "the engine process was not ready within 60 s"
    loading.failure, loading.ready = None, True
    look_for(dog, clock, 1000, [loading], beating=[])
    assert loading.failure is None
