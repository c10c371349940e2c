"""Collects what happened to each API process's requests until the process wrapper sends it."""

from dataclasses import dataclass, field

from server.engine.sequence import Sequence
from server.types import PromptLogprobs, Refusal, StateInfo, StepOutput, TokenLogprobs


@dataclass(slots=True)
class _Collected:
    """What one API process is to be told.

    Attributes:
        rows: request id, choice, token id, text, finish reason; a step adds hundreds, and a tuple is cheaper than an
            entry in each of five columns.
        rest: everything else, under the rows' indices.
    """

    rows: list[tuple[int, int, int, bytes, int]] = field(default_factory=list)
    rest: StepOutput = field(default_factory=StepOutput)

    def message(self) -> StepOutput:
        """The whole, with its columns."""
        message = self.rest
        if self.rows:
            columns = map(list, zip(*self.rows, strict=True))
            message.request_ids, message.choices, message.token_ids, message.texts, message.finish_reasons = columns
        return message


class Outbox:
    """One :class:`StepOutput` in the making per API process."""

    def __init__(self) -> None:
        self._collected: dict[bytes, _Collected] = {}

    def take(self) -> dict[bytes, StepOutput]:
        """Hand over everything collected, by API process."""
        collected, self._collected = self._collected, {}
        return {client: one.message() for client, one in collected.items()}

    def drop(self, client: bytes) -> None:
        """Forget what was collected for one API process."""
        self._collected.pop(client, None)

    def accept(self, client: bytes, request_id: int, context: int = 0) -> None:
        """The request is queued or running; ``context``: tokens of the saved state that it continues."""
        rest = self._of(client).rest
        rest.accepted.append(request_id)
        if context:
            rest.contexts[request_id] = context

    def tell_states(self, client: bytes, request_id: int, states: list[StateInfo]) -> None:
        """What a command about saved states has led to."""
        self._of(client).rest.states_told[request_id] = states

    def reject(self, client: bytes, request_id: int, refusal: Refusal) -> None:
        """The request was refused as a whole."""
        self._of(client).rest.rejected[request_id] = refusal

    def prompt_logprobs(self, seq: Sequence, logprobs: PromptLogprobs) -> None:
        """Of the next tokens of the prompt that a sequence absorbs."""
        self._of(seq.client).rest.prompt_logprobs.append((seq.request_id, seq.choice, logprobs))

    def progress(self, seq: Sequence, absorbed: int) -> None:
        """So many tokens of a sequence have been absorbed."""
        self._of(seq.client).rest.progress[seq.request_id] = absorbed

    def plain_token(self, seq: Sequence, token_id: int, text: bytes) -> None:
        """A sampled token of a sequence that goes on, not its first, of which there is nothing else to tell."""
        collected = self._collected.get(seq.client) or self._of(seq.client)
        collected.rows.append((seq.request_id, seq.choice, token_id, text, 0))

    def token(
        self,
        seq: Sequence,
        token_id: int,
        text: bytes,
        *,
        logprobs: TokenLogprobs | None = None,
        stop_reason: int | str | None = None,
    ) -> None:
        """A sampled token of a sequence, terminal if the sequence has just finished."""
        collected = self._of(seq.client)
        rows = collected.rows
        if logprobs is not None:
            collected.rest.logprobs[len(rows)] = logprobs
        if seq.cached_tokens and len(seq.outputs) == 1:
            collected.rest.cached_tokens[len(rows)] = seq.cached_tokens
        if stop_reason is not None:
            collected.rest.stop_reasons[len(rows)] = stop_reason
        if seq.saved is not None:
            collected.rest.states[len(rows)] = seq.saved
        rows.append((seq.request_id, seq.choice, token_id, text, seq.finish_reason))

    def end(self, seq: Sequence, text: bytes = b"", *, error: str | None = None, unsaved: str | None = None) -> None:
        """The terminal event of a sequence that ended without a token."""
        collected = self._of(seq.client)
        if seq.cached_tokens and not seq.outputs:
            collected.rest.cached_tokens[len(collected.rows)] = seq.cached_tokens
        if error is not None:
            collected.rest.errors[len(collected.rows)] = error
        if unsaved is not None:
            collected.rest.unsaved[len(collected.rows)] = unsaved
        if seq.saved is not None:
            collected.rest.states[len(collected.rows)] = seq.saved
        collected.rows.append((seq.request_id, seq.choice, -1, text, seq.finish_reason))

    def _of(self, client: bytes) -> _Collected:
        collected = self._collected.get(client)
        if collected is None:
            collected = self._collected[client] = _Collected()
        return collected
