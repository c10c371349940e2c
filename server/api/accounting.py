"""What is noted of every request: a line in the log, and the HTTP metrics. No word of a prompt or of an answer, unless
``--max-log-len`` asks for it."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.auth import tenant_of
from server.api.mailbox import ChoiceEvent
from server.metrics import HttpMetrics
from server.tokenizer import Tokenizer
from server.types import FinishReason

logger = logging.getLogger(__name__)

_CLIENT_GONE: Final = 499
"""Status of requests whose client left before the answer began, as nginx writes it."""
_NO_ROUTE: Final = "(none)"
_MAX_LOG_LEN: Final = "max_log_len"
_LONGEST_CHARACTER: Final = 4
"""Bytes of UTF-8."""
_TEXTLESS: Final = 16
"""Special tokens at the beginning of a prompt that may have no text."""
_PROBES: Final = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
"""Asked every few seconds by machines: worth a line only when debugging."""


@dataclass(slots=True)
class Generation:
    """What a request generated, as far as it got.

    Attributes:
        prompt_tokens: of all prompts.
        cached_tokens: of these, those that need not be absorbed.
        tokens: generated, over all choices.
        first: when the first came, by ``time.monotonic``; None before it.
        finish_reasons: of the choices that have ended.
        max_log_len: characters of each text that are logged.
        prompts: token ids.
        texts: the beginning of what was generated, UTF-8 by choice; kept only to be logged.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    tokens: int = 0
    first: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    max_log_len: int = 0
    prompts: Sequence[Sequence[int]] = ()
    texts: dict[int, bytes] = field(default_factory=dict)

    def note(self, events: Iterable[ChoiceEvent]) -> None:
        """Count what has just arrived."""
        if self.first is None:
            self.first = time.monotonic()
        for event in events:
            self.tokens += len(event.token_ids)
            self.cached_tokens += event.cached_tokens
            if event.finish_reason is not FinishReason.RUNNING:
                self.finish_reasons.append(event.finish_reason.name.lower())
            if self.max_log_len:
                kept = self.texts.get(event.choice, b"") + event.text
                self.texts[event.choice] = kept[: _LONGEST_CHARACTER * self.max_log_len]


def begin_generation(scope: Scope, prompt_tokens: int, prompts: Sequence[Sequence[int]] = ()) -> Generation:
    """What the request is about to generate; it will stand in its line of the log.

    Args:
        scope: of the request.
        prompt_tokens: of all prompts.
        prompts: their token ids, for those who want to read them in the log.
    """
    generation = Generation(prompt_tokens, max_log_len=scope["state"].get(_MAX_LOG_LEN, 0), prompts=prompts)
    scope["state"]["generation"] = generation
    return generation


class AccountingMiddleware:
    """Counts and logs every request when it has ended.

    Args:
        app: names requests in ``scope["state"]["request_id"]``.
        metrics: to count in.
        max_log_len: characters of each prompt and of each answer that are logged.
        tokenizer: None: prompts are logged as token ids.
    """

    def __init__(
        self, app: ASGIApp, metrics: HttpMetrics, max_log_len: int = 0, tokenizer: Tokenizer | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._max_log_len = max_log_len
        self._tokenizer = tokenizer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = _CLIENT_GONE

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["state"][_MAX_LOG_LEN] = self._max_log_len
        self._metrics.begin()
        try:
            await self._app(scope, receive, observe)
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", _NO_ROUTE)
            self._metrics.end(scope["method"], route, status, seconds)
            level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
            if logger.isEnabledFor(level):
                fields = _fields(scope, status, started, seconds) | self._texts(scope)
                text = " ".join(f"{name}={value}" for name, value in fields.items())
                logger.log(level, text, extra={"fields": fields})

    def _texts(self, scope: Scope) -> dict[str, object]:
        """What was said, as far as it is to be logged. Lists: their repr is a single line, whatever is in them."""
        generation: Generation | None = scope["state"].get("generation")
        if generation is None or not generation.max_log_len:
            return {}
        length = generation.max_log_len
        texts = [generation.texts[choice].decode(errors="replace")[:length] for choice in sorted(generation.texts)]
        if self._tokenizer is None:
            return {"prompts": [list(prompt[:length]) for prompt in generation.prompts], "texts": texts}
        decode = self._tokenizer.decode
        beginnings = [prompt[: length + _TEXTLESS] for prompt in generation.prompts]
        return {"prompts": [decode(beginning)[:length] for beginning in beginnings], "texts": texts}


def _fields(scope: Scope, status: int, started: float, seconds: float) -> dict[str, object]:
    state = scope.get("state", {})
    fields: dict[str, object] = {
        "request": state.get("request_id", ""),
        "method": scope["method"],
        # As it was sent: a path may hold anything, line breaks included.
        "path": scope["raw_path"].decode("latin-1", "replace") if scope.get("raw_path") else scope["path"],
        "status": status,
        "seconds": round(seconds, 4),
    }
    if tenant := tenant_of(scope):
        fields["key"] = tenant
    generation: Generation | None = state.get("generation")
    if generation is not None:
        fields |= {
            "prompt_tokens": generation.prompt_tokens,
            "cached_tokens": generation.cached_tokens,
            "tokens": generation.tokens,
            "first_token_seconds": None if generation.first is None else round(generation.first - started, 4),
            # Sorted, so that many choices make a short line.
            "finish": ",".join(sorted(set(generation.finish_reasons))) or "none",
        }
    return fields
