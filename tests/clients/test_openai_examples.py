"""The examples of OpenAI's API reference that apply to a text model: with its SDK, sync and async, and with curl.

The requests are those of the reference's pages "Create completion" and "Create chat completion" and of the guides to
streaming, reproducible outputs and log-probabilities, for this server's model.
"""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import KEY, MODEL

COMPLETIONS: dict[str, dict[str, Any]] = {
    "basic": {"prompt": "Say this is a test", "max_tokens": 7, "temperature": 0},
    "streaming": {"prompt": "Say this is a test", "max_tokens": 7, "temperature": 0, "stream": True},
    "tagline": {"prompt": "Write a tagline for an ice cream shop."},
    "usage in the stream": {
        "prompt": "Say this is a test",
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "several prompts and choices": {"prompt": ["Once upon a time", "It was"], "n": 2, "max_tokens": 5},
    "best of": {"prompt": "Once upon a time", "n": 1, "best_of": 3, "max_tokens": 5},
    "log-probabilities": {"prompt": "The quick brown fox", "max_tokens": 5, "logprobs": 5},
    "echo": {"prompt": "The quick brown fox", "max_tokens": 5, "echo": True},
    "stop": {"prompt": "The quick brown fox", "max_tokens": 40, "stop": ["\n", "."]},
    "bias": {"prompt": "The quick brown fox", "max_tokens": 5, "logit_bias": {"50": -100, "51": 5}},
    "penalties": {"prompt": "Again and again", "max_tokens": 9, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "reproducible": {"prompt": "Tell me a story about", "max_tokens": 20, "seed": 12345, "temperature": 1},
    "nucleus": {"prompt": "Tell me a story about", "max_tokens": 9, "top_p": 0.1, "user": "user-1234"},
}
MESSAGES = [
    {"role": "developer", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hello!"},
]
CHATS: dict[str, dict[str, Any]] = {
    "default": {"messages": MESSAGES},
    "streaming": {"messages": MESSAGES, "stream": True},
    "log-probabilities": {"messages": MESSAGES[1:], "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 6},
    "text parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is in this text?"}]}],
        "max_completion_tokens": 6,
    },
    "usage in the stream": {
        "messages": MESSAGES,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 6,
    },
    "several choices": {"messages": MESSAGES, "n": 2, "max_completion_tokens": 6},
    "conversation": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who won?"},
            {"role": "assistant", "content": "They did."},
            {"role": "user", "content": "Where was it played?"},
        ],
        "max_tokens": 6,
        "seed": 7,
    },
    "JSON": {"messages": MESSAGES, "response_format": {"type": "json_object"}, "max_completion_tokens": 60},
    "structured": {
        "messages": MESSAGES,
        "max_completion_tokens": 200,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "event",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"day": {"enum": ["Friday", "Sunday"]}, "busy": {"type": "boolean"}},
                    "required": ["day", "busy"],
                    "additionalProperties": False,
                },
            },
        },
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "functions": (
        {
            "messages": MESSAGES,
            "tools": [{"type": "function", "function": {"name": "get_current_weather", "parameters": {}}}],
            "tool_choice": "auto",
        },
        "tools",
    ),
    "image": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What's in this image?"},
                        {"type": "image_url", "image_url": {"url": "https://example.com/boardwalk.jpg"}},
                    ],
                }
            ]
        },
        "messages",
    ),
}

both = pytest.mark.parametrize(
    ("route", "name"), [("completions", name) for name in COMPLETIONS] + [("chat/completions", name) for name in CHATS]
)


def request_of(route: str, name: str) -> dict[str, Any]:
    return (COMPLETIONS if route == "completions" else CHATS)[name]


def check(route: str, request: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """An answer, or the chunks of one: whole, and with what was asked for."""
    kind = {"completions": "text_completion", "chat/completions": "chat.completion"}[route]
    streamed = request.get("stream", False)
    assert all(
        answer["object"] == (f"{kind}.chunk" if streamed and route != "completions" else kind) for answer in answers
    )
    assert len({(answer["id"], answer["created"], answer["model"]) for answer in answers}) == 1
    assert answers[0]["model"] == MODEL
    prompts = request["prompt"] if isinstance(request.get("prompt"), list) else [None]
    num_choices = len(prompts) * request.get("n", 1)
    texts, reasons = [""] * num_choices, [None] * num_choices
    logprobs: list[Any] = []
    for answer in answers:
        for choice in answer["choices"]:
            part = choice.get("text") if route == "completions" else choice["delta" if streamed else "message"]
            texts[choice["index"]] += (part if isinstance(part, str) else (part or {}).get("content")) or ""
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
            logprobs.append(choice.get("logprobs"))
    assert all(reason in ("stop", "length") for reason in reasons)
    if request.get("echo"):
        assert texts[0].startswith(request["prompt"])
    if "logprobs" in request:
        assert all(entry is not None for entry in logprobs)
    if "response_format" in request and reasons[0] == "stop":
        json.loads(texts[0])
    if not streamed:
        usage = answers[0]["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    elif request.get("stream_options"):
        assert answers[-1]["choices"] == [] and answers[-1]["usage"]["completion_tokens"] > 0
    else:
        assert not any(answer.get("usage") for answer in answers)


@pytest.fixture(scope="module")
def client(v1: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=v1, api_key=KEY, max_retries=0) as client:
        yield client


@both
def test_with_the_sdk(client: openai.OpenAI, route: str, name: str) -> None:
    request = request_of(route, name)
    resource = client.completions if route == "completions" else client.chat.completions
    answer = resource.create(model=MODEL, **request)
    check(route, request, [part.model_dump() for part in (answer if request.get("stream") else [answer])])


@both
def test_with_the_asynchronous_sdk(v1: str, route: str, name: str) -> None:
    request = request_of(route, name)

    async def parts() -> AsyncIterator[dict[str, Any]]:
        async with openai.AsyncOpenAI(base_url=v1, api_key=KEY, max_retries=0) as client:
            resource = client.completions if route == "completions" else client.chat.completions
            answer = await resource.create(model=MODEL, **request)
            if not request.get("stream"):
                yield answer.model_dump()
                return
            async for part in answer:
                yield part.model_dump()

    async def collect() -> list[dict[str, Any]]:
        return [part async for part in parts()]

    check(route, request, asyncio.run(collect()))


@both
def test_with_curl(v1: str, route: str, name: str) -> None:
    request = request_of(route, name)
    command = ["curl", "-sS", "--no-buffer", f"{v1}/{route}", "-H", "Content-Type: application/json"]
    command += ["-H", f"Authorization: Bearer {KEY}", "-d", json.dumps({"model": MODEL, **request})]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    if request.get("stream"):
        *lines, done = [line for line in shown.split("\n\n") if line]
        assert done == "data: [DONE]"
        check(route, request, [json.loads(line.removeprefix("data: ")) for line in lines])
    else:
        check(route, request, [json.loads(shown)])


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_apply_is_refused_by_name(client: openai.OpenAI, name: str) -> None:
    request, param = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, **request)
    assert caught.value.param is not None and caught.value.param.startswith(param)


def test_reproducible_outputs(client: openai.OpenAI) -> None:
    answers = [client.completions.create(model=MODEL, **COMPLETIONS["reproducible"]) for _ in range(2)]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    assert answers[0].system_fingerprint == answers[1].system_fingerprint is not None


def test_suffix_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="Once", suffix="the end.")
    assert caught.value.param == "suffix"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
