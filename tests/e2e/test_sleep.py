"""The engine is sent to sleep and woken: what it held is free in between, and what was saved is there afterwards."""

import shutil
import signal
import threading
from pathlib import Path

import httpx

from tests.e2e.running import RunningServer, Stream, wait_until

MODEL = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"
ENDLESS = 1_000_000


def test_an_engine_sleeps_and_wakes(tmp_path: Path) -> None:
    flags = ("--api-server-count", "2", "--enable-sleep-mode", "--state-cache-dir", str(tmp_path / "states"))
    with RunningServer(tmp_path / "server", *flags) as server, httpx.Client(base_url=server.base_url) as client:
        before = server.complete(8)["choices"][0]["text"]
        saved = server.complete(8, save_state="story", state_ttl=600)
        rest = server.complete(8, state="story", prompt=" and")["choices"][0]["text"]
        assert client.get("/is_sleeping").json() == {"is_sleeping": False}
        assert client.post("/wake_up").json() == {"is_sleeping": False}

        with Stream(server.base_url, ENDLESS) as stream:
            next(stream)
            answer = client.post("/sleep?level=1", timeout=60)
            assert (answer.status_code, answer.json()) == (200, {"is_sleeping": True})
            events = list(stream)
            assert events[-1]["error"]["code"] == "engine_asleep"
            assert stream.done
        assert {child.name() for child in server.find_children()} >= {"gale-api-0", "gale-api-1"}
        assert "gale-engine" not in {child.name() for child in server.children}

        def refusals() -> list[tuple[int, str]]:
            answers = [httpx.post(f"{server.base_url}/v1/completions", json={"prompt": "a"}) for _ in range(8)]
            assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)
            return [(answer.status_code, answer.json()["error"]["code"]) for answer in answers]

        wait_until(lambda: set(refusals()) == {(503, "engine_asleep")})
        assert client.get("/health").status_code == client.get("/health/ready").status_code == 503
        assert client.get("/health/live").json() == {"status": "asleep"}
        assert (server.metric("gale_engine_asleep"), server.metric("gale_engine_ready")) == (1, 0)
        assert client.get("/v1/models").status_code == 200
        assert client.post("/sleep").json() == {"is_sleeping": True}, "once more is no error"

        # An API process that takes another's place finds the engine asleep.
        server.child("gale-api-1").kill()
        server.wait_for_log("the api-1 process was killed by SIGKILL; starting it again")
        wait_until(lambda: any(child.name() == "gale-api-1" for child in server.find_children()))
        wait_until(lambda: set(refusals()) == {(503, "engine_asleep")})

        answer = client.post("/wake_up", timeout=90)
        assert (answer.status_code, answer.json()) == (200, {"is_sleeping": False})
        wait_until(lambda: all(httpx.get(f"{server.base_url}/health").status_code == 200 for _ in range(6)))
        assert {server.metric("gale_engine_deaths_total") for _ in range(6)} == {0}
        assert server.complete(8)["choices"][0]["text"] == before
        assert client.get("/v1/states/story").json()["id"] == saved["state"]["id"]
        assert server.complete(8, state="story", prompt=" and")["choices"][0]["text"] == rest


def test_where_no_engine_can_start_the_server_sleeps_on(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    flags = ("--enable-sleep-mode", "--state-cache-dir", str(tmp_path / "states"), "--model", str(model))
    with RunningServer(tmp_path / "server", *flags) as server, httpx.Client(base_url=server.base_url) as client:
        assert client.post("/sleep", timeout=60).json() == {"is_sleeping": True}
        (model / "model.safetensors").rename(tmp_path / "elsewhere")
        answer = client.post("/wake_up", timeout=90)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_asleep")
        assert "The engine did not start, and sleeps on: " in answer.json()["error"]["message"]
        assert client.get("/is_sleeping").json() == {"is_sleeping": True}
        (tmp_path / "elsewhere").rename(model / "model.safetensors")
        assert client.post("/wake_up", timeout=90).json() == {"is_sleeping": False}
        assert server.complete(8)["usage"]["completion_tokens"] == 8
        # Once it has served, its death is like any other.
        server.child("gale-engine").kill()
        server.wait_for_log("the engine process was killed by SIGKILL; starting it again")
        wait_until(lambda: client.get("/health").status_code == 200)


def test_those_that_run_may_finish_first(tmp_path: Path) -> None:
    flags = ("--enable-sleep-mode", "--state-cache-dir", str(tmp_path / "states"))
    with RunningServer(tmp_path / "server", *flags) as server, httpx.Client(base_url=server.base_url) as client:
        with Stream(server.base_url, 60) as stream:
            next(stream)
            assert client.post("/sleep?mode=wait", timeout=60).json() == {"is_sleeping": True}
            events = list(stream)
            assert events[-1]["choices"][0]["finish_reason"] == "length"
            assert stream.done
        # Asleep or not, it ends in order.
        server.signal(signal.SIGTERM)
        assert server.wait_end() == 0


def test_an_engine_that_dies_while_it_falls_asleep_is_replaced(tmp_path: Path) -> None:
    flags = ("--enable-sleep-mode", "--state-cache-dir", str(tmp_path / "states"))
    with (
        RunningServer(tmp_path / "server", *flags) as server,
        Stream(server.base_url, ENDLESS) as stream,
        httpx.Client(base_url=server.base_url, timeout=60) as client,
    ):
        next(stream)
        answers: list[httpx.Response] = []
        sleeper = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.base_url}/sleep?mode=wait", timeout=60))
        )
        sleeper.start()
        wait_until(lambda: client.get("/health/live").json() == {"status": "falling asleep"})
        assert client.get("/is_sleeping").json() == {"is_sleeping": False}
        server.child("gale-engine").kill()
        sleeper.join(60)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "engine_unavailable")
        server.wait_for_log("the engine process serves again")
        wait_until(lambda: client.get("/health").status_code == 200)
        assert server.complete(8)["usage"]["completion_tokens"] == 8
