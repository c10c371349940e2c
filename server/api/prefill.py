"""``POST /v1/states/prefill``: reads a text of any length, in memory that does not grow with it, saves its state."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.accounting import Generation, begin_generation
from server.api.auth import tenant_of
from server.api.body import IDLE_SECONDS, ClientGoneError, check_content_type, check_text_type, media_type
from server.api.checks import check_vocabulary, invalid, parse_as, served_name
from server.api.client import EngineClient
from server.api.completion_validation import CompletionValidator
from server.api.errors import ErrorAnswer, error_json
from server.api.generation import STREAM_HEADERS, while_connected
from server.api.mailbox import Mailbox
from server.api.protocol import PEER
from server.api.rendering import DONE, to_json
from server.api.routing import errors, event_stream, prefill_body, read_json, unique_query
from server.api.schemas.states import PrefillProgress, PrefillQuery, PrefillRequest, State
from server.api.states import state_of
from server.api.structured import Grammars
from server.api.text_stream import TextTokens
from server.component_settings import ApiSettings
from server.errors import ApiError, InternalError, InvalidRequestError, RequestTimeoutError
from server.tokenizer import Tokenizer
from server.types import EngineInfo, SamplingParams, StateInfo

WINDOW: Final = 1 << 14
"""Tokens that the engine may have beside those that it has absorbed, before more are sent to it."""
_LOOK_SECONDS: Final = 0.5
"""How often to see whether a client is still there whose text is not being read."""
_PROGRESS_SECONDS: Final = 0.1
"""Least time between two events of a stream."""
_LEAST_RATE: Final = 2.0
"""Bytes of a text that a client has to send per second, but for pauses of IDLE_SECONDS in all between. Whoever types or
speaks is faster; a trickle would hold its place, and what the engine has absorbed of it, for ever."""
_TEXT_TYPES: Final = frozenset({"text/plain", "application/octet-stream"})

Windows = AsyncIterator[tuple[list[int], bool]]
"""Token ids of a text in pieces of at most WINDOW, and whether they are the last: these are at least one, unless the
whole text has none."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What is to become of a text.

    Attributes:
        state: id or name of the saved state that it continues.
        name: of the new state.
        ttl: seconds for which that is kept; None: as the engine likes.
        stream: whether to tell of its progress.
    """

    state: str | None
    name: str | None
    ttl: int | None
    stream: bool


def prefill_router(
    settings: ApiSettings, client: EngineClient, tokenizer: Tokenizer | None, grammars: Grammars
) -> APIRouter:
    """The route, bound to one engine.

    Args:
        settings: limits.
        client: the way to the engine.
        tokenizer: None: only token ids are served.
        grammars: made with the same tokenizer.
    """
    router = APIRouter()
    names = settings.served_model_names

    @router.post(
        "/v1/states/prefill",
        summary="Read a text and save its state",
        response_model=State,
        response_description="The new state.",
        status_code=201,
        responses={
            200: {
                "description": "With `stream`: `PrefillProgress` again and again, then the new `State`, as server-sent "
                'events ended by `data: [DONE]`; an error is one event, `data: {"error": ...}`.',
                "content": event_stream(PrefillProgress, State),
            },
            **errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 507),
        },
        openapi_extra=prefill_body(PrefillRequest, PrefillQuery),
    )
    async def prefill_state(request: Request) -> Response:
        """Absorb a text, alone or behind a saved state, and generate nothing. A text may also be the body itself, of
        any length, sent as it comes to be (`text/plain` or `application/octet-stream`, UTF-8)."""
        info = client.require_ready()
        query = parse_as(PrefillQuery, unique_query(request))
        if media_type(request) in _TEXT_TYPES:
            check_text_type(request)
            if tokenizer is None:
                raise InvalidRequestError("This server runs without a tokenizer: send token ids, as JSON.")
            served_name(query.model, names)
            if query.state is not None and query.add_special_tokens:
                raise invalid("add_special_tokens", "is not possible together with 'state': they are for beginnings")
            tokens = TextTokens(
                tokenizer,
                add_special_tokens=query.state is None and query.add_special_tokens is not False,
                continues=query.state is not None,
            )
            reading = Reading(query.state, query.name, query.ttl, bool(query.stream))
            return PrefillAnswer(reading, client, info, tokens)
        check_content_type(request)
        if given := query.model_dump(exclude={"stream"}, exclude_none=True):
            raise invalid(next(iter(given)), "belongs into the JSON body, not behind the path")
        validator = CompletionValidator(names, info, tokenizer, grammars)

        def read(body: dict[str, Any]) -> tuple[PrefillRequest, list[int]]:
            fields = parse_as(PrefillRequest, body)
            return fields, validator.job(_completion(fields)).prompts[0]

        fields, ids = await read_json(request, settings.max_body_bytes, read)
        stream = bool(query.stream if fields.stream is None else fields.stream)
        return PrefillAnswer(Reading(fields.state, fields.name, fields.ttl, stream), client, info, ids)

    return router


class PrefillAnswer(Response):
    """Reads a text, then answers with its state; with ``stream`` also with its progress, as events.

    The text is taken from the client no faster than the engine absorbs it, and nothing is kept of it here but a window.
    If the client goes away, the engine forgets it.

    Args:
        reading: what is to become of it.
        client: the way to the engine.
        info: the engine's limits.
        text: its token ids; or what makes them of the request's body, which has not been read yet.
    """

    def __init__(self, reading: Reading, client: EngineClient, info: EngineInfo, text: list[int] | TextTokens) -> None:
        super().__init__()
        self._reading = reading
        self._client = client
        self._info = info
        self._text = text
        self._started = self._told = 0.0
        self._peer_left: Callable[[], bool] = lambda: False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; errors before the response's start are raised."""
        record = begin_generation(scope, 0)
        self._peer_left = scope.get("extensions", {}).get(PEER, {}).get("has_left", lambda: False)
        tenant = tenant_of(scope)
        if isinstance(self._text, list):
            windows = _in_windows(_at_once(self._text))
            await while_connected(receive, self._read(windows, tenant, record, send, _plainly))
            return
        body = _Body(receive)
        try:
            windows = _in_windows(_tokenized(body, self._text))
            # What follows the last byte of the body is a disconnect, and nothing else.
            await self._read(windows, tenant, record, send, lambda rest: while_connected(receive, rest))
        except ApiError as error:
            await ErrorAnswer(error, body_unread=not body.ended)(scope, receive, send)

    async def _read(
        self,
        windows: Windows,
        tenant: str,
        record: Generation,
        send: Send,
        attend: "Attend",
    ) -> None:
        reading = self._reading
        ids, last = await anext(windows)
        if not ids and reading.state is None:
            raise invalid("prompt", "holds a text without a single token")
        self._check(ids, len(ids))
        mailbox = await self._client.submit(
            prompts=[ids],
            n=1,
            params=SamplingParams(max_tokens=0),
            tenant=tenant,
            state=reading.state,
            save_state=True,
            state_name=reading.name,
            state_ttl=reading.ttl,
            more=not last,
        )
        self._started = time.monotonic()
        async with mailbox:
            record.prompt_tokens = mailbox.context + len(ids)
            if not reading.stream:
                saved = await self._feed(mailbox, windows, last, record, None, attend)
                body = to_json(state_of(saved).model_dump())
                headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
                await send({"type": "http.response.start", "status": 201, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            try:
                saved = await self._feed(mailbox, windows, last, record, send, attend)
                end = b"data: %b\n\n" % to_json(state_of(saved).model_dump())
            except ApiError as error:
                end = b"data: %b\n\n" % error_json(error)
            await send({"type": "http.response.body", "body": end + DONE})

    async def _feed(
        self,
        mailbox: Mailbox,
        windows: Windows,
        last: bool,
        record: Generation,
        send: Send | None,
        attend: "Attend",
    ) -> StateInfo:
        """Send the engine the windows one by one, and tell of its progress; the saved state."""
        while not last:
            # Not the next window before the last one but one has been absorbed.
            while record.prompt_tokens - mailbox.absorbed > WINDOW:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await mailbox.progress()
                if self._peer_left():
                    raise ClientGoneError
                await self._tell(mailbox, send)
            ids, last = await anext(windows)
            record.prompt_tokens += len(ids)
            self._check(ids, record.prompt_tokens)
            mailbox.extend(ids, last=last)
        saved: list[StateInfo] = []

        async def wait() -> None:
            while not await mailbox.progress():
                await self._tell(mailbox, send)
            async for events in mailbox:
                record.note(events)
                saved.extend(event.state for event in events if event.state is not None)

        await attend(wait())
        if not saved:
            raise InternalError("The engine did not save the state.")
        return saved[0]

    def _check(self, ids: list[int], length: int) -> None:
        """Refuse tokens that the model does not have, and more of them than it takes."""
        check_vocabulary("prompt", ids, self._info.vocab_size)
        limit = self._info.max_model_len
        if limit is not None and length > limit:
            raise InvalidRequestError(
                f"Invalid 'prompt': has more than the {limit} tokens that a sequence may have (--max-model-len).",
                param="prompt",
                code="context_length_exceeded",
            )

    async def _tell(self, mailbox: Mailbox, send: Send | None) -> None:
        now = time.monotonic()
        if send is None or now < self._told + _PROGRESS_SECONDS:
            return
        self._told = now
        absorbed = max(0, mailbox.absorbed - mailbox.context)
        progress = PrefillProgress(
            num_tokens=mailbox.context + absorbed, tokens_per_second=round(absorbed / (now - self._started), 1)
        )
        event = b"data: %b\n\n" % to_json(progress.model_dump())
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except TimeoutError:
            # A client that does not read would hold its place for ever.
            raise ClientGoneError from None


Attend = Callable[[Coroutine[Any, Any, None]], Awaitable[None]]


async def _plainly(work: Coroutine[Any, Any, None]) -> None:
    await work


def _completion(request: PrefillRequest) -> dict[str, Any]:
    """The completion that reads the same prompt: what is wrong with one is wrong with the other."""
    if len(request.prompt) > 1:
        raise invalid("prompt", "must be one text or one list of token ids")
    fields = request.model_dump(exclude={"name", "ttl", "stream"}, exclude_none=True)
    return {**fields, "max_tokens": 0, "save_state": True}


class _Body:
    """A request's body, piece by piece.

    Attributes:
        ended: whether all of it has been read.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.ended = False

    async def pieces(self) -> AsyncIterator[bytes]:
        """As they come.

        Raises:
            ClientGoneError: the client left before the end.
            RequestTimeoutError: nothing comes, or next to nothing.
        """
        # What the engine or the tokenizer takes is not the client's time.
        left = IDLE_SECONDS
        while not self.ended:
            begun = time.monotonic()
            try:
                async with asyncio.timeout(left):
                    message = await self._receive()
            except TimeoutError:
                raise RequestTimeoutError("The text comes too slowly, or not at all.") from None
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            self.ended = not message.get("more_body", False)
            piece = message.get("body", b"")
            left = min(left - (time.monotonic() - begun) + len(piece) / _LEAST_RATE, IDLE_SECONDS)
            yield piece


async def _at_once(ids: list[int]) -> AsyncIterator[list[int]]:
    yield ids


async def _tokenized(body: _Body, tokens: TextTokens) -> AsyncIterator[list[int]]:
    """In a thread: streams must not stall meanwhile."""
    async for piece in body.pieces():
        yield await asyncio.to_thread(tokens.feed, piece)
    yield await asyncio.to_thread(tokens.finish) if tokens.num_bytes else []


async def _in_windows(source: AsyncIterator[list[int]]) -> Windows:
    pending: list[int] = []
    async for ids in source:
        pending += ids
        while len(pending) > WINDOW:
            yield pending[:WINDOW], False
            del pending[:WINDOW]
    yield pending, True
