"""OpenAI's Python package, asynchronous: eight texts at once, whose tokens come as they are generated.

    pip install openai
    python clients/examples/openai_async.py

``OPENAI_BASE_URL`` and ``OPENAI_API_KEY`` name another server and its key.
"""

import asyncio
import os
import time

from openai import AsyncOpenAI

BEGINNINGS = (
    "The old man looked at the sea and",
    "Once upon a time there was a",
    "She opened the letter, and",
    "It was a dark and stormy night;",
    "The king drew his sword and",
    '"Where have you been?" said',
    "In the middle of the forest stood",
    "Nobody had seen the ship since",
)


async def write(client: AsyncOpenAI, model: str, beginning: str) -> tuple[str, int, float]:
    """Stream a continuation; the text, its tokens, and the seconds until the last of them."""
    sent, text, tokens = time.perf_counter(), beginning, 0
    stream = await client.completions.create(
        model=model,
        prompt=beginning,
        max_tokens=24,
        temperature=0.7,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        text += "".join(choice.text for choice in chunk.choices)
    return text, tokens, time.perf_counter() - sent


async def main() -> None:
    """All beginnings at once: the server runs them as one batch."""
    async with AsyncOpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    ) as client:
        model = (await client.models.list()).data[0].id
        start = time.perf_counter()
        written = await asyncio.gather(*(write(client, model, beginning) for beginning in BEGINNINGS))
        seconds = time.perf_counter() - start
    for text, tokens, own in written:
        print(f"{tokens} tokens in {own:.2f} s: {text!r}")
    total = sum(tokens for _, tokens, _ in written)
    print(f"{total} tokens in {seconds:.2f} s, {total / seconds:.0f} tokens/s")


asyncio.run(main())
