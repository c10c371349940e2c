"""From the engine's events to what is new about a choice: characters, ids, log-probabilities, counts."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from server.api.job import GenerationJob
from server.api.mailbox import ChoiceEvent
from server.tokenizer import Tokenizer
from server.types import FinishReason, TokenLogprobs

_FINISH_REASONS: Final = {
    FinishReason.RUNNING: None,
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    # None of OpenAI's values would be true of a text that its own constraints cut off; this is vLLM's and SGLang's.
    FinishReason.ABORT: "abort",
}
_LOWEST_LOGPROB: Final = -9999.0

new_decoder = codecs.getincrementaldecoder("utf-8")
"""From bytes to characters, piece by piece."""


def _entry(table: list[bytes] | None, token_id: int) -> bytes:
    """A token's bytes; a model's vocabulary may be padded beyond its tokenizer's."""
    return table[token_id] if table is not None and token_id < len(table) else b""


class TokenNames:
    """How tokens are written in log-probabilities.

    Args:
        token_bytes: what each token adds to a text; None: the server has no tokenizer.
        with_special: the same where special tokens are written, too; by these they are named.
        as_ids: write ``token_id:7`` for every token.
    """

    def __init__(
        self, token_bytes: list[bytes] | None, with_special: list[bytes] | None = None, *, as_ids: bool = False
    ) -> None:
        self._token_bytes = token_bytes
        self._with_special = with_special
        self._as_ids = as_ids or token_bytes is None

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> "TokenNames":
        """The names of a tokenizer's tokens."""
        return cls(None) if tokenizer is None else cls(tokenizer.token_bytes(), tokenizer.token_bytes(special=True))

    def written_for(self, job: GenerationJob) -> "TokenNames":
        """These names as the request wants them: ids in their place, special tokens written."""
        if not job.tokens_as_ids and job.params.skip_special_tokens:
            return self
        table = self._token_bytes if job.params.skip_special_tokens else self._with_special
        return TokenNames(table, self._with_special, as_ids=job.tokens_as_ids)

    def bytes(self, token_id: int) -> bytes:
        """The token's part of the text."""
        return _entry(self._token_bytes, token_id)

    def text(self, token_id: int) -> str:
        """The token as text; ``bytes:\\xe2\\x80`` if it is none of its own; its id if ids are to be written."""
        if self._as_ids:
            return f"token_id:{token_id}"
        data = _entry(self._with_special or self._token_bytes, token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def decoded(self, token_id: int) -> str | None:
        """The token as text, with replacement characters for what is none; None if there is no tokenizer."""
        table = self._with_special or self._token_bytes
        return None if table is None else _entry(table, token_id).decode(errors="replace")


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


def name_alternatives(
    names: TokenNames, token: str, logprob: float, top_ids: Sequence[int], top: Sequence[float]
) -> dict[str, float]:
    """The most likely tokens at a position and, if it is none of them, the token that stands there, by name."""
    alternatives: dict[str, float] = {}
    for other, other_logprob in zip(top_ids, top, strict=True):
        # Tokens that look the same (a byte and a letter) share a key: the likelier one has it.
        alternatives.setdefault(names.text(other), finite(other_logprob))
    alternatives.setdefault(token, logprob)
    return alternatives


class LogprobsWriter(Protocol):
    """Writes one choice's log-probabilities, event by event, in the form of its route."""

    def write(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        """The JSON of newly generated tokens; the lists are parallel."""


class ListedLogprobs:
    """Log-probabilities as completions have them: parallel lists, with each token's place in the text.

    Args:
        names: how to write tokens.
        offset: where the generated text begins, in characters of the choice's text.
    """

    __slots__ = ("_decoder", "_names", "_offset")

    def __init__(self, names: TokenNames, offset: int) -> None:
        self._names = names
        self._offset = offset
        # Stop strings hold text back, so offsets are counted by the tokens' own bytes.
        self._decoder = new_decoder("replace")

    def write(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        """See :class:`LogprobsWriter`."""
        sampled = [finite(entry.sampled) for entry in logprobs]
        tokens = [self._names.text(token) for token in token_ids]
        return {
            "tokens": tokens,
            "token_logprobs": sampled,
            "top_logprobs": [
                name_alternatives(self._names, token, logprob, entry.top_ids, entry.top)
                for token, logprob, entry in zip(tokens, sampled, logprobs, strict=True)
            ],
            "text_offset": [self._advance(token) for token in token_ids],
        }

    def _advance(self, token_id: int) -> int:
        """Where the next token begins, in characters; a token inside a character begins where that does."""
        offset = self._offset
        self._offset += len(self._decoder.decode(self._names.bytes(token_id)))
        return offset


class NestedLogprobs:
    """Log-probabilities as chat completions have them: one object per token.

    Args:
        names: how to write tokens.
    """

    __slots__ = ("_names",)

    def __init__(self, names: TokenNames) -> None:
        self._names = names

    def write(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        """See :class:`LogprobsWriter`."""
        entries: list[dict[str, Any]] = []
        for token, logprob in zip(token_ids, logprobs, strict=True):
            top = [self._entry(*other) for other in zip(logprob.top_ids, logprob.top, strict=True)]
            entries.append(self._entry(token, logprob.sampled) | {"top_logprobs": top})
        return {"content": entries}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._names.bytes(token_id)
        return {"token": self._names.text(token_id), "logprob": finite(logprob), "bytes": list(data) or None}


class ChoiceReader:
    """Puts one choice's events together: characters from bytes, log-probabilities.

    Args:
        choice: index of the choice.
        logprobs: None: the request asked for no log-probabilities.
    """

    __slots__ = ("_choice", "_decoder", "_logprobs")

    def __init__(self, choice: int, logprobs: LogprobsWriter | None) -> None:
        self._choice = choice
        self._decoder = new_decoder("replace")
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
    """Token counts of one request.

    Args:
        job: the request.
        context: tokens of the saved state that every prompt continues.
    """

    __slots__ = ("_cached", "_candidates", "_completions", "_prompts")

    def __init__(self, job: GenerationJob, context: int = 0) -> None:
        self._prompts = [context + len(prompt) for prompt in job.prompts]
        # Candidates that are not returned count, too.
        self._candidates = job.candidates
        self._completions = [0] * len(job.prompts) * job.candidates
        self._cached = [0] * len(job.prompts) * job.candidates

    def add(self, delta: Delta) -> None:
        """Count newly generated tokens, and what was found of the prompt."""
        self._completions[delta.choice] += len(delta.token_ids)
        self._cached[delta.choice] += delta.cached_tokens

    def json(self) -> dict[str, Any]:
        """OpenAI's usage object. A prompt counts once, however many answers it gets."""
        return _usage(sum(self._prompts), sum(self._completions), sum(self._cached))

    def json_of(self, choice: int) -> dict[str, Any]:
        """The usage of one choice and its prompt alone."""
        return _usage(self._prompts[choice // self._candidates], self._completions[choice], self._cached[choice])


def _usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
