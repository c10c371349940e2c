"""``POST /v1/completions``."""

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.body import ClientGoneError, check_content_type, parse_json, read_body
from server.api.client import ChoiceEvent, EngineClient, EngineStatus, Mailbox
from server.api.errors import error_json
from server.api.rendering import DONE, ChunkRenderer, TokenNames, render_completion
from server.api.schemas import Completion, CompletionRequest, ErrorResponse
from server.api.validation import CompletionJob, CompletionValidator
from server.errors import ApiError, EngineUnavailableError, InternalError
from server.settings import ApiSettings
from server.tokenizer import Tokenizer
from server.types import EngineInfo

logger = logging.getLogger(__name__)

OFFLOAD_BYTES: Final = 16 * 1024
"""Bodies from this size on are parsed and tokenized in a thread, so that streams do not stall meanwhile."""

_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Asks reverse proxies not to collect the stream before passing it on.
    (b"x-accel-buffering", b"no"),
]
_JSON_HEADERS: Final = [(b"content-type", b"application/json")]

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": ErrorResponse, "description": "The request can never succeed as it is; `param` names the field."},
    401: {"model": ErrorResponse, "description": "No API key, or a wrong one."},
    404: {"model": ErrorResponse, "description": "No model of that name is served."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    415: {"model": ErrorResponse, "description": "The body is declared to be something else than plain JSON."},
    500: {"model": ErrorResponse, "description": "The server failed."},
    503: {"model": ErrorResponse, "description": "The queue is full, or the engine cannot serve; see Retry-After."},
}


def completions_router(settings: ApiSettings, client: EngineClient, tokenizer: Tokenizer | None) -> APIRouter:
    """The route, bound to one engine.

    Args:
        settings: served names, limits.
        client: the way to the engine.
        tokenizer: None: only token ids are served.
    """
    names = TokenNames(None if tokenizer is None else tokenizer.token_bytes())
    router = APIRouter()

    @router.post(
        "/v1/completions",
        summary="Complete a text",
        response_model=Completion,
        responses={
            200: {
                "description": "The completion. With `stream`, chunks of the same form as server-sent events, "
                'ended by `data: [DONE]`; an error after the stream\'s start is one event, `data: {"error": ...}`.',
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            },
            **_ERRORS,
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": {"$ref": f"#/components/schemas/{CompletionRequest.__name__}"}}
                },
            }
        },
    )
    async def create_completion(request: Request) -> Response:
        """Continue one or several prompts, each with one or several choices."""
        check_content_type(request)
        info = ready_info(client)
        body = await read_body(request, settings.max_body_bytes)
        validator = CompletionValidator(settings.served_model_names, info, tokenizer)
        if len(body) < OFFLOAD_BYTES:
            job = _prepare(validator, body)
        else:
            job = await asyncio.to_thread(_prepare, validator, body)
        return CompletionAnswer(job, client, names)

    return router


def ready_info(client: EngineClient) -> EngineInfo:
    """What the engine told of itself.

    Raises:
        EngineUnavailableError: it does not take requests now.
    """
    info = client.info
    if client.status is not EngineStatus.READY or info is None:
        raise EngineUnavailableError(f"The engine is {client.status.name.lower()}.")
    return info


def _prepare(validator: CompletionValidator, body: bytes) -> CompletionJob:
    return validator.job(parse_json(body))


class CompletionAnswer(Response):
    """Submits the job, then answers at once or as a stream. The job is cancelled if the client goes away.

    Args:
        job: what to generate.
        client: the way to the engine.
        names: how to write tokens.
    """

    def __init__(self, job: CompletionJob, client: EngineClient, names: TokenNames) -> None:
        super().__init__()
        self._job = job
        self._client = client
        self._names = names
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; errors before the response's start are raised."""
        await while_connected(receive, self._answer(send))

    async def _answer(self, send: Send) -> None:
        job = self._job
        # No header is sent before the engine has accepted: a full queue is a proper 503.
        async with await self._client.submit(prompts=job.prompts, n=job.n, params=job.params) as mailbox:
            await (self._stream(mailbox, send) if job.stream else self._respond(mailbox, send))

    async def _respond(self, mailbox: Mailbox, send: Send) -> None:
        events: list[list[ChoiceEvent]] = [[] for _ in range(self._job.num_choices)]
        async for batch in mailbox:
            for event in batch:
                events[event.choice].append(event)
        body = render_completion(self._job, self._id, self._created, events, self._names)
        headers = [*_JSON_HEADERS, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, mailbox: Mailbox, send: Send) -> None:
        renderer = ChunkRenderer(self._job, self._id, self._created, self._names)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            if opening := renderer.opening():
                await send({"type": "http.response.body", "body": opening, "more_body": True})
            async for batch in mailbox:
                if chunks := renderer.chunks(batch):
                    await send({"type": "http.response.body", "body": chunks, "more_body": not renderer.done})
        except ApiError as error:
            await self._end(send, error)
        except Exception:
            logger.exception("a stream failed")
            await self._end(send, InternalError("The server failed to continue the stream."))

    @staticmethod
    async def _end(send: Send, error: ApiError) -> None:
        await send({"type": "http.response.body", "body": b"data: %b\n\n%b" % (error_json(error), DONE)})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine, and cancel it as soon as the client goes away.

    Args:
        receive: the ASGI channel, from which the request's body has been read.
        work: what to run; its exceptions are raised.

    Raises:
        ClientGoneError: the client left first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        task.result()
    finally:
        for future in (task, watcher):
            future.cancel()
        await asyncio.wait((task, watcher))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
