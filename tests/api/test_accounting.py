"""What a request leaves behind: one line in the log, without its text, and its place in the HTTP metrics."""

import logging
import re
from typing import Any

import pytest

from tests.api.scripted import ScriptedEngine, serve


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.name == "server.api.accounting"]


def metric(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} in {text}"
    return float(found[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_is_one_line_without_its_text(caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    caplog.set_level(logging.INFO)
    with serve(keys=("sesame",)) as server:
        headers = {"authorization": "Bearer sesame", "x-request-id": "mine"}
        body = {"prompt": "confidential", "max_tokens": 5, "n": 2, "stream": stream, "stream_options": None}
        assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200
    [line] = lines(caplog)
    assert line["request"] == "mine" and line["key"] == "key-1"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert line["tokens"] == 10 and line["prompt_tokens"] > 0 and line["finish"] == "length"
    assert 0 <= line["first_token_seconds"] <= line["seconds"]
    assert "confidential" not in caplog.text and "sesame" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_text_is_logged_where_somebody_asks_for_it(caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    caplog.set_level(logging.INFO)
    with serve(max_log_len=7) as server:
        answer = server.complete(["one\ntwo three", "four"], max_tokens=12, n=2, stream=stream)
    with serve(max_log_len=3, tokenizer=None) as server:
        server.complete([1, 2, 3, 4, 5], max_tokens=2)
    [line, without] = lines(caplog)
    assert line["prompts"] == ["one\ntwo", "four"]
    assert [len(text) for text in line["texts"]] == [7] * 4
    assert stream or line["texts"] == [choice["text"][:7] for choice in answer.json()["choices"]]
    assert "\n" not in next(record.message for record in caplog.records if "four" in record.message)
    assert without["prompts"] == [[1, 2, 3]]


@pytest.mark.parametrize("stream", [False, True])
def test_the_line_says_how_much_of_the_prompts_was_cached(caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    """The engine tells it with a choice's first token, long before the choice ends."""
    caplog.set_level(logging.INFO)
    with serve(ScriptedEngine(cached_tokens=3)) as server:
        server.complete(["abcdef", "ghijkl"], max_tokens=5, n=2, stream=stream)
    [line] = lines(caplog)
    assert line["cached_tokens"] == 6 and line["tokens"] == 20


def test_refusals_are_lines_too_and_probes_are_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serve() as server:
        server.http.post("/v1/completions", json={"prompt": "x", "frobnicate": 1})
        server.http.get("/nowhere%0Aelse")
        server.http.get("/health")
        server.http.get("/metrics")
    assert [(line["path"], line["status"]) for line in lines(caplog)] == [
        ("/v1/completions", 400),
        ("/nowhere%0Aelse", 404),
    ]
    assert not any("tokens" in line for line in lines(caplog))


def test_http_metrics_count_by_route_and_status() -> None:
    with serve() as server:
        for _ in range(3):
            server.complete()
        server.http.post("/v1/completions", json={})
        server.http.get("/v1/models/one")
        server.http.get("/v1/models/two")
        server.http.request("PROPFIND", "/v1/models")
        text = server.http.get("/metrics").text
    counts = "gale_http_requests_total"
    assert metric(text, f'{counts}{{method="POST",route="/v1/completions",status="200"}}') == 3
    assert metric(text, f'{counts}{{method="POST",route="/v1/completions",status="400"}}') == 1
    # One series for all paths of a route, so that clients cannot make up new ones.
    routes = re.findall(rf'{counts}{{method="(.*?)",route="(.*?)",status="(.*?)"}} (\S+)', text)
    assert [(m, s, n) for m, route, s, n in routes if "models/" in route] == [("GET", "404", "2.0")]
    assert [(s, n) for m, route, s, n in routes if m == "(other)"] == [("405", "1.0")]
    assert metric(text, 'gale_http_request_duration_seconds_count{route="/v1/completions"}') == 4
    assert metric(text, "gale_http_requests_in_progress") == 1, "the scrape itself"
