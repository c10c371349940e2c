"""One request to an OpenAI-style server, streamed, and the moments at which its answer arrived."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from clients.bench.flags import ENDPOINTS
from clients.bench.workload import Prompt
from clients.server import FAILURES, Server, ServerError, text_of

_LONGEST_ERROR = 300


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
    cached_tokens: int = 0
    """Of the prompt's, those that were not absorbed for this request."""
    output_tokens: int = 0
    turn: int = 0
    """Its place in its conversation, from 0."""
    saved: bool = False
    """Whether the server tells of a state that it saved."""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the whole answer came."""
        return not self.error


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and what every request to it has in common.

    Attributes:
        server: who is measured.
        model: the name sent.
        backend: of :data:`clients.bench.flags.ENDPOINTS`.
        extra: further fields.
    """

    server: Server
    model: str
    backend: str
    extra: dict[str, Any]

    async def ask(
        self, prompt: Prompt | list[dict[str, str]], max_tokens: int, fields: Mapping[str, Any] = MappingProxyType({})
    ) -> Answer:
        """Send one request and read its stream to the end. Failures are noted in the answer, never raised.

        Args:
            prompt: of a completion, or messages.
            max_tokens: most tokens of the answer.
            fields: of this request alone.
        """
        body = self._body(prompt, max_tokens) | dict(fields)
        answer = Answer(time.perf_counter())
        try:
            await self._read(body, answer)
        except ServerError as error:
            answer.error = str(error)
        except FAILURES as error:
            answer.error = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
        answer.ended = time.perf_counter()
        return answer

    async def _read(self, body: Mapping[str, Any], answer: Answer) -> None:
        last = answer.sent
        pieces = []
        async for chunk in self.server.stream(ENDPOINTS[self.backend], body):
            now = time.perf_counter()
            answer.saved = answer.saved or "state" in chunk
            if usage := chunk.get("usage"):
                answer.prompt_tokens = usage["prompt_tokens"]
                answer.output_tokens = usage["completion_tokens"]
                answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            text = text_of(chunk)
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
        if not answer.output_tokens:
            raise ServerError("no token came")
        if answer.first is None:
            # Tokens without text of their own: the end is all that can be timed.
            answer.first = time.perf_counter()

    def _body(self, prompt: Prompt | list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        content = {"messages": prompt} if self.backend == "openai-chat" else {"prompt": prompt}
        return {
            "model": self.model,
            **content,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
