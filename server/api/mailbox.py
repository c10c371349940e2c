"""What has arrived of one request's answer, until its reader takes it."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

import msgspec

from server.errors import ApiError, EngineUnavailableError, InternalError, StateNotSavedError
from server.types import FinishReason, PromptLogprobs, StateInfo, StepOutput, TokenLogprobs

_REASONS = {int(reason): reason for reason in FinishReason}


class ChoiceEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to one choice since the mailbox was last read.

    Attributes:
        choice: ``i * n + j`` for the j-th answer to prompt i.
        token_ids: new tokens; empty in an event that only ends the choice.
        text: new text as UTF-8, possibly cut inside a character.
        logprobs: one per token id if the request asked for them, else empty.
        finish_reason: RUNNING, or why the choice ended: no event of this choice follows.
        stop_reason: the stop string or stop token id that ended the choice.
        cached_tokens: tokens of the prompt that had been absorbed for an earlier request; in one event per prompt.
        state: the saved state of a choice that has ended.
    """

    choice: int
    token_ids: list[int]
    text: bytes
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason
    stop_reason: int | str | None
    cached_tokens: int = 0
    state: StateInfo | None = None


class _Pending:
    """What arrived for one choice since the mailbox was last read."""

    __slots__ = ("cached_tokens", "finish_reason", "logprobs", "state", "stop_reason", "texts", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.texts: list[bytes] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason = FinishReason.RUNNING
        self.stop_reason: int | str | None = None
        self.cached_tokens = 0
        self.state: StateInfo | None = None

    def event(self, choice: int) -> ChoiceEvent:
        return ChoiceEvent(
            choice=choice,
            token_ids=self.token_ids,
            text=self.texts[0] if len(self.texts) == 1 else b"".join(self.texts),
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cached_tokens=self.cached_tokens,
            state=self.state,
        )


class Mailbox:
    """The events of one request, read with ``async for``; made by :meth:`server.api.client.EngineClient.submit`.

    Iteration yields lists of :class:`ChoiceEvent` and ends once every choice has ended. A slow reader
    gets fewer, longer lists: what arrived for a choice meanwhile is joined into one event.

    Raises (from the iteration):
        EngineUnavailableError: the engine died, was reset or is shutting down, or too much was left unread.
        InternalError: the engine could not finish a choice.

    Attributes:
        num_choices: ``len(prompts) * n``.
        context: tokens of the saved state that every prompt continues.
        absorbed: of a prompt that comes in pieces: tokens absorbed so far, those of a saved state included.
        prompt_logprobs: of the prompts' tokens, if asked for, in pieces, by the first choice of each prompt. Complete
            for a prompt when the first event of one of its choices is read.
        unread: tokens that have arrived since the last reading.
    """

    __slots__ = (
        "_accepted",
        "_closed",
        "_error",
        "_on_close",
        "_on_extend",
        "_open",
        "_pending",
        "_waiter",
        "absorbed",
        "context",
        "num_choices",
        "prompt_logprobs",
        "unread",
    )

    def __init__(
        self,
        num_choices: int,
        accepted: "asyncio.Future[None]",
        on_close: Callable[[bool], None],
        on_extend: Callable[[Sequence[int], bool], None],
    ) -> None:
        self.num_choices = num_choices
        self.absorbed = 0
        self._on_extend = on_extend
        self.context = 0
        self.prompt_logprobs: dict[int, list[PromptLogprobs]] = {}
        self._open = set(range(num_choices))
        self._accepted = accepted
        self._pending: dict[int, _Pending] = {}
        self.unread = 0
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_close = on_close
        self._closed = False

    def __aiter__(self) -> "Mailbox":
        return self

    async def __anext__(self) -> list[ChoiceEvent]:
        while not self._pending:
            self._check()
            if not self._open or self._closed:
                raise StopAsyncIteration
            await self._change()
        pending, self._pending = self._pending, {}
        self.unread = 0
        return [row.event(choice) for choice, row in pending.items()]

    def extend(self, tokens: Sequence[int], *, last: bool) -> None:
        """Send more of a prompt that comes in pieces.

        Args:
            tokens: at least one, if they are the last.
            last: whether the prompt ends with these.

        Raises:
            EngineUnavailableError: the engine does not read, is dead or has been reset.
        """
        self._check()
        self._on_extend(tokens, last)

    async def progress(self) -> bool:
        """Wait until more of a prompt that comes in pieces has been absorbed, or the request has ended; whether it has.

        Raises:
            EngineUnavailableError, InternalError: as the iteration does.
        """
        absorbed = self.absorbed
        while self.absorbed == absorbed and self._open:
            self._check()
            await self._change()
        self._check()
        return not self._open

    def _check(self) -> None:
        if self._error is not None:
            # One error may end many requests; each shows its own traceback.
            raise self._error.with_traceback(None)

    async def _change(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def __aenter__(self) -> "Mailbox":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the request at the engine unless it has ended. Idempotent."""
        if not self._closed:
            self._closed = True
            self._pending = {}
            self._on_close(bool(self._open))
            self.wake()

    # The rest is what :class:`server.api.client.EngineClient` calls.

    def accept(self, context: int) -> None:
        """The engine has accepted the request, behind a saved state of so many tokens."""
        self.context = context
        if not self._accepted.done():
            self._accepted.set_result(None)

    def take(self, message: StepOutput, row: int) -> None:
        """Add a row of an engine message; a choice that has ended takes no more."""
        choice = message.choices[row]
        if choice not in self._open:
            return
        reason = _REASONS[message.finish_reasons[row]]
        if reason is not FinishReason.RUNNING:
            self._open.discard(choice)
            if row in message.unsaved:
                self.fail(StateNotSavedError(message.unsaved[row]))
                return
            if reason is FinishReason.ERROR:
                self.fail(InternalError(message.errors.get(row, "the engine could not finish the request")))
                return
            if reason is FinishReason.CANCELLED:
                self.fail(EngineUnavailableError("the engine cancelled the request"))
                return
        pending = self._pending.get(choice)
        if pending is None:
            pending = self._pending[choice] = _Pending()
        token_id = message.token_ids[row]
        if token_id >= 0:
            pending.token_ids.append(token_id)
            self.unread += 1
        pending.texts.append(message.texts[row])
        pending.finish_reason = reason
        if row in message.logprobs:
            pending.logprobs.append(message.logprobs[row])
        if row in message.stop_reasons:
            pending.stop_reason = message.stop_reasons[row]
        if row in message.cached_tokens:
            pending.cached_tokens = message.cached_tokens[row]
        if row in message.states:
            pending.state = message.states[row]

    def fail(self, error: ApiError) -> None:
        """End the iteration with this error, after what has arrived so far."""
        if self._error is None:
            self._error = error
        if not self._accepted.done():
            self._accepted.set_exception(self._error)
        self.wake()

    def wake(self) -> None:
        """Let the reader look at what has arrived."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def ended(self) -> bool:
        """Whether every choice has ended."""
        return not self._open
