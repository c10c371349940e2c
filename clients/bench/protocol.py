"""One request to an OpenAI-style server, streamed, and the moments at which its answer arrived."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from clients.bench.flags import ENDPOINTS
from clients.bench.workload import Prompt

_LONGEST_ERROR = 300
_READ_BUFFER = 1 << 20


@dataclass(slots=True)
class Answer:
    """What came of one request. Seconds; moments by ``time.perf_counter``."""

    sent: float
    waited: float = 0.0
    """From its turn until it was sent, because of the limit on concurrency."""
    first: float | None = None
    """When the first token arrived."""
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between chunks with tokens."""
    chunks: int = 0
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the whole answer came."""
        return not self.error


class ServerError(Exception):
    """The server cannot be benchmarked; the message says why and what to do."""


class Server:
    """An OpenAI-style server.

    Args:
        session: carries the headers.
        base_url: without a trailing slash, with or without ``/v1``.
        backend: of :data:`clients.bench.flags.ENDPOINTS`.
        model: None: ask the server.
        extra_body: further fields of every request.
        ignore_eos: send ``ignore_eos``, a field of vLLM, SGLang and Gale, so that answers have the length asked for.

    Attributes:
        name: host and port, to tell servers apart.
        model: the name sent, once :meth:`prepare` has run.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        *,
        backend: str,
        model: str | None,
        extra_body: dict[str, Any],
        ignore_eos: bool,
    ) -> None:
        self._session = session
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._backend = backend
        self._extra = ({"ignore_eos": True} if ignore_eos else {}) | extra_body
        self.name = self._root.split("://")[-1]
        self.model = model or ""

    async def prepare(self) -> None:
        """Find out the model's name.

        Raises:
            ServerError: the server does not answer, refuses, or serves no model.
        """
        if self.model:
            return
        url = f"{self._root}/v1/models"
        try:
            async with self._session.get(url) as response:
                body = await response.text()
                if response.status != 200:
                    raise ServerError(f"{url} answers {response.status}: {_message(body)}")
                self.model = str(json.loads(body)["data"][0]["id"])
        except aiohttp.ClientError as error:
            raise ServerError(f"no server answers at {self._root}: {error}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(f"{url} does not list a model; name one with --model") from error

    def body(self, prompt: Prompt | list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        """The request's JSON."""
        content = {"messages": prompt} if self._backend == "openai-chat" else {"prompt": prompt}
        return {
            "model": self.model,
            **content,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }

    async def ask(self, prompt: Prompt | list[dict[str, str]], max_tokens: int) -> Answer:
        """Send one request and read its stream to the end. Failures are noted in the answer, never raised."""
        answer = Answer(time.perf_counter())
        try:
            url = self._root + ENDPOINTS[self._backend]
            async with self._session.post(
                url, json=self.body(prompt, max_tokens), read_bufsize=_READ_BUFFER
            ) as response:
                if response.status != 200:
                    answer.error = f"{response.status}: {_message(await response.text())}"
                else:
                    await _read(response.content, answer)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError) as error:
            answer.error = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
        answer.ended = time.perf_counter()
        return answer


async def _read(content: aiohttp.StreamReader, answer: Answer) -> None:
    last = answer.sent
    done = False
    pieces = []
    async for line in content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            break
        now = time.perf_counter()
        chunk = json.loads(data)
        if chunk.get("error"):
            answer.error = _message(data.decode())
            return
        if chunk.get("usage"):
            answer.prompt_tokens = chunk["usage"]["prompt_tokens"]
            answer.output_tokens = chunk["usage"]["completion_tokens"]
        if not chunk.get("choices"):
            continue
        choice = chunk["choices"][0]
        text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        if not text:
            continue
        pieces.append(text)
        answer.chunks += 1
        if answer.first is None:
            answer.first = now
        else:
            answer.gaps.append(now - last)
        last = now
    answer.text = "".join(pieces)
    answer.output_tokens = answer.output_tokens or answer.chunks
    if not done:
        answer.error = "the stream ended without [DONE]"
    elif answer.first is None and answer.output_tokens:
        # Tokens without text of their own: the end is all that can be timed.
        answer.first = time.perf_counter()
    elif answer.first is None:
        answer.error = "no token came"


def _message(body: str) -> str:
    """The server's own words, if the body has OpenAI's form of an error."""
    try:
        return str(json.loads(body)["error"]["message"])[:_LONGEST_ERROR]
    except (ValueError, LookupError, TypeError):
        return body[:_LONGEST_ERROR].strip() or "(no body)"
