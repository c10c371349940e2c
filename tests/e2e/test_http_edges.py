"""Limits and refusals of a real server over a real socket."""

import concurrent.futures
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.e2e.running import RunningServer, Stream

LIMIT = 1000
"""Tokens of prompt and answer: many seconds of generation, a moment of prefill."""
KEY = {"authorization": "Bearer open sesame"}
FLAGS = (
    *("--max-num-seqs", "2", "--max-num-queued-reqs", "2", "--max-model-len", str(LIMIT), "--max-body-bytes", "40000"),
    *("--api-key", "open sesame", "--api-key", "second", "--served-model-name", "a", "org/b"),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with narrow limits and two keys."""
    with RunningServer(tmp_path_factory.mktemp("small"), *FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def http(small: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=small.base_url, headers=KEY, timeout=30) as client:
        yield client


def complete(http: httpx.Client, prompt: Any = "It was", **fields: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **fields})


def wait_for(http: httpx.Client, *lines: str) -> None:
    """Until the metrics, which are a moment old, show these lines."""
    deadline = time.monotonic() + 20
    while not all(f"\n{line}\n" in (text := http.get("/metrics").text) for line in lines):
        assert time.monotonic() < deadline, text
        time.sleep(0.02)


def wait_idle(http: httpx.Client) -> None:
    wait_for(http, "gale_slots_used 0.0", "gale_requests_running 0.0", "gale_requests_waiting 0.0")


def test_keys(small: RunningServer) -> None:
    def status(path: str, key: str | None) -> int:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.get(small.base_url + path, headers=headers).status_code

    assert status("/v1/models", None) == 401
    assert status("/v1/models", "wrong") == 401
    assert status("/v1/models", "open sesame") == 200
    assert status("/v1/models", "second") == 200
    assert [status(path, None) for path in ("/health", "/version", "/metrics")] == [200, 200, 200]
    with (
        openai.OpenAI(base_url=f"{small.base_url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.completions.create(model="a", prompt="a")


def test_served_names(http: httpx.Client) -> None:
    assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["a", "org/b"]
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == LIMIT
    assert complete(http, model="org/b", max_tokens=1).json()["model"] == "org/b"
    assert complete(http, model="classics-11m").status_code == 404


def test_prompt_over_the_model_limit(http: httpx.Client) -> None:
    response = complete(http, [5] * LIMIT)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    # The last token that fits ends the choice.
    body = complete(http, [5] * (LIMIT - 8), max_tokens=100, ignore_eos=True).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {
        "prompt_tokens": LIMIT - 8,
        "completion_tokens": 8,
        "total_tokens": LIMIT,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_more_choices_than_ever_fit(http: httpx.Client) -> None:
    response = complete(http, n=5)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
    assert len(complete(http, n=4, max_tokens=2).json()["choices"]) == 4


def test_full_queue(small: RunningServer, http: httpx.Client) -> None:
    wait_idle(http)
    body = {"prompt": [5], "n": 4, "stream": True, "max_tokens": LIMIT, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        refused = complete(http, n=3)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        with (
            openai.OpenAI(base_url=f"{small.base_url}/v1", api_key="second", max_retries=0) as client,
            pytest.raises(openai.InternalServerError) as caught,
        ):
            client.completions.create(model="a", prompt="a", n=3)
        assert caught.value.status_code == 503
        wait_for(http, "gale_slots_used 2.0", "gale_requests_waiting 2.0")
    wait_idle(http)
    assert complete(http, max_tokens=1).status_code == 200


def test_body_over_the_limit(http: httpx.Client) -> None:
    oversized = json.dumps({"prompt": "x" * 50_000}).encode()
    assert http.post("/v1/completions", content=oversized).status_code == 413
    assert http.post("/v1/completions", content=iter([oversized[:30_000], oversized[30_000:]])).status_code == 413
    assert complete(http, max_tokens=1).status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
def test_connection_that_breaks_frees_its_slots(small: RunningServer, http: httpx.Client, streamed: bool) -> None:
    wait_idle(http)
    address = urlsplit(small.base_url)
    body = json.dumps({"prompt": [5], "n": 2, "stream": streamed, "max_tokens": LIMIT, "ignore_eos": True}).encode()
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer second\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_for(http, "gale_slots_used 2.0")
    wait_idle(http)


def test_http_1_0_client(small: RunningServer) -> None:
    address = urlsplit(small.base_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b'{"status":"ready"}')


def test_answers_leave_at_once(http: httpx.Client) -> None:
    """No 40 ms of Nagle's algorithm against delayed acknowledgements."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        http.get("/version")
        times.append(time.perf_counter() - started)
    assert min(times) < 0.02


def test_hostile_requests_are_refused_while_others_are_served(small: RunningServer, http: httpx.Client) -> None:
    bad: list[bytes] = [
        b"",
        b"{",
        b"[]",
        b'{"prompt": NaN}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * 3000,
        b'{"prompt": [8192]}',
        b'{"prompt": [-1]}',
        b'{"prompt": "a", "seed": 9223372036854775808}',
        b"\xff\xfe",
    ]
    with concurrent.futures.ThreadPoolExecutor(4) as pool, Stream(small.base_url, 40, headers=KEY) as stream:
        next(stream)
        statuses = list(pool.map(lambda body: http.post("/v1/completions", content=body).status_code, bad))
        assert list(stream)[-1]["choices"][0]["finish_reason"] == "length"
    assert statuses == [400] * len(bad)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "--skip-tokenizer-init") as server, httpx.Client(base_url=server.base_url) as http:
        response = complete(http)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
        whole = complete(http, [1, 300, 301], max_tokens=6, ignore_eos=True, logprobs=1).json()["choices"][0]
        assert whole["text"] == ""
        assert len(whole["token_ids"]) == 6
        assert whole["logprobs"]["tokens"] == [f"token_id:{token}" for token in whole["token_ids"]]
        with http.stream(
            "POST",
            "/v1/completions",
            json={"prompt": [1, 300, 301], "max_tokens": 6, "ignore_eos": True, "temperature": 0, "stream": True},
        ) as response:
            *lines, done = [line for line in response.iter_lines() if line]
        assert done == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == whole["token_ids"]
