"""From a choice's news to the JSON of answers and to the chunks of streams, in whichever route's form."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import msgspec

from server.api.client import ChoiceEvent
from server.api.deltas import ChoiceReader, Delta, LogprobsWriter, UsageCounter, join_events
from server.api.validation import GenerationJob

DONE: Final = b"data: [DONE]\n\n"

to_json = msgspec.json.Encoder().encode


class AnswerForm(ABC):
    """What distinguishes the answers of one route from those of another.

    Attributes:
        id_prefix: begins the answer's id.
        kind: ``object`` of a whole answer.
        chunk_kind: ``object`` of a chunk.
        text_head: stands before a text in a chunk's choice.
        text_tail: stands after it.
        no_text: stands in a chunk's choice that has no text.
        prompt_in_choice: whether the ids of a prompt stand in its choices, rather than in the answer.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    text_head: ClassVar[bytes]
    text_tail: ClassVar[bytes]
    no_text: ClassVar[bytes]
    prompt_in_choice: ClassVar[bool]

    @abstractmethod
    def logprobs(self) -> LogprobsWriter:
        """A writer for the log-probabilities of one choice."""

    @abstractmethod
    def message(self, text: str) -> dict[str, Any]:
        """The part of a whole answer's choice that holds the text."""

    @abstractmethod
    def opening(self, text: str) -> bytes | None:
        """That part of a choice's first chunk, JSON without braces, when nothing has been generated yet.

        Args:
            text: what the choice echoes; may be empty.

        Returns:
            None if there is nothing to tell yet.
        """


@dataclass(frozen=True, slots=True)
class Envelope:
    """What an answer, or every chunk of it, says of itself.

    Attributes:
        id: the answer's id.
        created: Unix time.
        fingerprint: the engine's.
    """

    id: str
    created: int
    fingerprint: str

    def json(self, kind: str, model: str) -> dict[str, Any]:
        """The fields that come first."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": model,
            "system_fingerprint": self.fingerprint,
        }


def render_answer(
    job: GenerationJob, form: AnswerForm, envelope: Envelope, events: Sequence[Sequence[ChoiceEvent]]
) -> bytes:
    """The whole answer at once.

    Args:
        job: the request.
        form: that of the route.
        envelope: of the answer.
        events: all events of each choice, in order.
    """
    usage = UsageCounter(job)
    choices: list[dict[str, Any]] = []
    for index, own in enumerate(events):
        logprobs = form.logprobs() if job.params.logprobs is not None else None
        delta = ChoiceReader(index, logprobs).read(join_events(own))
        usage.add(delta)
        prompt = index // job.n
        choice = {
            "index": index,
            **form.message(job.echoed[prompt] + delta.text),
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if job.prompt_token_ids and form.prompt_in_choice:
            choice["prompt_token_ids"] = job.prompts[prompt]
        if job.token_ids:
            choice["token_ids"] = delta.token_ids
        choices.append(choice)
    answer = {**envelope.json(form.kind, job.model), "choices": choices, "usage": usage.json()}
    if job.prompt_token_ids and not form.prompt_in_choice:
        (answer["prompt_token_ids"],) = job.prompts
    return to_json(answer)


class ChunkRenderer:
    """Server-sent events of one streamed answer.

    Args:
        job: the request.
        form: that of the route.
        envelope: of every chunk.
    """

    def __init__(self, job: GenerationJob, form: AnswerForm, envelope: Envelope) -> None:
        self._job = job
        self._form = form
        wants_logprobs = job.params.logprobs is not None
        self._readers = [
            ChoiceReader(index, form.logprobs() if wants_logprobs else None) for index in range(job.num_choices)
        ]
        self._usage = UsageCounter(job)
        self._running = job.num_choices
        # The constant parts of a chunk, written once: serializing is most of what a stream costs.
        self._head = b"data: " + to_json(envelope.json(form.chunk_kind, job.model))[:-1] + b',"choices":['
        self._usage_tail = (b',"usage":null}' if job.include_usage else b"}") + b"\n\n"
        self._heads = [b'%b{"index":%d,' % (self._head, index) for index in range(job.num_choices)]
        self._text_heads = [head + form.text_head for head in self._heads]
        self._no_news = b',"logprobs":null,"finish_reason":null'
        self._plain_tail = form.text_tail + self._no_news + b"}]" + self._usage_tail
        # Whether every token makes a chunk, also one that adds no text yet.
        self._always = job.token_ids or wants_logprobs

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return self._running == 0

    def opening(self) -> bytes:
        """Chunks that do not wait for the engine: a role, an echoed prompt, its token ids; empty if there are none."""
        job = self._job
        chunks: list[bytes] = []
        for index, head in enumerate(self._heads):
            text = job.echoed[index // job.n]
            opening = self._form.opening(text)
            if opening is None and not job.prompt_token_ids:
                continue
            if opening is None:
                opening = self._form.text_head + to_json(text) + self._form.text_tail
            chunk = head + opening + self._no_news + (b',"token_ids":[]' if job.token_ids else b"")
            ids = b',"prompt_token_ids":' + to_json(job.prompts[index // job.n]) if job.prompt_token_ids else b""
            chunk += ids + b"}]" if self._form.prompt_in_choice else b"}]" + ids
            chunks.append(chunk + self._tail(index))
        return b"".join(chunks)

    def chunks(self, events: Sequence[ChoiceEvent]) -> bytes:
        """One chunk per event that tells something, ended by usage and DONE after the last one."""
        data = b"".join([self._chunk(self._readers[event.choice].read(event)) for event in events])
        return data if self._running else data + self._closing()

    def _chunk(self, delta: Delta) -> bytes:
        self._usage.add(delta)
        if not self._always and delta.finish_reason is None and not self._job.continuous_usage:
            # Nothing to tell while text is held back: an incomplete character, or the beginning of a stop string.
            return self._text_heads[delta.choice] + to_json(delta.text) + self._plain_tail if delta.text else b""
        rest = b',"logprobs":' + to_json(delta.logprobs) + b',"finish_reason":' + to_json(delta.finish_reason)
        if delta.finish_reason is not None:
            self._running -= 1
            rest += b',"stop_reason":' + to_json(delta.stop_reason)
        if self._job.token_ids:
            rest += b',"token_ids":' + to_json(delta.token_ids)
        if delta.text:
            text = self._text_heads[delta.choice] + to_json(delta.text) + self._form.text_tail
        else:
            text = self._heads[delta.choice] + self._form.no_text
        return text + rest + b"}]" + self._tail(delta.choice)

    def _tail(self, choice: int) -> bytes:
        """What ends a chunk of this choice, behind its list of choices."""
        if not self._job.continuous_usage:
            return self._usage_tail
        return b',"usage":' + to_json(self._usage.json_of(choice)) + b"}\n\n"

    def _closing(self) -> bytes:
        if not self._job.include_usage:
            return DONE
        return self._head + b'],"usage":' + to_json(self._usage.json()) + b"}\n\n" + DONE
