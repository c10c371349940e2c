"""From the engine's events to the JSON of answers and chunks."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from server.api.client import ChoiceEvent
from server.api.validation import CompletionJob
from server.types import FinishReason, TokenLogprobs

_FINISH_REASONS: Final = {FinishReason.RUNNING: None, FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
_LOWEST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON does not have."""

DONE: Final = b"data: [DONE]\n\n"

_new_decoder = codecs.getincrementaldecoder("utf-8")
_json = msgspec.json.Encoder().encode


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
        logprobs: OpenAI's object, if the request asked for it.
        finish_reason: ``stop`` or ``length`` if the choice has ended.
        stop_reason: the stop string or token id that ended it.
    """

    choice: int
    text: str
    token_ids: list[int]
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChoiceReader:
    """Puts one choice's events together: characters from bytes, log-probabilities with offsets.

    Args:
        choice: index of the choice.
        wants_logprobs: whether the request asked for log-probabilities.
        names: how to write tokens.
    """

    __slots__ = ("_choice", "_decoder", "_names", "_offset", "_offset_decoder", "_wants_logprobs")

    def __init__(self, choice: int, wants_logprobs: bool, names: TokenNames) -> None:
        self._choice = choice
        self._decoder = _new_decoder("replace")
        self._wants_logprobs = wants_logprobs
        self._names = names
        self._offset = 0
        # Stop strings hold text back, so offsets are counted by the tokens' own bytes.
        self._offset_decoder = _new_decoder("replace")

    def read(self, event: ChoiceEvent) -> Delta:
        """The news in this choice's next event."""
        reason = _FINISH_REASONS[event.finish_reason]
        return Delta(
            self._choice,
            self._decoder.decode(event.text, reason is not None),
            event.token_ids,
            self._logprobs(event.token_ids, event.logprobs) if self._wants_logprobs else None,
            reason,
            event.stop_reason,
        )

    def _logprobs(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        name = self._names.text
        sampled = [max(entry.sampled, _LOWEST_LOGPROB) for entry in logprobs]
        tokens = [name(token) for token in token_ids]
        tops: list[dict[str, float]] = []
        for token, logprob, entry in zip(tokens, sampled, logprobs, strict=True):
            top: dict[str, float] = {}
            for other, other_logprob in zip(entry.top_ids, entry.top, strict=True):
                # Tokens that look the same (a byte and a letter) share a key: the likelier one has it.
                top.setdefault(name(other), max(other_logprob, _LOWEST_LOGPROB))
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
        self._offset += len(self._offset_decoder.decode(self._names.bytes(token_id)))
        return offset


def _join(events: Sequence[ChoiceEvent]) -> ChoiceEvent:
    """Consecutive events of one choice as one."""
    last = events[-1]
    return ChoiceEvent(
        choice=last.choice,
        token_ids=[token for event in events for token in event.token_ids],
        text=b"".join([event.text for event in events]),
        logprobs=[entry for event in events for entry in event.logprobs],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


class UsageCounter:
    """Token counts of one request."""

    __slots__ = ("_completion", "_prompt")

    def __init__(self, job: CompletionJob) -> None:
        self._prompt = sum(map(len, job.prompts))
        self._completion = 0

    def add(self, delta: Delta) -> None:
        """Count newly generated tokens."""
        self._completion += len(delta.token_ids)

    def json(self) -> dict[str, int]:
        """OpenAI's usage object. A prompt counts once, however many answers it gets."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
        }


def render_completion(
    job: CompletionJob, completion_id: str, created: int, events: Sequence[Sequence[ChoiceEvent]], names: TokenNames
) -> bytes:
    """The whole answer at once.

    Args:
        job: the request.
        completion_id: the answer's id.
        created: Unix time.
        events: all events of each choice, in order.
        names: how to write tokens.
    """
    usage = UsageCounter(job)
    choices: list[dict[str, Any]] = []
    for index, own in enumerate(events):
        delta = ChoiceReader(index, job.params.logprobs is not None, names).read(_join(own))
        usage.add(delta)
        prompt = index // job.n
        choice = {
            "index": index,
            "text": job.echoed[prompt] + delta.text,
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if job.prompt_token_ids:
            choice["prompt_token_ids"] = job.prompts[prompt]
        if job.token_ids:
            choice["token_ids"] = delta.token_ids
        choices.append(choice)
    return _json(
        {
            "id": completion_id,
            "object": "text_completion",
            "created": created,
            "model": job.model,
            "choices": choices,
            "usage": usage.json(),
        }
    )


class ChunkRenderer:
    """Server-sent events of one streamed completion.

    Args:
        job: the request.
        completion_id: the id every chunk carries.
        created: Unix time.
        names: how to write tokens.
    """

    def __init__(self, job: CompletionJob, completion_id: str, created: int, names: TokenNames) -> None:
        self._job = job
        wants_logprobs = job.params.logprobs is not None
        self._readers = [ChoiceReader(index, wants_logprobs, names) for index in range(job.num_choices)]
        self._usage = UsageCounter(job)
        self._running = job.num_choices
        envelope = {"id": completion_id, "object": "text_completion", "created": created, "model": job.model}
        # The constant parts of a chunk, written once: serializing is most of what a stream costs.
        self._head = b"data: " + _json(envelope)[:-1] + b',"choices":['
        self._tail = (b'}],"usage":null}' if job.include_usage else b"}]}") + b"\n\n"
        self._heads = [b'%b{"index":%d,"text":' % (self._head, index) for index in range(job.num_choices)]
        self._plain_tail = b',"logprobs":null,"finish_reason":null' + self._tail
        self._always = job.token_ids or wants_logprobs

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return self._running == 0

    def opening(self) -> bytes:
        """Chunks that do not wait for the engine: the echoed prompt or its token ids; empty if unasked for."""
        job = self._job
        chunks: list[bytes] = []
        for index, head in enumerate(self._heads):
            text = job.echoed[index // job.n]
            if not text and not job.prompt_token_ids:
                continue
            extra = b',"logprobs":null,"finish_reason":null'
            if job.prompt_token_ids:
                extra += b',"prompt_token_ids":' + _json(job.prompts[index // job.n]) + b',"token_ids":[]'
            chunks.append(head + _json(text) + extra + self._tail)
        return b"".join(chunks)

    def chunks(self, events: Sequence[ChoiceEvent]) -> bytes:
        """One chunk per event that tells something, ended by usage and DONE after the last one."""
        data = b"".join([self._chunk(self._readers[event.choice].read(event)) for event in events])
        return data if self._running else data + self._closing()

    def _chunk(self, delta: Delta) -> bytes:
        self._usage.add(delta)
        head = self._heads[delta.choice]
        if not self._always and delta.finish_reason is None:
            # Nothing to tell while text is held back: an incomplete character, or the beginning of a stop string.
            return head + _json(delta.text) + self._plain_tail if delta.text else b""
        rest = b',"logprobs":' + _json(delta.logprobs) + b',"finish_reason":' + _json(delta.finish_reason)
        if delta.finish_reason is not None:
            self._running -= 1
            rest += b',"stop_reason":' + _json(delta.stop_reason)
        if self._job.token_ids:
            rest += b',"token_ids":' + _json(delta.token_ids)
        return head + _json(delta.text) + rest + self._tail

    def _closing(self) -> bytes:
        if not self._job.include_usage:
            return DONE
        return self._head + b'],"usage":' + _json(self._usage.json()) + b"}\n\n" + DONE
