"""The life of a server: start, signals, the death of its parts, and nothing left behind."""

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.running import RunningServer, Stream, run_to_end
from tests.waiting import wait_until

MODEL = Path(__file__).parents[2] / "server" / "assets" / "classics-11m"
ENDLESS = 1_000_000


def test_drain_finishes_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GALE_API_KEY", "topsecret")
    flags = ("--log-format", "json", "--shutdown-timeout", "60")
    with RunningServer(tmp_path, *flags) as server:
        key = {"Authorization": "Bearer topsecret"}
        assert httpx.get(f"{server.base_url}/v1/models").status_code == 401
        with Stream(server.base_url, 100, headers=key) as stream:
            next(stream)
            server.signal(signal.SIGTERM)
            for child in server.children:
                assert not any("topsecret" in part for part in (*child.cmdline(), *child.environ().values()))
            events = list(stream)
            assert events[-1]["choices"][0]["finish_reason"] == "length"
            assert stream.done
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.base_url}/health")
        assert server.wait_end() == 0
        lines = [json.loads(line) for line in server.log.splitlines()]
    assert {line["process"] for line in lines} == {"launcher", "engine", "api-0"}
    [request] = [line for line in lines if line.get("path") == "/v1/completions"]
    assert (request["key"], request["status"], request["tokens"], request["finish"]) == ("key-1", 200, 100, "length")
    assert "topsecret" not in server.log


def test_drain_cancels_after_its_timeout(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "--shutdown-timeout", "0.3") as server, Stream(server.base_url, ENDLESS) as stream:
        next(stream)
        server.signal(signal.SIGTERM)
        events = list(stream)
        assert events[-1]["error"]["type"] == "service_unavailable"
        assert stream.done
        assert server.wait_end() == 0


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with RunningServer(tmp_path) as server, Stream(server.base_url, ENDLESS) as stream:
        next(stream)
        server.interrupt()
        server.wait_for_log("SIGINT: no new requests")
        for _ in range(20):
            next(stream)
        server.interrupt()
        started = time.monotonic()
        assert server.wait_end() == 128 + signal.SIGINT
        assert time.monotonic() - started < 3


def test_engine_death_and_the_next_engine(tmp_path: Path) -> None:
    with (
        RunningServer(tmp_path, "--api-server-count", "2") as server,
        Stream(server.base_url, ENDLESS) as stream,
        httpx.Client(base_url=server.base_url) as client,
    ):
        before = server.complete(8)["choices"][0]["text"]
        next(stream)
        server.child("gale-engine").kill()
        events = list(stream)
        assert events[-1]["error"]["type"] == "service_unavailable"
        assert stream.done
        refused = client.post("/v1/completions", json={"prompt": "It was"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "engine_unavailable"
        assert client.get("/health").status_code == 503
        server.wait_for_log("the engine process was killed by SIGKILL; starting it again")
        server.wait_for_log("the engine process serves again")
        wait_until(lambda: client.get("/health").status_code == 200)
        assert {server.metric("gale_engine_deaths_total") for _ in range(6)} == {1}
        for _ in range(6):  # by either API process
            assert server.complete(8)["choices"][0]["text"] == before
        server.signal(signal.SIGTERM)
        assert server.wait_end() == 0


def test_an_engine_that_keeps_dying_ends_the_server(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "--max-restarts", "1") as server:
        server.child("gale-engine").kill()
        server.wait_for_log("the engine process serves again")
        with Stream(server.base_url, ENDLESS) as stream:
            next(stream)
            server.find_children()
            server.child("gale-engine").kill()
            events = list(stream)
            assert events[-1]["error"]["type"] == "service_unavailable"
            assert stream.done
        assert server.wait_end() == 1
        assert server.log.splitlines()[-1] == "gale serve: error: the engine process was killed by SIGKILL"


def test_an_engine_that_hangs_is_replaced(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "--watchdog-timeout", "4") as server:
        with Stream(server.base_url, ENDLESS) as stream:
            next(stream)
            engine = server.child("gale-engine")
            engine.suspend()
            events = list(stream)
            assert events[-1]["error"]["type"] == "service_unavailable"
        server.wait_for_log("the engine process hung for more than 4 s; starting it again")
        server.wait_for_log("the engine process serves again")
        assert server.complete(8)["usage"]["completion_tokens"] == 8


@contextlib.contextmanager
def streams_around(server: RunningServer, name: str) -> Iterator[tuple[psutil.Process, list[Stream], list[Stream]]]:
    """An API process, streams that it serves, and streams of its siblings; all have begun."""
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(Stream(server.base_url, ENDLESS)) for _ in range(12)]
        for stream in streams:
            next(stream)
        process = server.child(name)
        served = {one.raddr.port for one in process.net_connections("tcp") if one.raddr}
        own = [stream for stream in streams if stream.port in served]
        others = [stream for stream in streams if stream.port not in served]
        assert own and others
        yield process, own, others


def go_on_without(doomed: list[Stream], others: list[Stream]) -> None:
    """The streams of a process that is gone end, however much had arrived before; the others go on."""
    for stream in doomed:
        with pytest.raises((httpx.TransportError, StopIteration)):
            while True:
                next(stream)
    for stream in others:
        for _ in range(50):
            next(stream)


def test_several_api_processes_and_the_death_of_one(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "--api-server-count", "2") as server:
        for _ in range(30):
            assert httpx.get(f"{server.base_url}/health").status_code == 200
        assert len({server.complete(8)["choices"][0]["text"] for _ in range(6)}) == 1
        # One port, and still not anybody else's.
        port = server.base_url.rsplit(":", 1)[1]
        code, stderr = run_to_end("--port", port, "--api-server-count", "2")
        assert (code, len(stderr.splitlines())) == (1, 1)
        assert f"port {port}: the port is in use" in stderr
        # Streams of both; those of the process that dies end with it, the others go on.
        with streams_around(server, "gale-api-1") as (dying, doomed, others):
            dying.kill()
            go_on_without(doomed, others)
            server.wait_for_log("the api-1 process was killed by SIGKILL; starting it again")
            server.wait_for_log("the api-1 process serves again")
            # The engine has noticed that nobody reads any more.
            wait_until(lambda: server.metric("gale_requests_running") == len(others))
        wait_until(lambda: server.metric("gale_requests_running") == 0)
        assert {server.metric("gale_api_process_deaths_total") for _ in range(6)} == {1}
        # Any of them shows what both have counted, also what the dead one had; one is being scraped.
        health = 'gale_http_requests_total{method="GET",route="/health",status="200"}'
        assert {server.metric(health) for _ in range(6)} == {30}
        wait_until(lambda: server.metric("gale_http_requests_in_progress") == 1)
        for _ in range(6):
            assert server.complete(8)["usage"]["completion_tokens"] == 8
        server.signal(signal.SIGTERM)
        assert server.wait_end() == 0


def test_an_api_process_that_hangs_is_replaced(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "--api-server-count", "2", "--watchdog-timeout", "4") as server:
        with streams_around(server, "gale-api-1") as (hanging, doomed, others):
            hanging.suspend()
            server.wait_for_log("the api-1 process hung for more than 4 s; starting it again")
            go_on_without(doomed, others)
            server.wait_for_log("the api-1 process serves again")
            wait_until(lambda: server.metric("gale_requests_running") == len(others))
        assert {server.metric("gale_api_process_deaths_total") for _ in range(6)} == {1}
        assert {server.metric("gale_engine_deaths_total") for _ in range(6)} == {0}
        # Where everything stood still, nothing hangs: what ran goes on.
        with Stream(server.base_url, ENDLESS) as stream:
            next(stream)
            os.killpg(server.process.pid, signal.SIGSTOP)
            time.sleep(6)
            os.killpg(server.process.pid, signal.SIGCONT)
            for _ in range(2000):
                next(stream)
        assert server.log.count("hung for more than") == 1


def test_children_die_with_the_launcher(tmp_path: Path) -> None:
    with RunningServer(tmp_path, wait_ready=False) as server:
        # The API process answers while the engine loads.
        assert httpx.get(f"{server.base_url}/health", timeout=30).status_code == 503
        server.signal(signal.SIGKILL)
        assert {"gale-engine", "gale-api-0"} <= {child.name() for child in server.children}
        assert server.wait_end() == -signal.SIGKILL


def test_signal_while_loading_ends_in_order(tmp_path: Path) -> None:
    with RunningServer(tmp_path, wait_ready=False) as server:
        server.signal(signal.SIGTERM)
        assert server.wait_end() == 0


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, stderr = run_to_end("--port", port)
        code_json, stderr_json = run_to_end("--port", port, "--log-format", "json")
    assert code == 1
    reason = f"cannot listen on 127.0.0.1 port {port}: the port is in use"
    assert stderr == f"gale serve: error: {reason}\n"
    assert code_json == 1
    assert json.loads(stderr_json)["message"] == reason


def test_unknown_host_name() -> None:
    code, stderr = run_to_end("--port", "0", "--host", "no such host")
    assert (code, len(stderr.splitlines())) == (2, 1)
    assert "--host: cannot resolve 'no such host'" in stderr


def test_chat_template_that_is_none() -> None:
    code, stderr = run_to_end("--port", "0", "--chat-template", "{% for %}")
    assert code == 2
    assert stderr.splitlines()[-1].startswith("gale serve: error: --chat-template: line 1: ")
    assert "Traceback" not in stderr


def test_folder_without_a_model(tmp_path: Path) -> None:
    code, stderr = run_to_end("--port", "0", str(tmp_path))
    assert (code, len(stderr.splitlines())) == (1, 1)
    assert str(tmp_path) in stderr


def test_checkpoint_found_broken_by_the_engine(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    code, stderr = run_to_end("--port", "0", str(folder))
    assert code == 1
    assert str(weights) in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
