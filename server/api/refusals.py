"""What clients are told of requests that the engine does not take."""

from collections.abc import Callable
from functools import partial

from server.api.engine_status import EngineStatus
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
from server.types import Refusal, RefusalReason

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
_UNAVAILABLE = {
    EngineStatus.DRAINING: "The server is shutting down.",
    EngineStatus.DEAD: "The engine died and is not yet back.",
}


def refused(refusal: Refusal) -> ApiError:
    """The engine's refusal, as an error."""
    error = _REFUSALS[refusal.reason](refusal.message)
    error.code = refusal.code or error.code
    return error


def unavailable(status: EngineStatus) -> EngineUnavailableError:
    """Why an engine of this status, which is not READY, takes no requests."""
    if status in (EngineStatus.FALLING_ASLEEP, EngineStatus.ASLEEP):
        return EngineAsleepError("The engine is asleep; POST /wake_up wakes it.")
    return EngineUnavailableError(_UNAVAILABLE.get(status, "The engine is still loading the model."))
