"""States as files, between real servers and over real sockets."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from safetensors import safe_open

from tests.e2e.running import RunningServer
from tests.waiting import wait_until

KEY = "a key to sign states with"
TEXT = "The old man looked at the sea. " * 20


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server beside the one that all tests share; with keys of its own."""
    folder = tmp_path_factory.mktemp("other")
    keys = folder / "keys"
    keys.write_text("alice a-key\nbob b-key\n")
    with RunningServer(folder, "--api-key-file", str(keys), "--max-saved-states-per-key", "3") as server:
        yield server


ALICE = {"Authorization": "Bearer a-key"}
BOB = {"Authorization": "Bearer b-key"}
BINARY = {"Content-Type": "application/octet-stream"}


def read_book(base_url: str, name: str) -> dict[str, Any]:
    response = httpx.post(f"{base_url}/v1/states/prefill", json={"prompt": TEXT, "name": name}, timeout=60)
    assert response.status_code == 201, response.text
    state: dict[str, Any] = response.json()
    return state


def upload(server: RunningServer, content: bytes, headers: dict[str, str] = ALICE, **query: Any) -> httpx.Response:
    return httpx.post(
        f"{server.base_url}/v1/states", content=content, headers=BINARY | headers, params=query, timeout=60
    )


def ask(base_url: str, prompt: str, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 12, **fields}
    response = httpx.post(f"{base_url}/v1/completions", json=body, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_conversation_moves_to_another_server(base_url: str, other: RunningServer, tmp_path: Path) -> None:
    state = read_book(base_url, "travels")
    # As a person would.
    file = tmp_path / "travels.safetensors"
    subprocess.run(["curl", "-sSf", "-o", file, f"{base_url}/v1/states/travels/content"], check=True)
    url = f"{other.base_url}/v1/states?name=travels&ttl=600"
    command = [
        "curl",
        "-sSf",
        url,
        "-H",
        "Authorization: Bearer a-key",
        "-H",
        f"Content-Type: {BINARY['Content-Type']}",
    ]
    subprocess.run([*command, "--data-binary", f"@{file}"], check=True)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["num_tokens"] == str(state["num_tokens"])
    shown = httpx.get(f"{other.base_url}/v1/states/travels", headers=ALICE).json()
    assert shown["num_tokens"] == state["num_tokens"] and shown["bytes"] == state["bytes"]
    assert shown["expires"] - shown["created"] == 600
    for prompt in (" And then", ""):
        here = ask(base_url, prompt, state="travels")
        there = ask(other.base_url, prompt, ALICE, state="travels")
        assert there["choices"][0]["text"] == here["choices"][0]["text"]
        assert there["usage"]["prompt_tokens_details"]["cached_tokens"] == state["num_tokens"]
    # It is Alice's alone, and nobody's who has not named it.
    assert httpx.get(f"{other.base_url}/v1/states/travels", headers=BOB).status_code == 404
    assert httpx.get(f"{other.base_url}/v1/states/travels/content", headers=BOB).status_code == 404
    assert httpx.get(f"{other.base_url}/v1/states/travels/content").status_code == 401
    assert httpx.post(f"{other.base_url}/v1/states", content=b"x", headers=BINARY).status_code == 401
    for headers in (ALICE, BOB):
        answer = ask(other.base_url, TEXT + "!", headers, max_tokens=1)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    httpx.delete(f"{other.base_url}/v1/states/travels", headers=ALICE)
    httpx.delete(f"{base_url}/v1/states/travels")


def test_a_download_says_what_it_is(base_url: str, server: RunningServer) -> None:
    state = read_book(base_url, "shown")
    whole = httpx.get(f"{base_url}/v1/states/{state['id']}/content")
    assert whole.headers["content-length"] == str(len(whole.content))
    assert whole.headers["content-disposition"] == 'attachment; filename="shown.safetensors"'
    assert whole.headers["content-type"] == "application/octet-stream"
    again = httpx.get(f"{base_url}/v1/states/shown/content")
    assert again.headers["etag"] == whole.headers["etag"] and len(whole.headers["etag"]) == 66
    assert again.content == whole.content
    # A download that broke off goes on where it was.
    headers = {"Range": "bytes=1000-", "If-Range": whole.headers["etag"]}
    rest = httpx.get(f"{base_url}/v1/states/shown/content", headers=headers)
    assert rest.status_code == 206 and rest.content == whole.content[1000:]
    with httpx.stream("GET", f"{base_url}/v1/states/shown/content") as cut:
        next(cut.iter_raw(100))
    httpx.delete(f"{base_url}/v1/states/shown")
    assert httpx.get(f"{base_url}/v1/states/shown/content").status_code == 404
    wait_until(lambda: not list(server.temporary.rglob("transfers/*")), seconds=20)


@pytest.mark.parametrize(
    ("content", "query", "status", "param", "code"),
    [
        (b"", {}, 400, "body", "state_invalid"),
        (b"no state at all", {}, 400, "body", "state_invalid"),
        (b"\x80\x05\x95" * 99, {}, 400, "body", "state_invalid"),
        (b"x", {"name": "state-1"}, 400, "name", None),
        (b"x", {"ttl": "soon"}, 400, "ttl", None),
        (b"x", {"ttl": 0}, 400, "ttl", None),
        (b"x", {"convert": "perhaps"}, 400, "convert", None),
        (b"x", {"other": "x"}, 400, "other", None),
        (b"x", {"name": ["a", "b"]}, 400, "name", None),
        (b"x" * (80 << 20), {}, 413, None, "body_too_large"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_uploads(
    other: RunningServer, content: bytes, query: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    response = upload(other, content, **query)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
    assert list(other.temporary.rglob("transfers/*")) == []


def test_what_is_not_declared_as_a_file(other: RunningServer) -> None:
    for headers in ({"Content-Type": "application/json"}, {}, BINARY | {"Content-Encoding": "gzip"}):
        response = httpx.post(f"{other.base_url}/v1/states", content=b"x", headers=ALICE | headers)
        assert (response.status_code == 415 and "application/octet-stream" in response.text) or "gzip" in response.text


def test_a_key_has_as_many_states_as_it_may(base_url: str, other: RunningServer) -> None:
    read_book(base_url, "many")
    content = httpx.get(f"{base_url}/v1/states/many/content").content
    for _ in range(3):
        assert upload(other, content, BOB).status_code == 201
    refused = upload(other, content, BOB)
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "states_limit_exceeded"
    client = openai.OpenAI(base_url=f"{other.base_url}/v1", api_key="b-key", max_retries=0)
    with pytest.raises(openai.PermissionDeniedError, match="delete some"):
        client.completions.create(model="classics-11m", prompt="It was", extra_body={"save_state": True})
    assert upload(other, content, ALICE, name="mine").status_code == 201
    httpx.delete(f"{base_url}/v1/states/many")


def test_states_from_elsewhere_must_be_signed(tmp_path: Path, base_url: str) -> None:
    read_book(base_url, "unsigned")
    unsigned = httpx.get(f"{base_url}/v1/states/unsigned/content").content
    httpx.delete(f"{base_url}/v1/states/unsigned")
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    folder = tmp_path / "states"
    flags = ("--state-signing-key-file", str(key), "--state-cache-dir", str(folder))
    with RunningServer(tmp_path / "signing", *flags) as server:
        refused = upload(server, unsigned)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (400, "body", "state_signature_invalid")
        read_book(server.base_url, "signed")
        content = httpx.get(f"{server.base_url}/v1/states/signed/content").content
        assert b'"signature": "' in content
        assert upload(server, content, name="again").status_code == 201
        assert KEY not in server.log
        # As good as a full disk.
        engine = server.child("gale-engine")
        engine.rlimit(psutil.RLIMIT_FSIZE, (10_000, psutil.RLIM_INFINITY))
        for response in (
            upload(server, content),
            httpx.get(f"{server.base_url}/v1/states/signed/content"),
            httpx.post(f"{server.base_url}/v1/states/prefill", json={"prompt": "It was"}, timeout=60),
            httpx.post(f"{server.base_url}/v1/completions", json={"prompt": "It was", "save_state": True}, timeout=60),
        ):
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (507, "state_not_saved"), error
            assert "File too large" in error["message"]
        assert ask(server.base_url, "It was")["choices"][0]["text"]
        assert len(httpx.get(f"{server.base_url}/v1/states").json()["data"]) == 2
