"""Saved states over HTTP: the fields of completions, the routes, whose states they are."""

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from server.api import transfers
from tests.api.scripted import ScriptedEngine, Server, read_until, script_text, serve
from tests.waiting import wait_until


@pytest.fixture
def fresh() -> Iterator[Server]:
    """A server in which nothing has been saved."""
    with serve() as running:
        yield running


def save(server: Server, prompt: Any = "abc", **fields: Any) -> dict[str, Any]:
    response = server.complete(prompt, **{"save_state": True, "max_tokens": 4, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def test_an_answer_tells_of_the_state_that_it_saved(fresh: Server) -> None:
    body = save(fresh)
    state = body["state"]
    # "abc" behind the beginning of sequence, and the answer.
    assert state == {"id": state["id"], "num_tokens": 8, "bytes": 0}
    assert state["id"].startswith("state-")
    assert "state" not in fresh.complete("abc").json()
    assert "state" not in fresh.complete("abc", save_state=False).json()


def test_a_prompt_behind_a_state_gets_no_beginning(fresh: Server) -> None:
    state = save(fresh)["state"]["id"]
    body = fresh.complete("de", state=state, max_tokens=5).json()
    assert fresh.engine.requests[-1].prompts == (b"d\0\0\0e\0\0\0",)
    assert body["choices"][0]["text"] == script_text(10, 0, 5)
    assert body["usage"]["prompt_tokens"] == 10 and body["usage"]["total_tokens"] == 15
    for empty in ("", [""], [[]]):
        assert fresh.complete(empty, state=state, max_tokens=5).json()["choices"][0]["text"] == script_text(8, 0, 5)
    two = fresh.complete([[1], [1, 2]], state=state, max_tokens=5).json()
    assert [choice["text"] for choice in two["choices"]] == [script_text(9, 0, 5), script_text(10, 0, 5)]
    assert two["usage"]["prompt_tokens"] == 19


def test_every_choice_has_a_state(fresh: Server) -> None:
    states = save(fresh, ["a", "bc"], n=2)["state"]
    assert [state["num_tokens"] for state in states] == [6, 6, 7, 7]
    assert len({state["id"] for state in states}) == 4


def test_a_stream_tells_of_states_where_choices_end(fresh: Server) -> None:
    fields = {"stream": True, "n": 2, "save_state": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
    *lines, done, _ = fresh.complete("abc", **fields).text.split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    ends = [chunk for chunk in chunks if "state" in chunk]
    assert sorted(chunk["choices"][0]["index"] for chunk in ends) == [0, 1]
    assert all(chunk["choices"][0]["finish_reason"] == "length" for chunk in ends)
    assert {chunk["state"]["num_tokens"] for chunk in ends} == {7}
    more = fresh.complete(
        "", state=ends[0]["state"]["id"], stream=True, max_tokens=2, stream_options={"include_usage": True}
    )
    assert json.loads(more.text.split("\n\n")[-3].removeprefix("data: "))["usage"]["prompt_tokens"] == 7


def test_the_routes(fresh: Server) -> None:
    http = fresh.http
    assert http.get("/v1/states").json() == {"object": "list", "data": []}
    state = save(fresh, save_state="book", state_ttl=100)["state"]["id"]
    shown = http.get(f"/v1/states/{state}").json()
    assert shown == http.get("/v1/states/book").json()
    assert shown["name"] == "book" and shown["num_tokens"] == 8 and shown["object"] == "state"
    assert shown["expires"] - shown["created"] == pytest.approx(100, abs=1)
    response = http.post("/v1/states/book/fork")
    assert response.status_code == 201
    fork = response.json()
    assert fork["name"] is None and fork["num_tokens"] == 8 and fork["id"] != state
    named = http.post(f"/v1/states/{state}/fork", json={"name": "copy", "ttl": 5}).json()
    assert named["name"] == "copy" and named["expires"] - named["created"] == pytest.approx(5, abs=1)
    listed = http.get("/v1/states").json()["data"]
    assert [one["id"] for one in listed] == [state, fork["id"], named["id"]]
    assert http.delete("/v1/states/book").json() == {"id": state, "object": "state.deleted", "deleted": True}
    assert http.get("/v1/states/book").status_code == 404
    assert fresh.complete("", state="copy", max_tokens=3).json()["choices"][0]["text"] == script_text(8, 0, 3)


def test_a_text_is_read_and_nothing_generated(fresh: Server) -> None:
    def prefill(**body: Any) -> Any:
        return fresh.http.post("/v1/states/prefill", json=body)

    response = prefill(prompt="abc", name="book", ttl=50)
    assert response.status_code == 201, response.text
    state = response.json()
    assert (state["name"], state["num_tokens"], state["expires"] - state["created"]) == ("book", 4, 50)
    assert fresh.engine.generated == 0
    assert prefill(prompt=[1, 2], state="book").json()["num_tokens"] == 6
    assert prefill(prompt="abc", add_special_tokens=False).json()["num_tokens"] == 3
    assert fresh.complete("", state="book", max_tokens=3).json()["choices"][0]["text"] == script_text(4, 0, 3)
    for body, param in (
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "max_tokens": 1}, "max_tokens"),
        ({"prompt": "a", "name": "a b"}, "name"),
        ({"prompt": "a", "ttl": -1}, "ttl"),
        ({"prompt": "a", "state": "book", "add_special_tokens": True}, "add_special_tokens"),
    ):
        refused = prefill(**body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
    assert prefill(prompt="a", state="none").status_code == 404


def test_unknown_states_are_404(fresh: Server) -> None:
    for response in (
        fresh.complete("a", state="none"),
        fresh.http.get("/v1/states/none"),
        fresh.http.delete("/v1/states/none"),
        fresh.http.post("/v1/states/none/fork"),
    ):
        error = response.json()["error"]
        assert response.status_code == 404 and error["code"] == "state_not_found", error
        assert error["param"] == "state" and "'none'" in error["message"]


def test_states_belong_to_their_key() -> None:
    with serve(keys=("one", "two")) as server:
        mine, theirs = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        assert server.http.get("/v1/states").status_code == 401
        body = {"prompt": "abc", "save_state": "x"}
        state = server.http.post("/v1/completions", json=body, headers=mine).json()["state"]["id"]
        for name in (state, "x"):
            assert server.http.get(f"/v1/states/{name}", headers=theirs).status_code == 404
            assert server.http.delete(f"/v1/states/{name}", headers=theirs).status_code == 404
            request = {"prompt": "", "state": name}
            assert server.http.post("/v1/completions", json=request, headers=theirs).status_code == 404
            assert server.http.post("/v1/completions", json=request, headers=mine).status_code == 200
        assert server.http.get("/v1/states", headers=theirs).json()["data"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"state": ""}, "state"),
        ({"state": 1}, "state"),
        ({"state_ttl": 5}, "state_ttl"),
        ({"save_state": True, "state_ttl": 0}, "state_ttl"),
        ({"save_state": "state-x"}, "save_state"),
        ({"save_state": "a/b"}, "save_state"),
        ({"save_state": 1}, "save_state"),
        ({"save_state": "x", "n": 2}, "save_state"),
        ({"save_state": "x", "prompt": ["a", "b"]}, "save_state"),
        ({"save_state": True, "best_of": 2}, "save_state"),
        ({"state": "x", "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"state": "x", "echo": True, "logprobs": 1}, "logprobs"),
        ({"state": "x", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
        ({"state": "x", "add_special_tokens": True}, "add_special_tokens"),
        ({"state": "x", "prompt": []}, "prompt"),
    ],
    ids=str,
)
def test_refused_with_the_name_of_the_field(server: Server, fields: dict[str, Any], param: str) -> None:
    response = server.complete(**{"prompt": "a", **fields})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "param"), [({"name": ""}, "name"), ({"name": "state-1"}, "name"), ({"ttl": 0}, "ttl"), ({"x": 1}, "x")]
)
def test_forks_are_checked(server: Server, body: dict[str, Any], param: str) -> None:
    response = server.http.post("/v1/states/none/fork", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_a_server_that_parks_no_states_says_so() -> None:
    with serve(ScriptedEngine(states=None)) as server:
        for response in (
            server.complete("a", save_state=True),
            server.complete("a", state="x"),
            server.http.get("/v1/states"),
        ):
            error = response.json()["error"]
            assert response.status_code == 400 and error["code"] == "states_off"
            assert "--state-cache-host" in error["message"]


def test_a_dying_engine_ends_commands(fresh: Server) -> None:
    fresh.engine.mute = True
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fresh.http.get, "/v1/states")
        deadline = time.monotonic() + 30
        while not fresh.call(lambda: bool(fresh.client._commands)):
            assert time.monotonic() < deadline
        fresh.call(lambda: fresh.client.engine_died(1))
        assert asked.result(30).status_code == 503
    assert not fresh.call(lambda: bool(fresh.client._commands))


BINARY = {"Content-Type": "application/octet-stream"}
UPLOAD = (
    b"POST /v1/states HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 9000\r\n\r\n"
)


def test_a_state_is_downloaded_and_uploaded(fresh: Server) -> None:
    state = save(fresh, save_state="book")["state"]["id"]
    response = fresh.http.get(f"/v1/states/{state}/content")
    assert response.status_code == 200 and len(response.content) == 4 * 8
    assert response.headers["etag"] == f'"{"d" * 64}"'
    assert response.headers["content-disposition"] == 'attachment; filename="book.safetensors"'
    sent = fresh.http.post("/v1/states?name=moved&ttl=50", content=response.content, headers=BINARY)
    assert sent.status_code == 201, sent.text
    moved = sent.json()
    assert (moved["name"], moved["num_tokens"], moved["expires"] - moved["created"]) == ("moved", 8, 50)
    assert fresh.complete("", state="moved", max_tokens=3).json()["choices"][0]["text"] == script_text(8, 0, 3)
    assert list(fresh.client.transfers.iterdir()) == []


def test_refused_uploads_name_their_fault(fresh: Server) -> None:
    for content, query, headers, status, param in (
        (b"abc", "", BINARY, 400, "body"),
        (b"x" * (1 << 16), "", BINARY, 413, None),
        (b"abcd", "?ttl=x", BINARY, 400, "ttl"),
        (b"abcd", "?name=state-x", BINARY, 400, "name"),
        (b"abcd", "?what=x", BINARY, 400, "what"),
        (b"abcd", "?ttl=1&ttl=2", BINARY, 400, "ttl"),
        (b"abcd", "", {"Content-Type": "application/json"}, 415, None),
        (b"abcd", "", BINARY | {"Content-Encoding": "gzip"}, 415, None),
    ):
        response = fresh.http.post(f"/v1/states{query}", content=content, headers=headers)
        assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    pieces = fresh.http.post("/v1/states", content=iter([b"x" * 10000] * 3), headers=BINARY)
    assert pieces.status_code == 413, "of unknown length"
    assert not fresh.client.transfers.exists() or list(fresh.client.transfers.iterdir()) == []


def test_a_client_that_leaves_leaves_nothing_behind(fresh: Server) -> None:
    with fresh.connect() as sock:
        sock.sendall(UPLOAD + b"x" * 5000)
        wait_until(lambda: fresh.client.transfers.exists() and any(fresh.client.transfers.iterdir()))
    wait_until(lambda: not any(fresh.client.transfers.iterdir()))


def test_a_client_that_sends_nothing_gives_up_its_place(fresh: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "IDLE_SECONDS", 0.2)
    with fresh.connect() as sock:
        sock.sendall(UPLOAD + b"x" * 5000)
        assert read_until(sock, b"request_timeout").startswith(b"HTTP/1.1 408 ")
    assert not list(fresh.client.transfers.iterdir())


def test_a_client_that_sends_a_trickle_gives_up_its_place(fresh: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "IDLE_SECONDS", 0.5)
    with fresh.connect() as sock:
        sock.sendall(UPLOAD)
        sock.settimeout(0.1)
        answer = b""
        deadline = time.monotonic() + 30
        while b"request_timeout" not in answer:
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):
                sock.sendall(b"x")
                answer += sock.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ")
    assert not list(fresh.client.transfers.iterdir())


def test_only_so_many_transfers_at_once(fresh: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(fresh.connect())
            sock.sendall(UPLOAD + b"x")
        wait_until(lambda: fresh.client.transfers.exists() and len(list(fresh.client.transfers.iterdir())) == 8)
        response = fresh.http.post("/v1/states", content=b"abcd", headers=BINARY)
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
    wait_until(lambda: fresh.http.post("/v1/states", content=b"abcd", headers=BINARY).status_code == 201)
