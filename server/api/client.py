"""The API process's view of the engine: submit a request, read its choices' events, cancel it.

One message of the engine carries a token for each running choice. It is taken apart here, row by row,
into the mailboxes of the waiting requests; each mailbox wakes its reader at most once per wake-up of
the channel, however many rows arrived, and no task exists per token.
"""

import asyncio
import enum
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import msgspec

from server.errors import (
    ApiError,
    EngineAsleepError,
    EngineUnavailableError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    RateLimitError,
    StateNotAbsorbedError,
    StateNotSavedError,
    StatesFullError,
    StatesLimitError,
)
from server.ipc import ClientChannel
from server.types import (
    Cancel,
    ClientReset,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Extend,
    FinishReason,
    GenerateRequest,
    Hello,
    PromptLogprobs,
    RefusalReason,
    SamplingParams,
    StateAction,
    StateCommand,
    StateInfo,
    StepOutput,
    TokenLogprobs,
    pack_tokens,
)

_CANCEL_RETRY_SECONDS = 0.05
_QUIET_SECONDS = 0.02
_MAX_UNREAD_TOKENS = 1 << 16
"""What a request may leave unread before it is ended: a client that never reads must not hold a slot for ever."""
_REFUSALS: dict[RefusalReason, Callable[[str], ApiError]] = {
    RefusalReason.QUEUE_FULL: QueueFullError,
    RefusalReason.TENANT_LIMIT: RateLimitError,
    RefusalReason.FAILED: InternalError,
    RefusalReason.UNKNOWN_STATE: partial(NotFoundError, param="state", code="state_not_found"),
    RefusalReason.STATES_FULL: StatesFullError,
    RefusalReason.STATES_LIMIT: StatesLimitError,
    RefusalReason.NOT_WRITTEN: StateNotSavedError,
    RefusalReason.NOT_ABSORBED: StateNotAbsorbedError,
    RefusalReason.BAD_FILE: partial(InvalidRequestError, param="body"),
    RefusalReason.STATES_OFF: partial(InvalidRequestError, param="state", code="states_off"),
    RefusalReason.TOO_LONG: partial(InvalidRequestError, param="state", code="context_length_exceeded"),
}
_REASONS = {int(reason): reason for reason in FinishReason}


class EngineStatus(enum.Enum):
    """Whether requests can be submitted; only READY takes any."""

    STARTING = "starting"
    READY = "ready"
    FALLING_ASLEEP = "falling asleep"
    """What runs is being ended."""
    ASLEEP = "asleep"
    DRAINING = "draining"
    DEAD = "dead"


_UNAVAILABLE = {
    EngineStatus.DRAINING: "The server is shutting down.",
    EngineStatus.DEAD: "The engine died and is not yet back.",
}


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
    """The events of one request, read with ``async for``; made by :meth:`EngineClient.submit`.

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
    """

    __slots__ = (
        "_accepted",
        "_closed",
        "_error",
        "_on_close",
        "_on_extend",
        "_open",
        "_pending",
        "_unread",
        "_waiter",
        "absorbed",
        "context",
        "num_choices",
        "prompt_logprobs",
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
        self._unread = 0
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
        self._unread = 0
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
            self._wake()

    # The rest is called by EngineClient.

    def _accept(self, context: int) -> None:
        self.context = context
        if not self._accepted.done():
            self._accepted.set_result(None)

    def _take(self, message: StepOutput, row: int) -> None:
        """Add a row of an engine message; a choice that has ended takes no more."""
        choice = message.choices[row]
        if choice not in self._open:
            return
        reason = _REASONS[message.finish_reasons[row]]
        if reason is not FinishReason.RUNNING:
            self._open.discard(choice)
            if row in message.unsaved:
                self._fail(StateNotSavedError(message.unsaved[row]))
                return
            if reason is FinishReason.ERROR:
                self._fail(InternalError(message.errors.get(row, "the engine could not finish the request")))
                return
            if reason is FinishReason.CANCELLED:
                self._fail(EngineUnavailableError("the engine cancelled the request"))
                return
        pending = self._pending.get(choice)
        if pending is None:
            pending = self._pending[choice] = _Pending()
        token_id = message.token_ids[row]
        if token_id >= 0:
            pending.token_ids.append(token_id)
            self._unread += 1
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

    def _fail(self, error: ApiError) -> None:
        """End the iteration with this error, after what has arrived so far."""
        if self._error is None:
            self._error = error
        if not self._accepted.done():
            self._accepted.set_exception(self._error)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def _ended(self) -> bool:
        return not self._open


class EngineClient:
    """Connects an API process to the engine process.

    Args:
        address: ``ipc://`` path that the engine binds, now or later.

    Attributes:
        info: what the engine said of itself; None until it is ready.
        stats: the newest snapshot of the engine's figures.
        engine_deaths: of engines since the server's start.
        wake_failure: why no engine started when the server was last woken; None: one did.
        transfers: folder for files that pass between the engine and the API processes; it need not be there.
    """

    def __init__(self, address: str) -> None:
        self.info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        self.engine_deaths = 0
        self.wake_failure: str | None = None
        self._status = EngineStatus.STARTING
        self._status_changed = asyncio.Event()
        self.transfers = Path(address.removeprefix("ipc://")).with_name("transfers")
        self._channel = ClientChannel(address, self._receive)
        self._mailboxes: dict[int, Mailbox] = {}
        self._commands: dict[int, asyncio.Future[list[StateInfo]]] = {}
        self._ids = itertools.count(1)
        self._cancels: list[int] = []
        self._cancel_timer: asyncio.Handle | None = None

    @property
    def status(self) -> EngineStatus:
        """Whether requests can be submitted."""
        return self._status

    @status.setter
    def status(self, status: EngineStatus) -> None:
        self._status = status
        self._status_changed.set()
        self._status_changed = asyncio.Event()

    async def start(self) -> None:
        """Connect and introduce this process; returns at once, the engine answers when it is ready."""
        self._channel.start(asyncio.get_running_loop())
        self._channel.send(Hello())

    async def close(self) -> None:
        """Fail what is open and disconnect."""
        self.fail_all(EngineUnavailableError("the server is shutting down"))
        self._flush_cancels()
        if self._cancel_timer is not None:
            self._cancel_timer.cancel()
        self._channel.close()

    async def wait_for(self, *wanted: EngineStatus) -> EngineStatus:
        """Return the status once it is one of these."""
        while self.status not in wanted:
            await self._status_changed.wait()
        return self.status

    async def submit(
        self,
        *,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        tenant: str,
        priority: int = 0,
        checkpoint_at: tuple[int, ...] = (),
        state: str | None = None,
        save_state: bool = False,
        state_name: str | None = None,
        state_ttl: float | None = None,
        state_turn: str | None = None,
        session: str | None = None,
        more: bool = False,
    ) -> Mailbox:
        """Hand a request to the engine and wait until it is queued there.

        A caller that is cancelled while it waits cancels the request at the engine.

        Args:
            prompts: token ids, at least one prompt, and one id in each if no state is continued; validated by the
                caller.
            n: answers to each prompt.
            tenant: whose request it is; see :func:`server.api.auth.tenant_of`.
            priority: lower values are served first, among requests of one tenant.
            checkpoint_at: positions within every prompt at which to park its state.
            state: id or name of the saved state that every prompt continues.
            save_state: whether to save each choice's state at its end.
            state_name: of the state to be saved; only with one choice.
            state_ttl: seconds for which it is kept; None: as the engine likes.
            state_turn: the role of the chat message within which the transcripts will end; None: of none.
            session: names the conversation that it is a part of.
            more: whether the prompt, a single one that is only read, goes on with :meth:`Mailbox.extend`.

        Raises:
            NotFoundError: there is no such state.
            InvalidRequestError: the state and a prompt are too long together, or the engine parks no states.
            StatesFullError, StatesLimitError: no state can be saved.
            RateLimitError: the tenant has as many choices waiting and running as it may.
            QueueFullError: too many wait already.
            EngineUnavailableError: the engine is starting, draining, dead or does not read.
        """
        self.require_ready()
        request = GenerateRequest(
            request_id=next(self._ids),
            prompts=tuple(pack_tokens(prompt) for prompt in prompts),
            n=n,
            params=params,
            arrived=time.monotonic(),
            priority=priority,
            checkpoint_at=checkpoint_at,
            tenant=tenant,
            state=state,
            save_state=save_state,
            state_name=state_name,
            state_ttl=state_ttl,
            state_turn=state_turn,
            session=session,
            more=more,
        )
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mailbox = Mailbox(
            request.num_choices,
            accepted,
            lambda unfinished: self._forget(request.request_id, unfinished),
            lambda tokens, last: self._extend(request.request_id, tokens, last),
        )
        if not self._channel.send(request):
            raise EngineUnavailableError("the engine does not read its requests")
        self._mailboxes[request.request_id] = mailbox
        try:
            await accepted
        except BaseException:
            mailbox.close()
            raise
        return mailbox

    async def command(
        self,
        action: StateAction,
        tenant: str,
        *,
        state: str = "",
        name: str | None = None,
        ttl: float | None = None,
        path: Path | None = None,
        convert: bool = False,
    ) -> list[StateInfo]:
        """Do something about a tenant's saved states; those that it was about.

        Args:
            action: what to do.
            tenant: whose states; see :func:`server.api.auth.tenant_of`.
            state: id or name.
            name: of the new one.
            ttl: seconds for which that is kept; None: as the engine likes.
            path: of the file that is to be written or read.
            convert: whether numbers of that may be rounded.

        Raises:
            NotFoundError: there is no such state.
            InvalidRequestError: the engine parks no states.
            StatesFullError, StatesLimitError: no more states can be kept.
            StateNotSavedError: the disk does not take it.
            StateNotAbsorbedError: the state has to be absorbed again before it can be written.
            EngineUnavailableError: the engine is starting, draining, dead or does not read.
        """
        self.require_ready()
        request_id = next(self._ids)
        command = StateCommand(
            request_id=request_id,
            tenant=tenant,
            action=action,
            state=state,
            name=name,
            ttl=ttl,
            path="" if path is None else str(path),
            convert=convert,
        )
        told: asyncio.Future[list[StateInfo]] = asyncio.get_running_loop().create_future()
        if not self._channel.send(command):
            raise EngineUnavailableError("the engine does not read its requests")
        self._commands[request_id] = told
        try:
            return await told
        finally:
            del self._commands[request_id]

    def drain(self) -> None:
        """Take no new requests; running ones go on."""
        if self.status is not EngineStatus.DEAD:
            self.status = EngineStatus.DRAINING

    def fail_all(self, error: ApiError) -> None:
        """End every open request with this error and cancel it at the engine."""
        for request_id, mailbox in tuple(self._mailboxes.items()):
            mailbox._fail(error)
            self._forget(request_id, unfinished=True)
        for command in self._commands.values():
            if not command.done():
                command.set_exception(error)

    async def fall_asleep(self, seconds: float) -> None:
        """Take no new requests until another engine is there; running ones may finish within so many seconds."""
        if self.status is EngineStatus.READY:
            self.status = EngineStatus.FALLING_ASLEEP
        deadline = time.monotonic() + seconds
        while (self._mailboxes or self._commands) and time.monotonic() < deadline:
            await asyncio.sleep(_QUIET_SECONDS)
        self.fail_all(EngineAsleepError("the engine was sent to sleep while it worked on this request"))

    def engine_asleep(self, failure: str | None) -> None:
        """Note that the engine has ended on purpose; what it said of its load holds no longer.

        Args:
            failure: why the one that somebody asked for did not start; None: nobody asked.
        """
        self.wake_failure = failure
        if self.status is not EngineStatus.DRAINING:
            self.status = EngineStatus.ASLEEP
        self.stats = None
        self._cancels.clear()

    def engine_died(self, deaths: int) -> None:
        """End every open request, refuse new ones.

        Args:
            deaths: of engines since the server's start, this one included.
        """
        self.engine_deaths = deaths
        if self.status is not EngineStatus.DRAINING:
            self.status = EngineStatus.DEAD
        self.fail_all(EngineUnavailableError("the engine died while it worked on this request"))
        self._cancels.clear()

    def reconnect(self, address: str) -> None:
        """Turn to another engine, after :meth:`engine_died` or :meth:`engine_asleep`; it answers when it is ready.

        Args:
            address: ``ipc://`` path that it binds, now or later.
        """
        self._channel.close(linger=0)
        self._channel = ClientChannel(address, self._receive)
        if self.status in (EngineStatus.DEAD, EngineStatus.ASLEEP):
            self.status = EngineStatus.STARTING
        self._channel.start(asyncio.get_running_loop())
        self._channel.send(Hello())

    def require_ready(self) -> EngineInfo:
        """What the engine told of itself.

        Raises:
            EngineUnavailableError: it takes no requests now.
        """
        if self.status is EngineStatus.READY and self.info is not None:
            return self.info
        if self.status in (EngineStatus.FALLING_ASLEEP, EngineStatus.ASLEEP):
            raise EngineAsleepError("The engine is asleep; POST /wake_up wakes it.")
        raise EngineUnavailableError(_UNAVAILABLE.get(self.status, "The engine is still loading the model."))

    def _receive(self, messages: list[EngineMessage]) -> None:
        touched: dict[int, Mailbox] = {}
        for message in messages:
            if isinstance(message, StepOutput):
                self._receive_step(message, touched)
            elif isinstance(message, EngineInfo):
                self.info = message
                if self.status is EngineStatus.STARTING:
                    self.status = EngineStatus.READY
            else:
                self._receive_reset(message)
        for request_id, mailbox in touched.items():
            mailbox._wake()
            if mailbox._ended:
                self._mailboxes.pop(request_id, None)
            elif mailbox._unread > _MAX_UNREAD_TOKENS:
                mailbox._fail(EngineUnavailableError("the client reads too slowly"))
                self._forget(request_id, unfinished=True)

    def _receive_step(self, message: StepOutput, touched: dict[int, Mailbox]) -> None:
        if message.stats is not None:
            self.stats = message.stats
        mailboxes = self._mailboxes
        for request_id in message.accepted:
            if request_id in mailboxes:
                mailboxes[request_id]._accept(message.contexts.get(request_id, 0))
        for request_id, refusal in message.rejected.items():
            error = _REFUSALS[refusal.reason](refusal.message)
            error.code = refusal.code or error.code
            if request_id in mailboxes:
                mailboxes.pop(request_id)._fail(error)
            elif (command := self._commands.get(request_id)) is not None and not command.done():
                command.set_exception(error)
        for request_id, states in message.states_told.items():
            if (command := self._commands.get(request_id)) is not None and not command.done():
                command.set_result(states)
        for request_id, choice, logprobs in message.prompt_logprobs:
            mailbox = mailboxes.get(request_id)
            if mailbox is not None:
                mailbox.prompt_logprobs.setdefault(choice, []).append(logprobs)
        for request_id, absorbed in message.progress.items():
            mailbox = mailboxes.get(request_id)
            if mailbox is not None:
                mailbox.absorbed = absorbed
                touched[request_id] = mailbox
        for row, request_id in enumerate(message.request_ids):
            mailbox = mailboxes.get(request_id)
            if mailbox is not None:
                mailbox._take(message, row)
                touched[request_id] = mailbox

    def _receive_reset(self, message: ClientReset) -> None:
        self.fail_all(EngineUnavailableError(f"the request was dropped: {message.reason}"))

    def _extend(self, request_id: int, tokens: Sequence[int], last: bool) -> None:
        if not self._channel.send(Extend(request_id=request_id, tokens=pack_tokens(tokens), last=last)):
            raise EngineUnavailableError("the engine does not read its requests")

    def _forget(self, request_id: int, unfinished: bool) -> None:
        """The mailbox is closed or failed; its request, unless it has ended, is of no more use."""
        if self._mailboxes.pop(request_id, None) is None or not unfinished:
            return
        self._cancels.append(request_id)
        if self._cancel_timer is None:
            # Clients often go in numbers, a whole load generator's for instance: one message for all.
            self._cancel_timer = asyncio.get_running_loop().call_soon(self._flush_cancels)

    def _flush_cancels(self) -> None:
        self._cancel_timer = None
        if not self._cancels:
            return
        if self._channel.send(Cancel(request_ids=tuple(self._cancels))):
            self._cancels.clear()
        else:
            self._cancel_timer = asyncio.get_running_loop().call_later(_CANCEL_RETRY_SECONDS, self._flush_cancels)
