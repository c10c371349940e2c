"""Full queues, dead engines, clients that leave, unforeseen errors."""

import json
import logging
import re
import time

import pytest

from server.api.engine_status import EngineStatus
from server.api.rendering import ChunkRenderer
from server.errors import EngineUnavailableError
from tests.api.scripted import ScriptedEngine, Server, serve
from tests.waiting import wait_until


def test_full_queue_is_503_with_retry_after() -> None:
    with serve(ScriptedEngine(paused=True)) as server:
        with server.http.stream("POST", "/v1/completions", json={"prompt": "a", "n": 16, "stream": True}) as open_one:
            assert open_one.status_code == 200
            for streamed in (False, True):
                response = server.complete(stream=streamed)
                assert response.status_code == 503
                assert response.headers["retry-after"] == "1"
                assert response.headers["content-type"] == "application/json"
                error = response.json()["error"]
                assert (error["code"], error["type"]) == ("queue_full", "overloaded_error")
        server.engine.paused = False
        wait_until(lambda: not server.engine.running)
        assert server.complete().status_code == 200


@pytest.mark.parametrize("status", [EngineStatus.STARTING, EngineStatus.DRAINING, EngineStatus.DEAD])
def test_engine_that_takes_no_requests(status: EngineStatus) -> None:
    with serve() as server:
        assert server.http.get("/health").json() == {"status": "ready"}
        server.client.status = status
        assert server.http.get("/health/live").json() == {"status": status.value}
        for response in (server.complete(), server.complete(stream=True), server.http.get("/health/ready")):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_unavailable"
            assert int(response.headers["retry-after"]) > 0
        for path in ("/v1/models", "/version", "/metrics"):
            assert server.http.get(path).status_code == 200
        assert "gale_engine_ready 0.0" in server.http.get("/metrics").text


def test_before_the_engine_has_told_of_itself() -> None:
    with serve() as server:
        server.client.info, server.client.stats = None, None
        assert server.complete().status_code == 503
        assert server.http.get("/health").status_code == 503
        shown = set(re.findall(r"^(gale_\w+)[{ ]", server.http.get("/metrics").text, re.MULTILINE))
        assert {name for name in shown if not name.startswith("gale_http_")} == {
            "gale_engine_ready",
            "gale_engine_asleep",
            "gale_engine_deaths_total",
            "gale_api_process_deaths_total",
        }


def test_draining_lets_running_requests_finish() -> None:
    body = {"prompt": "a", "stream": True}
    with (
        serve(ScriptedEngine(paused=True)) as server,
        server.http.stream("POST", "/v1/completions", json=body) as response,
    ):
        server.call(server.client.drain)
        assert server.complete().status_code == 503
        server.engine.paused = False
        assert response.read().endswith(b'"finish_reason":"length","stop_reason":null}]}\n\ndata: [DONE]\n\n')


def test_stream_of_a_dying_engine_ends_with_an_error_and_done() -> None:
    with serve(ScriptedEngine(paused=True)) as server:
        body = {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            server.call(lambda: server.client.engine_died(1))
            events = response.read().decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        error = json.loads(events[-3].removeprefix("data: "))["error"]
        assert error["code"] == "engine_unavailable"
        assert set(error) == {"message", "type", "param", "code"}
        assert server.complete().status_code == 503


def test_whole_answer_of_a_dying_engine_is_503() -> None:
    with serve(ScriptedEngine(paused=True)) as server:
        server.engine.loop.call_soon_threadsafe(
            server.engine.loop.call_later, 0.05, lambda: server.client.fail_all(EngineUnavailableError("died"))
        )
        response = server.complete()
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "died"


@pytest.mark.parametrize("streamed", [False, True])
def test_choice_that_fails_in_the_engine(streamed: bool) -> None:
    with serve(ScriptedEngine(fail_after=3)) as server:
        response = server.complete(stream=streamed)
    if streamed:
        assert '"text":' in response.text
        assert response.text.endswith("data: [DONE]\n\n")
        assert '{"error":{"message":"the scripted engine failed","type":"server_error"' in response.text
    else:
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"


@pytest.mark.parametrize("streamed", [False, True])
def test_client_that_leaves_frees_its_slots(streamed: bool) -> None:
    with serve(ScriptedEngine(paused=True)) as server:
        body = json.dumps({"prompt": "a", "n": 3, "stream": streamed}).encode()
        with server.connect() as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            wait_until(lambda: len(server.engine.running) == 3)
        wait_until(lambda: not server.engine.running)
        assert server.engine.cancelled == [server.engine.requests[0].request_id]


def test_client_that_leaves_before_the_engine_has_accepted() -> None:
    with serve(ScriptedEngine(mute=True)) as server:
        body = b'{"prompt": "a"}'
        with server.connect() as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n" + body)
            time.sleep(0.1)
        wait_until(lambda: len(server.engine.cancelled) == 1)


def test_client_that_leaves_in_mid_stream() -> None:
    with serve() as server:
        with server.http.stream(
            "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 10**6, "ignore_eos": True, "stream": True}
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            assert server.engine.running
        wait_until(lambda: not server.engine.running)
        wait_until(lambda: len(server.engine.cancelled) == 1)


def test_connection_serves_on_after_a_stream(server: Server) -> None:
    with server.connect() as connection:
        for streamed in (b"true ", b"false", b"true ", b"false"):
            body = b'{"prompt": "a", "stream": %b}' % streamed
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
            answer = b""
            while not answer.endswith((b"0\r\n\r\n", b"}}")):
                piece = connection.recv(65536)
                assert piece, "closed"
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_reader_that_falls_behind_gets_fewer_larger_chunks() -> None:
    with serve() as server:
        body = {"prompt": "a", "max_tokens": 5000, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            # The engine goes on for many steps within one turn of the event loop.
            server.call(lambda: server.engine.steps(3000))
            text = response.read().decode()
    assert text.count("data: ") < 2100
    assert text.endswith("data: [DONE]\n\n")


def test_unforeseen_error_is_a_500_in_the_usual_form(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*arguments: object) -> None:
        raise RuntimeError("boom")

    with serve() as server, caplog.at_level(logging.ERROR):
        monkeypatch.setattr(ChunkRenderer, "chunks", explode)
        streamed = server.complete(stream=True)
        assert streamed.status_code == 200
        assert '"code":"internal_error"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        monkeypatch.setattr("server.api.generation.render_answer", explode)
        response = server.complete()
        wait_until(lambda: not server.engine.running)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "boom" not in response.text
    assert caplog.text.count("RuntimeError: boom") == 2
