"""The routes that send the engine to sleep and wake it; tests/e2e/test_sleep.py does it to a real one."""

from collections.abc import Iterator

import pytest

from server.api.client import EngineStatus
from server.api.sleep import SleepSwitch
from tests.api.scripted import Server, serve


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
    with serve(sleep_switch=SleepSwitch(launcher.sleep, launcher.wake), keys=("k",)) as launcher.server:
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
