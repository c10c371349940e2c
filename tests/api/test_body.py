"""Bodies: JSON read strictly, sizes and content types, over a real socket where it matters."""

import json
import time

import pytest

from server.api.body import parse_json
from server.errors import InvalidRequestError
from tests.api.scripted import Server, serve


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"{'prompt': 1}",
        b'{"prompt": "a",}',
        b'{"prompt": "\xff"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
    ],
)
def test_not_a_json_object(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse_json(body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "a", "top_p": NaN}', "top_p"),
        (b'{"prompt": "a", "temperature": Infinity}', "temperature"),
        (b'{"prompt": "a", "logit_bias": {"1": -Infinity}}', "logit_bias"),
        (b'{"seed": 1' + b"0" * 5000 + b', "prompt": "a"}', "seed"),
        (b'{"prompt": "a\\ud800"}', "prompt"),
        (b'{"prompt": "a", "stop": ["b", "\\uDC00c"]}', "stop"),
        (b'{"prompt": "a", "metadata": {"\\udc00": 1}}', "metadata"),
        (b'{"prompt": "a", "n": 1, "prompt": "b"}', "prompt"),
        (b'{"prompt": "a", "stream_options": {"include_usage": true, "include_usage": false}}', "include_usage"),
    ],
)
def test_json_pitfalls_are_refused_by_name(body: bytes, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_json(body)
    assert caught.value.param == param


def test_valid_json_is_unchanged() -> None:
    value = {"prompt": ["a", "\N{WATER WAVE}\u0000"], "n": 10**30, "x": [1.5, None, True, {"y": {}}]}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_lone_surrogate_in_a_field_name_is_refused_with_a_readable_error(server: Server) -> None:
    response = server.http.post("/v1/completions", content=b'{"prompt": "a", "\\ud800": 1}')
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "\\ud800"


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "Application/Vnd.X+JSON", None]
)
def test_json_content_types(server: Server, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_other_content_types_are_refused(server: Server, headers: dict[str, str]) -> None:
    response = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


def test_body_at_the_limit_passes() -> None:
    with serve(max_body_bytes=64) as server:
        body = b'{"prompt": "a"}'.ljust(64)
        assert server.http.post("/v1/completions", content=body).status_code == 200
        response = server.http.post("/v1/completions", content=body + b" ")
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        # Without a Content-Length, too.
        assert server.http.post("/v1/completions", content=iter([body, b" "])).status_code == 413


@pytest.mark.parametrize("chunked", [False, True])
def test_client_that_sends_on_sees_the_refusal(server: Server, chunked: bool) -> None:
    """A megabyte is on its way when the server refuses; the answer must arrive all the same."""
    with server.connect() as connection:
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1000000"
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n")
        for _ in range(10):
            connection.sendall(b"186a0\r\n" * chunked + b" " * 100_000 + b"\r\n" * chunked)
        connection.sendall(b"0\r\n\r\n" * chunked)
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_endless_body_is_cut_off(server: Server) -> None:
    started = time.monotonic()
    with server.connect() as connection, pytest.raises(OSError):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        while time.monotonic() < started + 10:
            connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
    assert time.monotonic() < started + 8


def test_client_that_announces_too_much_and_sends_nothing(server: Server) -> None:
    started = time.monotonic()
    with server.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
        while connection.recv(4096):
            pass
    assert time.monotonic() < started + 8


def test_client_that_leaves_within_its_body(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"prompt"')
    assert server.complete().status_code == 200
