"""The forms of answers: what a completion looks like, and what a chat completion."""

from typing import Any

from server.api.deltas import ListedLogprobs, LogprobsWriter, NestedLogprobs, TokenNames
from server.api.rendering import AnswerForm, to_json


class CompletionForm(AnswerForm):
    """Answers of ``POST /v1/completions``."""

    id_prefix = "cmpl-"
    kind = chunk_kind = "text_completion"
    text_head = b'"text":'
    text_tail = b""
    no_text = b'"text":""'
    prompt_in_choice = True

    def logprobs(self, offset: int) -> LogprobsWriter:
        """See :meth:`AnswerForm.logprobs`."""
        return ListedLogprobs(self.names, offset)

    def message(self, text: str) -> dict[str, Any]:
        """See :meth:`AnswerForm.message`."""
        return {"text": text}

    def opening(self, text: str) -> bytes | None:
        """See :meth:`AnswerForm.opening`; a prompt that is echoed opens the stream."""
        return self.text_head + to_json(text) if text else None


class ChatForm(AnswerForm):
    """Answers of ``POST /v1/chat/completions``.

    Args:
        names: how to write tokens.
        role: who speaks.
    """

    id_prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    text_head = b'"delta":{"content":'
    text_tail = b"}"
    no_text = b'"delta":{}'
    prompt_in_choice = False

    def __init__(self, names: TokenNames, role: str) -> None:
        super().__init__(names)
        self._role = role

    def logprobs(self, offset: int) -> LogprobsWriter:
        """See :meth:`AnswerForm.logprobs`; a chat's have no offsets."""
        return NestedLogprobs(self.names)

    def message(self, text: str) -> dict[str, Any]:
        """See :meth:`AnswerForm.message`."""
        return {"message": {"role": self._role, "content": text}}

    def opening(self, text: str) -> bytes | None:
        """See :meth:`AnswerForm.opening`; the role opens every choice."""
        return b'"delta":' + to_json({"role": self._role, "content": text})
