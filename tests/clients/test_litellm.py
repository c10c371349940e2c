"""litellm: text and chat completions, sync and async, whole and streamed, token counts, and errors as it maps them."""

import asyncio
from typing import Any

import litellm
import pytest

from tests.clients.conftest import KEY, MODEL

PROMPT = "The old man looked at the sea and"
MESSAGES = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def text(v1: str) -> dict[str, Any]:
    model = f"text-completion-openai/{MODEL}"
    return {"model": model, "prompt": PROMPT, "api_base": v1, "api_key": KEY, "max_tokens": 12, "temperature": 0}


@pytest.fixture
def chat(v1: str) -> dict[str, Any]:
    model = f"openai/{MODEL}"
    return {"model": model, "messages": MESSAGES, "api_base": v1, "api_key": KEY, "max_tokens": 12, "temperature": 0}


def test_text(text: dict[str, Any]) -> None:
    whole = litellm.text_completion(**text)
    assert whole.choices[0].text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    parts = list(litellm.text_completion(**text, stream=True))
    assert "".join(part.choices[0].text or "" for part in parts if part.choices) == whole.choices[0].text


def test_text_asynchronously(text: dict[str, Any]) -> None:
    async def main() -> tuple[str, str]:
        whole = await litellm.atext_completion(**text)
        stream = await litellm.atext_completion(**text, stream=True)
        parts = [part.choices[0].text or "" async for part in stream if part.choices]
        return whole.choices[0].text, "".join(parts)

    whole, streamed = asyncio.run(main())
    assert whole == streamed != ""


def test_chat(chat: dict[str, Any]) -> None:
    whole = litellm.completion(**chat)
    assert whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens
    assert rebuilt.usage.prompt_tokens == whole.usage.prompt_tokens


def test_chat_asynchronously(chat: dict[str, Any]) -> None:
    async def main() -> tuple[str, str]:
        whole = await litellm.acompletion(**chat)
        stream = await litellm.acompletion(**chat, stream=True)
        parts = [part.choices[0].delta.content or "" async for part in stream if part.choices]
        return whole.choices[0].message.content, "".join(parts)

    whole, streamed = asyncio.run(main())
    assert whole == streamed != ""


def test_errors(text: dict[str, Any], chat: dict[str, Any]) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**chat, "api_key": "wrong"}, num_retries=0)
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**{**chat, "temperature": -1}, num_retries=0)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**chat, "model": "openai/other"}, num_retries=0)
