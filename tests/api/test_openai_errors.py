"""Errors as the `openai` client raises them, sync and async."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from tests.api.scripted import ScriptedEngine, Server, serve

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES: Any = [{"role": "user", "content": "a"}]


@contextmanager
def failing(kind: str) -> Iterator[tuple[Server, dict[str, Any]]]:
    """A server, and fields of a request that fails on it."""
    engine = ScriptedEngine()
    changes: dict[str, Any] = {"chat_template": TEMPLATE, "max_body_bytes": 1000}
    fields: dict[str, Any] = {}
    match kind:
        case "key":
            changes["keys"] = ("right",)
        case "field":
            fields = {"top_p": 2}
        case "model":
            fields = {"model": "gpt-5"}
        case "size":
            fields = {"user": "x" * 2000}
        case "type":
            fields = {"extra_headers": {"Content-Type": "text/plain"}}
        case "queue":
            engine.paused = True
        case "engine":
            engine.fail_after = 2
    with serve(engine, **changes) as server:
        if kind == "queue":
            background = {"prompt": "a", "n": 16, "stream": True}
            with server.http.stream("POST", "/v1/completions", json=background):
                yield server, fields
        else:
            yield server, fields


CASES: list[tuple[str, type[openai.APIStatusError], dict[str, Any]]] = [
    (
        "key",
        openai.AuthenticationError,
        {"status_code": 401, "code": "invalid_api_key", "type": "authentication_error"},
    ),
    ("field", openai.BadRequestError, {"status_code": 400, "param": "top_p", "type": "invalid_request_error"}),
    ("model", openai.NotFoundError, {"status_code": 404, "param": "model", "code": "model_not_found"}),
    ("size", openai.APIStatusError, {"status_code": 413, "code": "body_too_large"}),
    ("type", openai.APIStatusError, {"status_code": 415, "code": "unsupported_media_type"}),
    ("queue", openai.InternalServerError, {"status_code": 503, "code": "queue_full", "type": "overloaded_error"}),
    ("engine", openai.InternalServerError, {"status_code": 500, "code": "internal_error", "type": "server_error"}),
]


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize(("kind", "error", "attributes"), CASES, ids=[case[0] for case in CASES])
def test_errors_have_the_clients_own_classes(
    kind: str, error: type[openai.APIStatusError], attributes: dict[str, Any], chat: bool
) -> None:
    async def ask_async(base_url: str, body: dict[str, Any]) -> None:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="wrong", max_retries=0) as client:
            route: Any = client.chat.completions if chat else client.completions
            await route.create(**body)

    with failing(kind) as (server, fields):
        base_url = f"http://127.0.0.1:{server.port}/v1"
        body = {"model": "scripted", "messages" if chat else "prompt": MESSAGES if chat else "a", **fields}
        with openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0) as client:
            route: Any = client.chat.completions if chat else client.completions
            with pytest.raises(error) as caught:
                route.create(**body)
        with pytest.raises(error) as caught_async:
            asyncio.run(ask_async(base_url, body))
    for raised in (caught.value, caught_async.value):
        assert type(raised) is error
        assert {name: getattr(raised, name) for name in attributes} == attributes
        assert raised.request_id == raised.response.headers["x-request-id"]
        if raised.status_code == 503:
            assert int(raised.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_an_error_within_a_stream_is_raised(chat: bool) -> None:
    with failing("engine") as (server, _):
        base_url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=base_url, api_key="x", max_retries=0) as client:
            stream: Any = (
                client.chat.completions.create(model="scripted", messages=MESSAGES, stream=True)
                if chat
                else client.completions.create(model="scripted", prompt="a", stream=True)
            )
            chunks = []
            with pytest.raises(openai.APIError, match="scripted engine failed") as caught:
                chunks.extend(chunk for chunk in stream)
            assert caught.value.code == "internal_error"
