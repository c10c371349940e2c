"""Bounds on a request's head, over a real socket."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from server.api import protocol
from server.api.protocol import MAX_HEAD_BYTES, HttpProtocol

GET = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    answer = str(len(body)).encode()
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    config = uvicorn.Config(app, http=HttpProtocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=60)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with socket.create_connection(listener.getsockname(), timeout=10) as connection:
        yield connection
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def answers(client: socket.socket, count: int) -> bytes:
    received = b""
    while received.count(b"HTTP/1.1 200") < count or not received.rpartition(b"\r\n\r\n")[2]:
        part = client.recv(65536)
        assert part, received
        received += part
    return received


def test_ordinary_requests_on_one_connection(client: socket.socket) -> None:
    for _ in range(3):
        client.sendall(GET + b"content-length: 200000\r\n\r\n" + b"x" * 200_000)
        assert answers(client, 1).endswith(b"200000")


def test_endless_head_is_refused(client: socket.socket) -> None:
    # One byte too long, so that nothing is left unread to reset the connection with the answer on its way.
    client.sendall(GET + b"x-padding: ".ljust(MAX_HEAD_BYTES + 1 - len(GET), b"p"))
    head, _, body = client.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body)["error"]["code"] == "headers_too_large"
    assert client.recv(65536) == b""


def test_what_is_not_http_is_refused_in_the_usual_form(client: socket.socket) -> None:
    client.sendall(b"hello\r\n\r\n")
    head, _, body = client.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert client.recv(65536) == b""


@pytest.mark.parametrize("start", [b"", b"GET / HT", GET], ids=["nothing", "half a line", "half a head"])
def test_unfinished_head_is_cut_off(client: socket.socket, start: bytes) -> None:
    client.sendall(start)
    assert client.recv(65536) == b""


def test_unfinished_head_after_a_request_is_cut_off(client: socket.socket) -> None:
    client.sendall(GET + b"\r\n")
    assert answers(client, 1).endswith(b"0")
    client.sendall(GET)
    assert client.recv(65536) == b""


CHUNKED = GET.replace(b"GET", b"POST") + b"transfer-encoding: chunked\r\n\r\n"


def test_head_in_one_piece_is_as_long_as_one_in_many(client: socket.socket) -> None:
    client.sendall(GET + b"x-padding: " + b"p" * (MAX_HEAD_BYTES - 100) + b"\r\n\r\n")
    assert answers(client, 1).endswith(b"0")
    client.sendall(GET + b"x-padding: " + b"p" * MAX_HEAD_BYTES + b"\r\n\r\n")
    head, _, body = client.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body)["error"]["code"] == "headers_too_large"
    assert client.recv(65536) == b""


def test_a_body_in_the_smallest_of_chunks(client: socket.socket) -> None:
    client.sendall(CHUNKED + b"1;some=extension\r\nx\r\n" * 50_000 + b"0\r\nx-trailer: y\r\n\r\n")
    assert answers(client, 1).endswith(b"50000")
    client.sendall(GET + b"\r\n")
    assert answers(client, 1).endswith(b"0")


@pytest.mark.parametrize("endless", [b"x-padding: y\r\n", b"y" * 16], ids=["fields", "one field"])
def test_endless_trailers_are_cut_off(client: socket.socket, endless: bytes) -> None:
    client.sendall(CHUNKED + b"1\r\nx\r\n0\r\nx-trailer: ")
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            client.sendall(endless * 4096)
