"""What requests ask of saved states, and why they may not have it. Torch-free."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

from server.engine.named_states import (
    NamedState,
    NamedStates,
    NoRoomError,
    NotWrittenError,
    Saving,
    TenantFullError,
)
from server.engine.radix import TOKEN_BYTES
from server.types import GenerateRequest, Refusal, RefusalReason, StateAction, StateCommand, StateInfo

logger = logging.getLogger(__name__)

_OFF = Refusal(
    RefusalReason.STATES_OFF,
    "this server parks no states, so it can neither save nor continue any (--state-cache-gpu, --state-cache-host, "
    "--state-cache-dir)",
)


@dataclass(frozen=True, slots=True)
class Later:
    """An answer that has to wait for a file.

    Attributes:
        future: when this is done ...
        finish: ... this gives the answer.
    """

    future: "Future[Any]"
    finish: "Callable[[], Answer]"


Told: TypeAlias = list[StateInfo] | Refusal
"""The states that a command was about, or why it cannot be obeyed."""

Answer: TypeAlias = Told | Later
"""The same, perhaps later."""


class Waiting:
    """Answers that wait for files, or for those who are still to go on from a deleted state."""

    def __init__(self) -> None:
        self._waiting: dict[Future[Any], Callable[[], None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def futures(self) -> "set[Future[Any]]":
        """What they wait for."""
        return set(self._waiting)

    def after(self, answer: Answer, then: Callable[[Told], None]) -> None:
        """Pass an answer on: now, or when :meth:`settle` finds that it need not wait any longer."""
        if isinstance(answer, Later):
            self._waiting[answer.future] = lambda: self.after(guarded(answer.finish), then)
        else:
            then(answer)

    def settle(self) -> bool:
        """Pass on what need not wait any longer, in order; whether there was anything."""
        done = [future for future in self._waiting if future.done()]
        for future in done:
            self._waiting.pop(future)()
        return bool(done)


def guarded(work: Callable[[], Answer]) -> Answer:
    """What some work answers; a refusal where it raises an exception, which is nobody else's concern."""
    try:
        return work()
    except Exception as error:
        logger.exception("a command about saved states fails")
        return Refusal(RefusalReason.FAILED, complaint(error))


def complaint(error: Exception) -> str:
    """What is told of an exception that ends a request."""
    return f"the engine failed at this request ({type(error).__name__})"


def obey(states: NamedStates | None, command: StateCommand) -> Answer:
    """Do what a command says; the states that it is about, or why it cannot be done.

    Args:
        states: None: the engine parks none.
        command: validated by the API process.
    """
    if states is None:
        return _OFF
    if command.action is StateAction.LIST:
        return [state.info for state in states.of(command.tenant)]
    state = states.find(command.tenant, command.state)
    if state is None:
        return unknown(command.state)
    info = [state.info]
    if command.action is StateAction.DELETE:
        removed = states.delete(state)
        states.counts["delete"] += 1
        return info if removed is None else Later(removed, lambda: _removed(removed, info))
    if command.action is StateAction.FORK:
        try:
            saving = states.fork(state, command.name, command.ttl)
        except (NoRoomError, TenantFullError) as error:
            return _full(error)
        return complete(states, saving, "fork")
    return info


def complete(states: NamedStates, saving: Saving, operation: str, begun: float | None = None) -> Answer:
    """Enter a state that is being saved, and tell of it.

    Args:
        operation: counts as one of these.
        begun: when it began, by ``time.monotonic``; None: now.
    """
    started = time.monotonic() if begun is None else begun

    def finish() -> list[StateInfo] | Refusal:
        try:
            info = states.complete(saving).info
        except NotWrittenError as error:
            logger.warning("%s", error, exc_info=not isinstance(error.__cause__, OSError))
            return Refusal(RefusalReason.NOT_WRITTEN, str(error))
        states.counts[operation] += 1
        states.seconds[operation].observe(time.monotonic() - started)
        return [info]

    return finish() if saving.written is None else Later(saving.written, finish)


def context_of(
    states: NamedStates | None, request: GenerateRequest, reference: str, limit: int | None
) -> NamedState | Refusal:
    """The state that a request's prompts continue, or why they cannot.

    Args:
        states: None: the engine parks none.
        request: whose prompts come after the state.
        reference: the state's id or name.
        limit: most tokens of a sequence.
    """
    if states is None:
        return _OFF
    state = states.find(request.tenant, reference)
    if state is None:
        return unknown(reference)
    length = (max(map(len, request.prompts)) + len(state.tokens)) // TOKEN_BYTES
    answer = 0 if request.params.max_tokens == 0 else 1
    if limit is not None and length + answer > limit:
        return Refusal(
            RefusalReason.TOO_LONG,
            f"the state has {state.num_tokens} tokens, with the prompt {length}; together with the answer there "
            f"may be {limit} (--max-model-len)",
        )
    return state


def reserve(states: NamedStates | None, tenant: str, count: int) -> Refusal | None:
    """Set room aside for so many states of a tenant's; None: there is enough."""
    if states is None:
        return _OFF
    try:
        states.reserve(tenant, count)
    except (NoRoomError, TenantFullError) as error:
        return _full(error)
    return None


def _full(error: NoRoomError | TenantFullError) -> Refusal:
    is_mine = isinstance(error, TenantFullError)
    return Refusal(RefusalReason.STATES_LIMIT if is_mine else RefusalReason.STATES_FULL, str(error))


def _removed(removed: "Future[None]", info: list[StateInfo]) -> list[StateInfo] | Refusal:
    error = removed.exception()
    if error is None:
        return info
    return Refusal(RefusalReason.NOT_WRITTEN, f"the state's file could not be removed, it may come back: {error}")


def unknown(reference: str) -> Refusal:
    """What is said of a state that the tenant does not have."""
    return Refusal(RefusalReason.UNKNOWN_STATE, f"there is no state {reference!r}, or it has expired")
