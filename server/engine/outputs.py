"""Collects what happened to each API process's requests until the process wrapper sends it."""

from server.engine.sequence import Sequence
from server.types import StepOutput, TokenLogprobs


class Outbox:
    """One :class:`StepOutput` in the making per API process."""

    def __init__(self) -> None:
        self._messages: dict[bytes, StepOutput] = {}

    def take(self) -> dict[bytes, StepOutput]:
        """Hand over everything collected, by API process."""
        messages, self._messages = self._messages, {}
        return messages

    def drop(self, client: bytes) -> None:
        """Forget what was collected for one API process."""
        self._messages.pop(client, None)

    def accept(self, client: bytes, request_id: int) -> None:
        """The request is queued or running."""
        self._message(client).accepted.append(request_id)

    def reject(self, client: bytes, request_id: int, message: str) -> None:
        """The request was refused as a whole."""
        self._message(client).rejected[request_id] = message

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
        message = self._message(seq.client)
        row = self._append(message, seq, token_id, text)
        if logprobs is not None:
            message.logprobs[row] = logprobs
        if stop_reason is not None:
            message.stop_reasons[row] = stop_reason

    def end(self, seq: Sequence, text: bytes = b"", *, error: str | None = None) -> None:
        """The terminal event of a sequence that ended without a token."""
        message = self._message(seq.client)
        row = self._append(message, seq, -1, text)
        if error is not None:
            message.errors[row] = error

    @staticmethod
    def _append(message: StepOutput, seq: Sequence, token_id: int, text: bytes) -> int:
        message.request_ids.append(seq.request_id)
        message.choices.append(seq.choice)
        message.token_ids.append(token_id)
        message.texts.append(text)
        message.finish_reasons.append(seq.finish_reason)
        return len(message.request_ids) - 1

    def _message(self, client: bytes) -> StepOutput:
        message = self._messages.get(client)
        if message is None:
            message = self._messages[client] = StepOutput()
        return message
