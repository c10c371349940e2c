"""What requests ask of saved states, and why they may not have it. Torch-free."""

from server.engine.named_states import NamedStates, NoRoomError
from server.engine.radix import TOKEN_BYTES
from server.types import GenerateRequest, Refusal, RefusalReason, StateAction, StateCommand, StateInfo

_OFF = Refusal(
    RefusalReason.STATES_OFF,
    "this server parks no states, so it can neither save nor continue any (--state-cache-gpu, --state-cache-host, "
    "--state-cache-dir)",
)


def obey(states: NamedStates | None, command: StateCommand) -> list[StateInfo] | Refusal:
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
        return _unknown(command.state)
    if command.action is StateAction.DELETE:
        states.delete(state)
    elif command.action is StateAction.FORK:
        try:
            state = states.fork(state, command.name, command.ttl)
        except NoRoomError as error:
            return Refusal(RefusalReason.STATES_FULL, str(error))
    return [state.info]


def context_of(
    states: NamedStates | None, request: GenerateRequest, reference: str, limit: int | None
) -> bytes | Refusal:
    """The transcript that a request's prompts continue, int32 bytes, or why they cannot.

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
        return _unknown(reference)
    length = (max(map(len, request.prompts)) + len(state.tokens)) // TOKEN_BYTES
    answer = 0 if request.params.max_tokens == 0 else 1
    if limit is not None and length + answer > limit:
        return Refusal(
            RefusalReason.TOO_LONG,
            f"the state has {state.info.num_tokens} tokens, with the prompt {length}; together with the answer there "
            f"may be {limit} (--max-model-len)",
        )
    return state.tokens


def reserve(states: NamedStates | None, count: int) -> Refusal | None:
    """Set room aside for so many states; None: there is enough."""
    if states is None:
        return _OFF
    try:
        states.reserve(count)
    except NoRoomError as error:
        return Refusal(RefusalReason.STATES_FULL, str(error))
    return None


def _unknown(reference: str) -> Refusal:
    return Refusal(RefusalReason.UNKNOWN_STATE, f"there is no state {reference!r}, or it has expired")
