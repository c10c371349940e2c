"""The forms of answers: what a completion looks like."""

from typing import Any

from server.api.deltas import ListedLogprobs, LogprobsWriter, TokenNames
from server.api.rendering import AnswerForm, to_json


class CompletionForm(AnswerForm):
    """Answers of ``POST /v1/completions``.

    Args:
        names: how to write tokens.
    """

    id_prefix = "cmpl-"
    kind = chunk_kind = "text_completion"
    text_head = b'"text":'
    text_tail = b""

    def __init__(self, names: TokenNames) -> None:
        self._names = names

    def logprobs(self) -> LogprobsWriter:
        """See :meth:`AnswerForm.logprobs`."""
        return ListedLogprobs(self._names)

    def message(self, text: str) -> dict[str, Any]:
        """See :meth:`AnswerForm.message`."""
        return {"text": text}

    def opening(self, text: str) -> bytes | None:
        """See :meth:`AnswerForm.opening`; a prompt that is echoed opens the stream."""
        return self.text_head + to_json(text) if text else None
