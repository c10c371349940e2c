"""A text that is longer than what the engine takes at once, sent as it comes to be, to a real server."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.running import RunningServer
from tests.waiting import wait_until

TEXT = (Path(__file__).parents[2] / "README.md").read_text()


def pieces() -> Iterator[bytes]:
    """Cut anywhere, also inside characters."""
    data = TEXT.encode()
    for start in range(0, len(data), 997):
        yield data[start : start + 997]


def test_a_text_is_read_as_it_comes(server: RunningServer) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    url = f"{server.base_url}/v1/states/prefill?stream=true&name=readme"
    with httpx.stream("POST", url, content=pieces(), headers=headers, timeout=120) as response:
        assert response.status_code == 200
        *lines, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    *progress, state = map(json.loads, lines)
    assert done == "[DONE]" and state["name"] == "readme"
    counts = [event["num_tokens"] for event in progress]
    assert 0 < counts[0] <= counts[-1] <= state["num_tokens"] and counts == sorted(counts)
    # In one piece it has the same tokens, all of which have been absorbed.
    body = {"prompt": TEXT, "max_tokens": 8, "temperature": 0}
    whole = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=120).json()
    assert whole["usage"]["prompt_tokens"] == state["num_tokens"]
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == state["num_tokens"]
    more = httpx.post(f"{server.base_url}/v1/completions", json=body | {"prompt": "", "state": "readme"}, timeout=60)
    assert more.json()["choices"][0]["text"] == whole["choices"][0]["text"]


def test_a_client_that_leaves_midway(server: RunningServer) -> None:
    used = server.metric("gale_slots_used")
    url = httpx.URL(server.base_url)
    with socket.create_connection((url.host, url.port or 80)) as connection:
        head = "POST /v1/states/prefill?name=half HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent = "Call me Ishmael. " * 20_000
        connection.sendall(f"{len(sent):x}\r\n{sent}\r\n".encode())
        wait_until(lambda: server.metric("gale_slots_used") != used)
    wait_until(lambda: server.metric("gale_slots_used") == used)
    assert httpx.get(f"{server.base_url}/v1/states/half").status_code == 404


def test_an_evaluation_is_the_same_cold_and_warm(server: RunningServer) -> None:
    """Scored as lm-evaluation-harness does it, and generated from; the second time begins from parked states."""
    prompts = [f"{name} looked at the sea and said that" for name in ("Nemo", "Queequeg", "Starbuck")]

    def evaluate() -> tuple[list[Any], list[str], list[int]]:
        scoring = {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        generating = {"prompt": prompts, "max_tokens": 16, "temperature": 0}
        scored, said = (
            httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60).json()
            for body in (scoring, generating)
        )
        cached = said["usage"]["prompt_tokens_details"]["cached_tokens"], said["usage"]["prompt_tokens"]
        return [one["logprobs"] for one in scored["choices"]], [one["text"] for one in said["choices"]], list(cached)

    cold, warm = evaluate(), evaluate()
    assert cold[:2] == warm[:2]
    # What was scored has left its state, with the logits of its last token.
    assert cold[2][0] == cold[2][1] == warm[2][0]
