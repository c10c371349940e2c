"""A server that strangers reach: bytes of any kind, and a log in which no secret stands."""

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e2e.conftest import CHAT_TEMPLATE
from tests.e2e.running import RunningServer

KEY, WRONG_KEY, PROMPT = "open-sesame-7261", "wrong-key-9134", "confidential-5523"


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a key that logs all it can."""
    folder = tmp_path_factory.mktemp("talkative")
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    flags = ("--api-key", KEY, "--log-level", "debug", "--chat-template", str(folder / "chat.jinja"))
    with RunningServer(folder, *flags) as running:
        yield running


tokens = st.sampled_from(
    [
        *(b"GET", b"POST", b"HEAD", b"PRI", b"OPTIONS", b" ", b"/", b"*", b"/v1/completions", b"/v1/models/%2e%2e"),
        *(b"/tokenize", b"http://other/health", b" HTTP/1.1", b" HTTP/1.0", b" HTTP/2.0", b"\r\n", b"\n", b"\r", b"\0"),
        *(b"Host: x\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n"),
        *(b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Connection: close\r\n"),
        *(b"Content-Type: text/html; charset=\xff\r\n", b"Content-Encoding: gzip\r\n", b": \r\n", b" folded\r\n"),
        *(f"Authorization: Bearer {KEY}\r\n".encode(), b"Authorization: Bearer \xff\xfe\r\n", b'{"prompt": "a"}'),
        *(b"X-Request-Id: \x01\r\n", b"Origin: null\r\n", b"Accept: " + b"a" * 5000 + b"\r\n", b"Cookie: a=b; c\r\n"),
    ]
)
streams = st.lists(tokens | st.binary(max_size=12), max_size=14).map(b"".join)
heads = st.builds(
    lambda start, fields, body: b"".join((start, b" HTTP/1.1\r\n", *fields, b"\r\n", body)),
    st.sampled_from([b"POST /v1/completions", b"GET /v1/models", b"POST /tokenize", b"GET /%ff?%00", b"POST /health"]),
    st.lists(tokens | st.binary(max_size=20).map(lambda value: b"X-Fuzz: " + value + b"\r\n"), max_size=8),
    st.binary(max_size=20) | st.just(b'{"prompt": "a", "max_tokens": 1}'),
)


@given(data=streams | heads)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_the_server_fail(talkative: RunningServer, data: bytes) -> None:
    address = urlsplit(talkative.base_url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        try:
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except ConnectionResetError:
            answer = b""
    for line in answer.split(b"\r\n"):
        if line.startswith(b"HTTP/1."):
            assert not line.split()[1].startswith(b"5"), (data, line)


def test_the_server_is_well_after_all_that(talkative: RunningServer) -> None:
    assert httpx.get(f"{talkative.base_url}/health").status_code == 200
    assert "Traceback" not in talkative.log


def test_no_line_of_the_log_holds_a_key_or_a_prompt(talkative: RunningServer) -> None:
    good = {"authorization": f"Bearer {KEY}"}
    messages = [{"role": "user", "content": PROMPT}]
    with httpx.Client(base_url=talkative.base_url, timeout=60) as http:
        for headers in (good, {"authorization": f"Bearer {WRONG_KEY}"}, {"authorization": WRONG_KEY}, {}):
            for path, body in (
                ("/v1/completions", {"prompt": PROMPT, "max_tokens": 4, "stop": PROMPT, "bad_words": [PROMPT]}),
                ("/v1/completions", {"prompt": PROMPT, "max_tokens": 4, "stream": True, "logprobs": 2, "echo": True}),
                ("/v1/completions", {"prompt": PROMPT, "structured_outputs": {"choice": [PROMPT]}, "user": PROMPT}),
                ("/v1/completions", {"prompt": PROMPT, "structured_outputs": {"regex": f"({PROMPT}"}}),
                ("/v1/completions", {"prompt": PROMPT, PROMPT: 1}),
                ("/v1/completions", {"prompt": PROMPT, "model": PROMPT}),
                ("/v1/chat/completions", {"messages": messages, "max_tokens": 4}),
                ("/v1/chat/completions", {"messages": [{"role": PROMPT, "content": PROMPT}]}),
                ("/tokenize", {"prompt": PROMPT}),
            ):
                status = http.post(path, json=body, headers=headers).status_code
                assert (status in (200, 400, 404)) if headers is good else status == 401, (path, body, status)
            http.post("/v1/completions", content=json.dumps({"prompt": PROMPT})[:-2], headers=headers)
    log = talkative.log
    assert log.count("path=/v1/completions") > 20, "lines of these requests were meant to be there"
    for secret in (KEY, WRONG_KEY, PROMPT):
        assert secret not in log
