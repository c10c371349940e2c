"""The API process's view of the engine: submit a request, read its choices' events, cancel it.

One message of the engine carries a token for each running choice. It is taken apart here, row by row,
into the mailboxes of the waiting requests; each mailbox wakes its reader at most once per wake-up of
the channel, however many rows arrived, and no task exists per token.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from server.api.engine_status import EngineStatus
from server.api.mailbox import Mailbox
from server.api.refusals import refused, unavailable
from server.errors import ApiError, EngineAsleepError, EngineUnavailableError
from server.ipc import ClientChannel
from server.types import (
    Cancel,
    ClientReset,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Extend,
    GenerateRequest,
    Hello,
    SamplingParams,
    StateAction,
    StateCommand,
    StateInfo,
    StepOutput,
    pack_tokens,
)

_CANCEL_RETRY_SECONDS = 0.05
_QUIET_SECONDS = 0.02
_MAX_UNREAD_TOKENS = 1 << 16
"""What a request may leave unread before it is ended: a client that never reads must not hold a slot for ever."""


def _sent_to_sleep() -> ApiError:
    return EngineAsleepError("the engine was sent to sleep while it worked on this request")


class EngineClient:
    """Connects an API process to the engine process.

    Args:
        address: ``ipc://`` path that the engine binds, now or later.

    Attributes:
        info: what the engine said of itself; None until it is ready.
        stats: the newest snapshot of the engine's figures.
        engine_deaths: of engines since the server's start.
        api_deaths: of API processes since then.
        wake_failure: why no engine started when the server was last woken; None: one did.
        transfers: folder for files that pass between the engine and the API processes; it need not be there.
    """

    def __init__(self, address: str) -> None:
        self.info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        self.engine_deaths = 0
        self.api_deaths = 0
        self.wake_failure: str | None = None
        self._status = EngineStatus.STARTING
        self._status_awaited: list[tuple[tuple[EngineStatus, ...], asyncio.Future[EngineStatus]]] = []
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
        for wanted, told in self._status_awaited:
            if status in wanted and not told.done():
                told.set_result(status)

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
        """Return the first status, this one or a later one, that is one of these, however short it lasts."""
        if self.status in wanted:
            return self.status
        told: asyncio.Future[EngineStatus] = asyncio.get_running_loop().create_future()
        self._status_awaited.append((wanted, told))
        try:
            return await told
        finally:
            self._status_awaited.remove((wanted, told))

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
            mailbox.fail(error)
            self._forget(request_id, unfinished=True)
        for command in self._commands.values():
            if not command.done():
                command.set_exception(error)

    async def fall_asleep(self, seconds: float) -> None:
        """Take no new requests until another engine is there; running ones may finish within so many seconds."""
        if self.status in (EngineStatus.STARTING, EngineStatus.READY):
            self.status = EngineStatus.FALLING_ASLEEP
        deadline = time.monotonic() + seconds
        while (self._mailboxes or self._commands) and time.monotonic() < deadline:
            await asyncio.sleep(_QUIET_SECONDS)
        self.fail_all(_sent_to_sleep())

    def engine_asleep(self, failure: str | None) -> None:
        """Note that the engine has ended on purpose, and end every request that is still open.

        What the engine said of its load holds no longer.

        Args:
            failure: why the one that somebody asked for did not start; None: nobody asked.
        """
        self.wake_failure = failure
        if self.status is not EngineStatus.DRAINING:
            self.status = EngineStatus.ASLEEP
        self.fail_all(_sent_to_sleep())
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
        raise unavailable(self.status)

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
            mailbox.wake()
            if mailbox.ended:
                self._mailboxes.pop(request_id, None)
            elif mailbox.unread > _MAX_UNREAD_TOKENS:
                mailbox.fail(EngineUnavailableError("the client reads too slowly"))
                self._forget(request_id, unfinished=True)

    def _receive_step(self, message: StepOutput, touched: dict[int, Mailbox]) -> None:
        if message.stats is not None:
            self.stats = message.stats
        mailboxes = self._mailboxes
        for request_id in message.accepted:
            if request_id in mailboxes:
                mailboxes[request_id].accept(message.contexts.get(request_id, 0))
        for request_id, refusal in message.rejected.items():
            error = refused(refusal)
            if request_id in mailboxes:
                mailboxes.pop(request_id).fail(error)
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
                mailbox.take(message, row)
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
