"""What is noted of every request: a line in the log, and the HTTP metrics. Never a word of a prompt or of an answer."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.auth import tenant_of
from server.api.client import ChoiceEvent
from server.metrics import HttpMetrics
from server.types import FinishReason

logger = logging.getLogger(__name__)

_CLIENT_GONE: Final = 499
"""Status of requests whose client left before the answer began, as nginx writes it."""
_NO_ROUTE: Final = "(none)"
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
    """

    prompt_tokens: int
    cached_tokens: int = 0
    tokens: int = 0
    first: float | None = None
    finish_reasons: list[str] = field(default_factory=list)

    def note(self, events: Iterable[ChoiceEvent]) -> None:
        """Count what has just arrived."""
        if self.first is None:
            self.first = time.monotonic()
        for event in events:
            self.tokens += len(event.token_ids)
            self.cached_tokens += event.cached_tokens
            if event.finish_reason is not FinishReason.RUNNING:
                self.finish_reasons.append(event.finish_reason.name.lower())


def begin_generation(scope: Scope, prompt_tokens: int) -> Generation:
    """What the request is about to generate; it will stand in its line of the log."""
    generation = Generation(prompt_tokens)
    scope["state"]["generation"] = generation
    return generation


class AccountingMiddleware:
    """Counts and logs every request when it has ended.

    Args:
        app: names requests in ``scope["state"]["request_id"]``.
        metrics: to count in.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

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

        self._metrics.begin()
        try:
            await self._app(scope, receive, observe)
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", _NO_ROUTE)
            self._metrics.end(scope["method"], route, status, seconds)
            level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
            if logger.isEnabledFor(level):
                fields = _fields(scope, status, started, seconds)
                text = " ".join(f"{name}={value}" for name, value in fields.items())
                logger.log(level, text, extra={"fields": fields})


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
