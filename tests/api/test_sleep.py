"""The routes that send the engine to sleep and wake it; tests/e2e/test_sleep.py does it to a real one."""

import asyncio
import json
from collections.abc import Iterator

import pytest

from server.api.engine_status import EngineStatus
from server.api.sleep import SleepSwitch
from tests.api.scripted import ScriptedEngine, Server, serve


class Launcher:
    """Does at once what it is asked for."""

    server: Server

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sleep(self, wait: bool) -> None:
        self.asked.append("wait" if wait else "abort")
        self.server.client.engine_asleep(None)

    def wake(self) -> None:
        self.asked.append("wake")
        self.server.client.status = EngineStatus.READY


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    switch = SleepSwitch(lambda wait: launcher.sleep(wait), lambda: launcher.wake())
    with serve(sleep_switch=switch, keys=("k",)) as launcher.server:
        launcher.server.http.headers["Authorization"] = "Bearer k"
        yield launcher


def test_what_is_asked_of_the_launcher(launcher: Launcher) -> None:
    http = launcher.server.http
    assert http.post("/sleep").json() == {"is_sleeping": True}
    assert http.get("/is_sleeping").json() == {"is_sleeping": True}
    assert launcher.server.complete().json()["error"]["code"] == "engine_asleep"
    assert http.post("/wake_up").json() == {"is_sleeping": False}
    assert http.get("/is_sleeping").json() == {"is_sleeping": False}
    assert launcher.server.complete().status_code == 200
    assert http.post("/sleep?level=2&mode=wait").json() == {"is_sleeping": True}
    assert launcher.asked == ["abort", "wake", "wait"]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/sleep?level=0", "level"),
        ("/sleep?level=", "level"),
        ("/sleep?mode=keep", "mode"),
        ("/sleep?tags=weights", "tags"),
        ("/wake_up?tags=weights", "tags"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(launcher: Launcher, path: str, param: str) -> None:
    answer = launcher.server.http.post(path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert launcher.asked == []


def test_an_engine_that_is_not_there_cannot_be_sent_to_sleep(launcher: Launcher) -> None:
    launcher.server.client.status = EngineStatus.STARTING
    answer = launcher.server.http.post("/sleep")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert launcher.asked == []


def test_without_a_key_or_the_mode_there_is_no_such_thing(launcher: Launcher) -> None:
    del launcher.server.http.headers["Authorization"]
    for method, path in (("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping")):
        assert launcher.server.http.request(method, path).status_code == 401
    with serve() as server:
        assert server.http.post("/sleep").status_code == 404


def test_an_engine_that_dies_and_starts_again_at_once_leaves_nobody_waiting(launcher: Launcher) -> None:
    """However soon the next status follows, also where an API process was too busy to look in between."""
    client = launcher.server.client

    def die() -> None:
        client.engine_died(1)
        client.status = EngineStatus.STARTING

    launcher.sleep = lambda wait: launcher.server.loop.call_soon(die)  # type: ignore[method-assign]
    answer = launcher.server.http.post("/sleep")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")


def test_an_engine_that_fails_to_start_at_once_leaves_nobody_waiting(launcher: Launcher) -> None:
    client = launcher.server.client

    def fail() -> None:
        client.status = EngineStatus.STARTING
        client.engine_asleep("no memory")

    launcher.wake = lambda: launcher.server.loop.call_soon(fail)  # type: ignore[method-assign]
    assert launcher.server.http.post("/sleep").status_code == 200
    answer = launcher.server.http.post("/wake_up")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_asleep")
    assert answer.json()["error"]["message"].endswith("no memory")


def test_an_engine_that_has_ended_ends_what_was_open() -> None:
    body = {"prompt": "a", "stream": True}
    with (
        serve(ScriptedEngine(paused=True)) as server,
        server.http.stream("POST", "/v1/completions", json=body) as response,
    ):
        server.call(lambda: server.client.engine_asleep(None))
        *_, last, done = [line for line in response.iter_lines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_asleep"
        assert done == "data: [DONE]"


def test_an_api_process_that_starts_while_the_engine_falls_asleep_takes_no_requests() -> None:
    with serve() as server:
        info = server.client.info
        assert info is not None
        server.client.status = EngineStatus.STARTING

        async def sleep_then_hear_of_the_engine() -> None:
            await server.client.fall_asleep(0.0)
            server.client._receive([info])

        asyncio.run_coroutine_threadsafe(sleep_then_hear_of_the_engine(), server.loop).result(10)
        assert server.complete().json()["error"]["code"] == "engine_asleep"
