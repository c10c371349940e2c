"""From a job to its answer, whole or streamed, and no further than the client listens."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.accounting import begin_generation
from server.api.auth import tenant_of
from server.api.body import ClientGoneError
from server.api.client import EngineClient
from server.api.errors import error_json
from server.api.job import GenerationJob
from server.api.mailbox import ChoiceEvent, Mailbox
from server.api.rendering import DONE, AnswerForm, ChunkRenderer, Envelope, render_answer
from server.api.request_id import name_request
from server.api.sessions import session_of
from server.errors import ApiError, InternalError

logger = logging.getLogger(__name__)

STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Asks reverse proxies not to collect the stream before passing it on.
    (b"x-accel-buffering", b"no"),
]
_OFFLOAD_TOKENS: Final = 512
"""Log-probabilities of so many prompt tokens are written in a thread, so that streams do not stall meanwhile."""
_JSON_HEADERS: Final = [(b"content-type", b"application/json")]


class GenerationAnswer(Response):
    """Submits the job, then answers at once or as a stream. The job is cancelled if the client goes away.

    Args:
        job: what to generate.
        form: that of the route.
        client: the way to the engine.
    """

    def __init__(self, job: GenerationJob, form: AnswerForm, client: EngineClient) -> None:
        super().__init__()
        self._job = job
        self._form = form
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; errors before the response's start are raised."""
        info = self._client.info
        assert info is not None, "a job was made, so the engine is known"
        answer_id = self._form.id_prefix + name_request(scope, self._job.request_id)
        envelope = Envelope(answer_id, int(time.time()), info.fingerprint)
        self._record = begin_generation(scope, sum(map(len, self._job.prompts)), self._job.prompts)
        await while_connected(receive, self._answer(envelope, tenant_of(scope), session_of(scope), send))

    async def _answer(self, envelope: Envelope, tenant: str, session: str | None, send: Send) -> None:
        job = self._job
        # No header is sent before the engine has accepted: a full queue is a proper 503.
        mailbox = await self._client.submit(
            prompts=job.prompts,
            n=job.candidates,
            params=job.params,
            priority=job.priority,
            checkpoint_at=job.checkpoint_at,
            tenant=tenant,
            state=job.state,
            save_state=job.save_state,
            state_name=job.state_name,
            state_ttl=job.state_ttl,
            state_turn=job.state_turn,
            session=session,
        )
        self._record.prompt_tokens += mailbox.context * len(job.prompts)
        async with mailbox:
            await (self._stream if job.stream else self._respond)(mailbox, envelope, send)

    async def _respond(self, mailbox: Mailbox, envelope: Envelope, send: Send) -> None:
        job = self._job
        events: list[list[ChoiceEvent]] = [[] for _ in range(mailbox.num_choices)]
        async for batch in mailbox:
            self._record.note(batch)
            for event in batch:
                events[event.choice].append(event)
        answer = (job, self._form, envelope, events, mailbox.prompt_logprobs, mailbox.context)
        body = await asyncio.to_thread(render_answer, *answer) if self._is_long() else render_answer(*answer)
        headers = [*_JSON_HEADERS, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, mailbox: Mailbox, envelope: Envelope, send: Send) -> None:
        renderer = ChunkRenderer(self._job, self._form, envelope, mailbox.prompt_logprobs, mailbox.context)
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            if opening := renderer.opening():
                await send({"type": "http.response.body", "body": opening, "more_body": True})
            async for batch in mailbox:
                self._record.note(batch)
                if renderer.opens_late and self._is_long():
                    chunks = await asyncio.to_thread(renderer.chunks, batch)
                else:
                    chunks = renderer.chunks(batch)
                if chunks:
                    await send({"type": "http.response.body", "body": chunks, "more_body": not renderer.done})
        except ApiError as error:
            await self._end(send, error)
        except Exception:
            logger.exception("a stream failed")
            await self._end(send, InternalError("The server failed to continue the stream."))

    def _is_long(self) -> bool:
        """Whether the answer carries many log-probabilities of prompts."""
        job = self._job
        return job.params.prompt_logprobs is not None and sum(map(len, job.prompts)) * job.n >= _OFFLOAD_TOKENS

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
