"""The engine is sent to sleep and woken: what it held is free in between, and what was saved is there afterwards."""

import contextlib
import shutil
import signal
import threading
import time
from pathlib import Path
from random import Random

import httpx
import psutil
import pytest

from tests.e2e.running import RunningServer, Stream
from tests.waiting import wait_until

MODEL = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"
ENDLESS = 1_000_000
STORM_SECONDS = 15


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
            answers = [
                httpx.post(f"{server.base_url}/v1/completions", json={"prompt": "a"}, timeout=60) for _ in range(8)
            ]
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
        wait_until(lambda: all(httpx.get(f"{server.base_url}/health", timeout=60).status_code == 200 for _ in range(6)))
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


def test_an_engine_that_hangs_while_it_loads_leaves_nobody_waiting(tmp_path: Path) -> None:
    flags = ("--enable-sleep-mode", "--state-cache-dir", str(tmp_path / "states"), "--startup-timeout", "20")
    with RunningServer(tmp_path / "server", *flags) as server:
        assert httpx.post(f"{server.base_url}/sleep", timeout=60).json() == {"is_sleeping": True}
        wake = Asking(server, "/wake_up")
        wait_until(lambda: any(child.name() == "gale-engine" for child in server.find_children()))
        server.child("gale-engine").suspend()
        answer = wake.result()
        assert answer is not None and answer.status_code == 503
        assert answer.json()["error"]["message"].endswith("the engine process was not ready within 20 s")
        assert httpx.post(f"{server.base_url}/wake_up", timeout=60).json() == {"is_sleeping": False}


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


def test_while_the_engine_ends_everything_else_goes_on(tmp_path: Path) -> None:
    flags = ("--api-server-count", "2", "--enable-sleep-mode", "--state-cache-dir", str(tmp_path / "states"))
    with RunningServer(tmp_path / "server", *flags) as server:
        engine = server.child("gale-engine")
        engine.suspend()  # As one that takes long to write what it keeps.
        sleep = Asking(server, "/sleep")
        wait_until(lambda: _live(server) == {"falling asleep"})
        old = server.child("gale-api-1")
        old.kill()
        server.wait_for_log("the api-1 process was killed by SIGKILL; starting it again")
        wait_until(lambda: any(c.name() == "gale-api-1" and c.pid != old.pid for c in server.find_children()))
        wait_until(lambda: _live(server) == {"falling asleep"})
        assert {httpx.get(f"{server.base_url}/is_sleeping", timeout=60).json()["is_sleeping"] for _ in range(6)} == {
            False
        }
        wake = Asking(server, "/wake_up")
        engine.resume()
        if answer := sleep.result():  # The process that was asked may have been the one that was killed.
            assert answer.json() == {"is_sleeping": True}
        answer = wake.result()
        assert answer is not None and answer.json() == {"is_sleeping": False}
        assert server.log.count("asleep: the engine has ended") == server.log.count("waking up") == 1
        assert server.complete(8)["usage"]["completion_tokens"] == 8


def test_a_server_ends_in_order_whatever_its_engine_was_about_to_do(tmp_path: Path) -> None:
    flags = ("--enable-sleep-mode", "--state-cache-dir", str(tmp_path / "states"), "--shutdown-timeout", "2")
    for moment in ("requests are ending", "the engine is ending", "it wakes", "it wakes and fails"):
        folder = tmp_path / moment.replace(" ", "-")
        with RunningServer(folder, *flags) as server, contextlib.ExitStack() as stack:
            if moment == "requests are ending":
                stream = stack.enter_context(Stream(server.base_url, ENDLESS))
                next(stream)
                asking = Asking(server, "/sleep?mode=wait")
                wait_until(lambda: _live(server) == {"falling asleep"})
            elif moment == "the engine is ending":
                server.child("gale-engine").suspend()
                asking = Asking(server, "/sleep")
                wait_until(lambda: _live(server) == {"falling asleep"})
            else:
                httpx.post(f"{server.base_url}/sleep", timeout=60)
                asking = Asking(server, "/wake_up")
                wait_until(lambda: any(child.name() == "gale-engine" for child in server.find_children()))
            server.signal(signal.SIGTERM)
            if moment == "it wakes and fails":
                server.child("gale-engine").kill()
            if moment == "requests are ending":
                assert list(stream)[-1]["error"]["code"] in ("engine_unavailable", "engine_asleep")
                assert stream.done
            assert server.wait_end() == 0, moment
            answer = asking.result()
            assert answer is not None and answer.status_code in (200, 503), moment
            assert "Traceback" not in server.log and "hung" not in server.log, moment


@pytest.mark.parametrize("seed", [1])
def test_whatever_happens_in_whatever_order_everybody_gets_an_answer(tmp_path: Path, seed: int) -> None:
    """Sleeping, waking, requests and deaths at random moments, from several sides at once."""
    flags = ("--api-server-count", "2", "--enable-sleep-mode", "--state-cache-dir", str(tmp_path / "states"))
    with RunningServer(tmp_path / "server", *flags, "--shutdown-timeout", "3", "--max-restarts", "99") as server:
        until = time.monotonic() + STORM_SECONDS
        saved: list[str] = []
        unexpected: list[object] = []

        def ask(random: Random) -> None:
            while time.monotonic() < until:
                time.sleep(random.uniform(0, 0.3))
                path = random.choice(("/sleep", "/sleep?mode=wait", "/wake_up", *["/v1/completions"] * 9))
                body = {"prompt": "It was", "max_tokens": random.choice((1, 30, 300)), "ignore_eos": True}
                if random.random() < 0.5:
                    body |= {"save_state": True, "state_ttl": 600}
                try:
                    json = body if path == "/v1/completions" else None
                    answer = httpx.post(f"{server.base_url}{path}", json=json, timeout=90)
                except httpx.TimeoutException as error:
                    unexpected.append((path, repr(error)))
                except httpx.TransportError:
                    pass  # Its API process was killed.
                else:
                    if answer.status_code not in (200, 503):
                        unexpected.append((path, answer.status_code, answer.text))
                    elif answer.status_code == 200 and "state" in answer.json():
                        saved.append(answer.json()["state"]["id"])

        def kill(random: Random) -> None:
            while time.monotonic() < until:
                time.sleep(random.uniform(1, 4))
                with contextlib.suppress(psutil.NoSuchProcess):
                    children = psutil.Process(server.process.pid).children()
                    doomed = [one for one in children if one.name() in ("gale-engine", "gale-api-1")]
                    if doomed:
                        random.choice(doomed).kill()

        threads = [threading.Thread(target=ask, args=(Random(f"{seed} {number}"),)) for number in range(6)]
        threads.append(threading.Thread(target=kill, args=(Random(seed),)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(180)
        assert not any(thread.is_alive() for thread in threads), f"somebody still waits:\n{server.log}"
        assert unexpected == []

        def wakes() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.post(f"{server.base_url}/wake_up", timeout=90).status_code == 200
            return False

        wait_until(wakes)
        wait_until(lambda: _live(server) == {"ready"})
        assert server.complete(8)["usage"]["completion_tokens"] == 8
        assert saved
        for state in saved:
            assert httpx.get(f"{server.base_url}/v1/states/{state}", timeout=60).status_code == 200, f"{state} is lost"
        wait_until(lambda: server.metric("gale_requests_running") == server.metric("gale_requests_waiting") == 0)
        assert "Traceback" not in server.log
        server.signal(signal.SIGTERM)
        assert server.wait_end() == 0


class Asking(threading.Thread):
    """A request that takes long, under way."""

    def __init__(self, server: RunningServer, path: str) -> None:
        super().__init__(daemon=True)
        self._answer: httpx.Response | None = None
        self._url = server.base_url + path
        self.start()

    def run(self) -> None:
        with contextlib.suppress(httpx.TransportError):
            self._answer = httpx.post(self._url, timeout=90)

    def result(self) -> httpx.Response | None:
        """Its answer; None: the connection broke."""
        self.join()
        return self._answer


def _live(server: RunningServer) -> set[str]:
    """What the API processes say of the engine."""
    # One that has just been started answers when it has loaded.
    return {httpx.get(f"{server.base_url}/health/live", timeout=60).json()["status"] for _ in range(6)}
