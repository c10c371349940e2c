"""From the engine's events to what is new about a choice: characters, ids, log-probabilities, counts."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from server.api.client import ChoiceEvent
from server.api.validation import GenerationJob
from server.types import FinishReason, TokenLogprobs

_FINISH_REASONS: Final = {
    FinishReason.RUNNING: None,
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    # None of OpenAI's values would be true of a text that its own constraints cut off; this is vLLM's and SGLang's.
    FinishReason.ABORT: "abort",
}
_LOWEST_LOGPROB: Final = -9999.0

_new_decoder = codecs.getincrementaldecoder("utf-8")


class TokenNames:
    """How tokens are written in log-probabilities.

    Args:
        token_bytes: what each token adds to a text; None: the server has no tokenizer.
    """

    def __init__(self, token_bytes: list[bytes] | None) -> None:
        self._token_bytes = token_bytes

    def bytes(self, token_id: int) -> bytes:
        """The token's part of the text."""
        table = self._token_bytes
        # A model's vocabulary may be padded beyond its tokenizer's.
        return table[token_id] if table is not None and token_id < len(table) else b""

    def text(self, token_id: int) -> str:
        """The token as text; ``bytes:\\xe2\\x80`` if it is none of its own, its id if there is no tokenizer."""
        if self._token_bytes is None:
            return f"token_id:{token_id}"
        data = self.bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new about one choice.

    Attributes:
        choice: index of the choice.
        text: complete characters only.
        token_ids: what was sampled.
        logprobs: their JSON, if the request asked for it.
        finish_reason: ``stop``, ``length`` or ``abort`` if the choice has ended.
        stop_reason: the stop string or token id that ended it.
        cached_tokens: tokens of its prompt that need not be absorbed again.
    """

    choice: int
    text: str
    token_ids: list[int]
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None
    cached_tokens: int


def finite(logprob: float) -> float:
    """-9999 in place of minus infinity, which JSON does not have."""
    return max(logprob, _LOWEST_LOGPROB)


class LogprobsWriter(Protocol):
    """Writes one choice's log-probabilities, event by event, in the form of its route."""

    def write(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        """The JSON of newly generated tokens; the lists are parallel."""


class ListedLogprobs:
    """Log-probabilities as completions have them: parallel lists, with each token's place in the text.

    Args:
        names: how to write tokens.
    """

    __slots__ = ("_decoder", "_names", "_offset")

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._offset = 0
        # Stop strings hold text back, so offsets are counted by the tokens' own bytes.
        self._decoder = _new_decoder("replace")

    def write(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        """See :class:`LogprobsWriter`."""
        name = self._names.text
        sampled = [finite(entry.sampled) for entry in logprobs]
        tokens = [name(token) for token in token_ids]
        tops: list[dict[str, float]] = []
        for token, logprob, entry in zip(tokens, sampled, logprobs, strict=True):
            top: dict[str, float] = {}
            for other, other_logprob in zip(entry.top_ids, entry.top, strict=True):
                # Tokens that look the same (a byte and a letter) share a key: the likelier one has it.
                top.setdefault(name(other), finite(other_logprob))
            top.setdefault(token, logprob)
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": sampled,
            "top_logprobs": tops,
            "text_offset": [self._advance(token) for token in token_ids],
        }

    def _advance(self, token_id: int) -> int:
        """Where the next token begins, in characters; a token inside a character begins where that does."""
        offset = self._offset
        self._offset += len(self._decoder.decode(self._names.bytes(token_id)))
        return offset


class ChoiceReader:
    """Puts one choice's events together: characters from bytes, log-probabilities.

    Args:
        choice: index of the choice.
        logprobs: None: the request asked for no log-probabilities.
    """

    __slots__ = ("_choice", "_decoder", "_logprobs")

    def __init__(self, choice: int, logprobs: LogprobsWriter | None) -> None:
        self._choice = choice
        self._decoder = _new_decoder("replace")
        self._logprobs = logprobs

    def read(self, event: ChoiceEvent) -> Delta:
        """The news in this choice's next event."""
        reason = _FINISH_REASONS[event.finish_reason]
        return Delta(
            self._choice,
            self._decoder.decode(event.text, reason is not None),
            event.token_ids,
            None if self._logprobs is None else self._logprobs.write(event.token_ids, event.logprobs),
            reason,
            event.stop_reason,
            event.cached_tokens,
        )


def join_events(events: Sequence[ChoiceEvent]) -> ChoiceEvent:
    """Consecutive events of one choice as one."""
    last = events[-1]
    return ChoiceEvent(
        choice=last.choice,
        token_ids=[token for event in events for token in event.token_ids],
        text=b"".join([event.text for event in events]),
        logprobs=[entry for event in events for entry in event.logprobs],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cached_tokens=sum(event.cached_tokens for event in events),
    )


class UsageCounter:
    """Token counts of one request."""

    __slots__ = ("_cached", "_completion", "_prompt")

    def __init__(self, job: GenerationJob) -> None:
        self._prompt = sum(map(len, job.prompts))
        self._completion = 0
        self._cached = 0

    def add(self, delta: Delta) -> None:
        """Count newly generated tokens, and what was found of the prompt."""
        self._completion += len(delta.token_ids)
        self._cached += delta.cached_tokens

    def json(self) -> dict[str, Any]:
        """OpenAI's usage object. A prompt counts once, however many answers it gets."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }
