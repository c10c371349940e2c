"""``POST /v1/states/prefill``: texts of any length, taken no faster than the engine absorbs them."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send

from server.api import prefill as module
from tests.api.scripted import BOS, INFO, ScriptedEngine, Server, read_until, script_text, serve
from tests.waiting import wait_until

TEXT = "Grüße, naïve 世界! It was a 🌊 and then. " * 30


def engine(**fields: Any) -> ScriptedEngine:
    """One that takes texts of any length."""
    return ScriptedEngine(info=msgspec.structs.replace(INFO, max_model_len=None), **fields)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 256)
    monkeypatch.setattr("server.api.text_stream.PIECE_CHARACTERS", 500)
    monkeypatch.setattr(module, "_PROGRESS_SECONDS", 0.0)


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(engine(absorbed_per_step=100)) as running:
        yield running


def upload(server: Server, pieces: Iterator[bytes] | bytes, query: str = "", kind: str = "text/plain") -> Any:
    return server.http.post(f"/v1/states/prefill{query}", content=pieces, headers={"Content-Type": kind})


def one_by_one(data: bytes, length: int = 7) -> Iterator[bytes]:
    for start in range(0, len(data), length):
        yield data[start : start + length]


def events_of(text: str) -> list[dict[str, Any]]:
    *lines, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("kind", ["text/plain", "text/plain; charset=UTF-8", "application/octet-stream"])
def test_a_text_in_chunks(server: Server, kind: str) -> None:
    data = TEXT.encode()
    response = upload(server, one_by_one(data), "?name=book&ttl=70", kind)
    assert response.status_code == 201, response.text
    state = response.json()
    assert (state["object"], state["name"], state["num_tokens"]) == ("state", "book", len(data) + 1)
    assert state["expires"] - state["created"] == 70
    (saved,) = server.engine.states._states.values()  # type: ignore[union-attr]
    assert saved.tokens == b"".join(token.to_bytes(4, "little") for token in (BOS, *data))
    assert server.engine.most_pending <= 2 * 256, "the engine keeps two windows at most"
    more = server.complete("", state="book", max_tokens=3).json()
    assert more["choices"][0]["text"] == script_text(len(data) + 1, 0, 3)
    assert upload(server, data, "?add_special_tokens=false").json()["num_tokens"] == len(data), "not only in chunks"
    behind = upload(server, one_by_one(data), "?state=book").json()
    assert behind["num_tokens"] == 2 * len(data) + 1


def test_progress_is_told(server: Server) -> None:
    data = TEXT.encode()
    ids = list(data)
    for response in (
        upload(server, one_by_one(data), "?stream=true&name=book"),
        server.http.post("/v1/states/prefill", json={"prompt": ids, "stream": True}),
        server.http.post("/v1/states/prefill?stream=true", json={"prompt": ids}),
        upload(server, one_by_one(data), "?stream=true&state=book"),
    ):
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *progress, state = events_of(response.text)
        assert state["object"] == "state" and len(progress) > 3
        counts = [event["num_tokens"] for event in progress]
        assert counts == sorted(counts) and counts[-1] <= state["num_tokens"]
        assert {event["object"] for event in progress} == {"state.progress"}
        assert all(event["tokens_per_second"] >= 0 for event in progress)
    assert state["num_tokens"] == 2 * len(data) + 1
    short = server.http.post("/v1/states/prefill", json={"prompt": [1, 2], "stream": True})
    assert [event["object"] for event in events_of(short.text)] == ["state"]


def test_a_long_prompt_in_json(server: Server) -> None:
    ids = [number % 250 for number in range(5000)]
    state = server.http.post("/v1/states/prefill", json={"prompt": ids, "name": "x"}).json()
    assert state["num_tokens"] == 5000
    assert len(server.engine.requests[-1].prompts[0]) == 4 * 256 and server.engine.most_pending <= 512
    more = server.http.post("/v1/states/prefill", json={"prompt": ids, "state": "x"}).json()
    assert more["num_tokens"] == 10000


def test_the_text_is_taken_as_fast_as_it_is_absorbed() -> None:
    with serve(engine(paused=True)) as server, server.connect() as connection:
        connection.sendall(
            b"POST /v1/states/prefill?stream=true HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b"some words " * 5957 + b"a" * 9 + b"\r\n"
        connection.setblocking(False)
        sent, idle = 0, time.monotonic()
        while time.monotonic() - idle < 0.5 and sent < 1 << 28:
            try:
                sent += connection.send(chunk[sent % len(chunk) :])
                idle = time.monotonic()
            except BlockingIOError:
                time.sleep(0.01)
        assert sent < 1 << 26, "the socket holds the client up"
        (running,) = server.engine.running.values()
        assert len(running.prompt) <= 4 * 2 * 256
        connection.close()
        server.call(lambda: setattr(server.engine, "paused", False))
        wait_until(lambda: bool(server.engine.cancelled))
        assert not server.engine.running


def test_a_client_that_leaves_ends_it(server: Server) -> None:
    server.engine.absorbed_per_step = 10_000
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/states/prefill?name=x HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n1000\r\n" + b"a b " * 1024 + b"\r\n"
        )
        wait_until(lambda: bool(server.engine.running))
    wait_until(lambda: bool(server.engine.cancelled))
    assert not server.call(lambda: server.client._mailboxes)
    assert server.http.get("/v1/states").json()["data"] == []


def test_a_trickle_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much has come before it, and although something always comes in time."""
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.6)
    monkeypatch.setattr(module, "_LEAST_RATE", 50.0)
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/states/prefill HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n1000\r\n" + b"a b " * 1024 + b"\r\n"
        )
        connection.settimeout(0.2)
        answer, begun = b"", time.monotonic()
        while b"request_timeout" not in answer:
            assert time.monotonic() < begun + 30
            with contextlib.suppress(TimeoutError):
                answer += connection.recv(4096)
            if not answer:
                connection.sendall(b"1\r\na\r\n")
        assert answer.startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: bool(server.engine.cancelled))


def test_a_slow_writer_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who is slower than the engine, for longer than nothing may come."""
    monkeypatch.setattr(module, "IDLE_SECONDS", 2.0)
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/states/prefill HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
            b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(11):
            time.sleep(0.2)
            connection.sendall(b"5\r\nword \r\n")
        connection.sendall(b"0\r\n\r\n")
        answer = b""
        while received := connection.recv(4096):
            answer += received
        assert answer.startswith(b"HTTP/1.1 201 ")


def test_a_client_that_does_not_read_loses_its_place(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on sending, and nothing of the progress that it asked for can be written any more."""
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.5)

    class Stalled(module.PrefillAnswer):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def never(message: Message) -> None:
                if message["type"] == "http.response.body":
                    await asyncio.Event().wait()
                await send(message)

            await super().__call__(scope, receive, never)

    monkeypatch.setattr(module, "PrefillAnswer", Stalled)
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/states/prefill?stream=true HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        connection.settimeout(20)
        while not server.engine.cancelled:
            try:
                connection.sendall(b"1000\r\n" + b"a b " * 1024 + b"\r\n")
                time.sleep(0.05)
            except OSError:
                break
    wait_until(lambda: bool(server.engine.cancelled))
    assert not server.call(lambda: server.client._mailboxes)


def test_a_client_that_sends_nothing_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.2)
    with server.connect() as connection:
        connection.sendall(
            b"POST /v1/states/prefill HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n1000\r\n" + b"a b " * 1024 + b"\r\n"
        )
        assert read_until(connection, b"request_timeout").startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: bool(server.engine.cancelled))


def test_errors_after_the_beginning(server: Server) -> None:
    bad = TEXT.encode() * 100 + b"\xff" + TEXT.encode()
    response = upload(server, one_by_one(bad, 100))
    assert response.status_code == 400
    assert f"at byte {100 * len(TEXT.encode())}:" in response.json()["error"]["message"]
    *_, error = events_of(upload(server, one_by_one(bad, 100), "?stream=true").text)
    assert "UTF-8" in error["error"]["message"]
    wait_until(lambda: not server.engine.running)
    assert server.http.get("/v1/states").json()["data"] == []
    with serve(ScriptedEngine(absorbed_per_step=100)) as limited:
        response = upload(limited, one_by_one(TEXT.encode() * 3, 100))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        wait_until(lambda: not limited.engine.running)


def test_an_engine_that_dies_ends_the_stream(server: Server) -> None:
    server.engine.paused = True

    def text() -> Iterator[bytes]:
        yield TEXT.encode()
        wait_until(lambda: bool(server.engine.running))
        server.call(lambda: server.client.engine_died(1))
        yield TEXT.encode()

    *_, error = events_of(upload(server, text(), "?stream=true").text)
    assert error["error"]["code"] == "engine_unavailable"


@pytest.mark.parametrize(
    ("query", "body", "kind", "status", "param"),
    [
        ("", b"", "text/plain", 400, "prompt"),
        ("?ttl=0", b"a", "text/plain", 400, "ttl"),
        ("?ttl=x", b"a", "text/plain", 400, "ttl"),
        ("?name=a%20b", b"a", "text/plain", 400, "name"),
        ("?stream=maybe", b"a", "text/plain", 400, "stream"),
        ("?nothing=1", b"a", "text/plain", 400, "nothing"),
        ("?name=a&name=b", b"a", "text/plain", 400, "name"),
        ("?state=x&add_special_tokens=true", b"a", "text/plain", 400, "add_special_tokens"),
        ("?state=none", b"a", "text/plain", 404, "state"),
        ("?model=none", b"a", "text/plain", 404, "model"),
        ("?name=x", b'{"prompt": "a"}', "application/json", 400, "name"),
        ("", b"a", "text/html", 415, None),
        ("", b"a", "text/plain; charset=latin-1", 415, None),
    ],
)
def test_refused(server: Server, query: str, body: bytes, kind: str, status: int, param: str | None) -> None:
    response = upload(server, body, query, kind)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def test_without_a_tokenizer() -> None:
    with serve(tokenizer=None) as server:
        assert upload(server, b"a").status_code == 400
        assert server.http.post("/v1/states/prefill", json={"prompt": [1, 2]}).status_code == 201
