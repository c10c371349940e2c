"""From a choice's news to the JSON of answers and to the chunks of streams, in whichever route's form."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

import msgspec

from server.api.deltas import ChoiceReader, Delta, LogprobsWriter, TokenNames, UsageCounter, join_events
from server.api.job import GenerationJob
from server.api.mailbox import ChoiceEvent
from server.api.scores import PromptScores
from server.types import PromptLogprobs, StateInfo

DONE: Final = b"data: [DONE]\n\n"

to_json = msgspec.json.Encoder().encode


class AnswerForm(ABC):
    """What distinguishes the answers of one route from those of another.

    Args:
        names: how to write tokens.

    Attributes:
        names: as above.
        id_prefix: begins the answer's id.
        kind: ``object`` of a whole answer.
        chunk_kind: ``object`` of a chunk.
        text_head: stands before a text in a chunk's choice.
        text_tail: stands after it.
        no_text: stands in a chunk's choice that has no text.
        prompt_in_choice: whether what is told of a prompt stands in its choices, rather than in the answer, which
            then has one prompt only.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    text_head: ClassVar[bytes]
    text_tail: ClassVar[bytes]
    no_text: ClassVar[bytes]
    prompt_in_choice: ClassVar[bool]

    def __init__(self, names: TokenNames) -> None:
        self.names = names

    @abstractmethod
    def logprobs(self, offset: int) -> LogprobsWriter:
        """A writer for the log-probabilities of one choice.

        Args:
            offset: where the generated text begins, in characters of the choice's text.
        """

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


PromptPieces: TypeAlias = Mapping[int, Sequence[PromptLogprobs]]
"""Log-probabilities of prompts as the engine sent them, by the first candidate for each."""


def render_answer(
    job: GenerationJob,
    form: AnswerForm,
    envelope: Envelope,
    events: Sequence[Sequence[ChoiceEvent]],
    pieces: PromptPieces,
    context: int = 0,
) -> bytes:
    """The whole answer at once.

    Args:
        job: the request.
        form: that of the route.
        envelope: of the answer.
        events: all events of each candidate, in order.
        pieces: of the prompts, if the job wants their log-probabilities.
        context: tokens of the saved state that every prompt continues.
    """
    usage = UsageCounter(job, context)
    choices: list[dict[str, Any]] = []
    parts = [_prompt_part(job, form, prompt, pieces) for prompt in range(len(job.prompts))]
    for prompt, part in enumerate(parts):
        first = prompt * job.candidates
        joined = [join_events(own) for own in events[first : first + job.candidates]]
        deltas = [_reader(job, form, event.choice, prompt).read(event) for event in joined]
        for delta in deltas:
            usage.add(delta)
        if job.candidates > job.n:
            deltas = [deltas[number] for number in _best_first(joined)[: job.n]]
        choices += [_choice(job, form, prompt, place, delta, part) for place, delta in enumerate(deltas)]
    answer = {**envelope.json(form.kind, job.model), "choices": choices, "usage": usage.json()}
    if job.save_state:
        states = [None if own[-1].state is None else state_json(own[-1].state) for own in events]
        answer["state"] = states if len(states) > 1 else states[0]
    if not form.prompt_in_choice:
        answer |= _of_prompt(job, 0, part)
    return to_json(answer)


def state_json(state: StateInfo) -> dict[str, Any]:
    """What an answer says of a saved state."""
    return {"id": state.id, "num_tokens": state.num_tokens, "bytes": state.nbytes}


@dataclass(frozen=True, slots=True)
class _PromptPart:
    """What every choice of a prompt says of its tokens.

    Attributes:
        echoed: lists that come before those of the generated tokens; None if not asked for.
        detailed: vLLM's ``prompt_logprobs``; None if not asked for.
    """

    echoed: dict[str, Any] | None
    detailed: msgspec.Raw | None


def _prompt_part(job: GenerationJob, form: AnswerForm, prompt: int, pieces: PromptPieces) -> _PromptPart:
    if job.params.prompt_logprobs is None:
        return _PromptPart(None, None)
    scores = PromptScores(job.prompts[prompt], pieces.get(prompt * job.candidates, ()), form.names)
    return _PromptPart(
        scores.listed(job.echoed[prompt], job.logprobs) if job.echoes_logprobs and job.logprobs is not None else None,
        None if job.prompt_logprobs is None else scores.detailed(job.prompt_logprobs),
    )


def _reader(job: GenerationJob, form: AnswerForm, choice: int, prompt: int) -> ChoiceReader:
    return ChoiceReader(choice, None if job.logprobs is None else form.logprobs(len(job.echoed[prompt])))


def _best_first(candidates: Sequence[ChoiceEvent]) -> list[int]:
    """The candidates' numbers, by their mean log-probability per token; those without a token come last."""

    def mean(number: int) -> float:
        logprobs = candidates[number].logprobs
        return sum(entry.sampled for entry in logprobs) / len(logprobs) if logprobs else -math.inf

    return sorted(range(len(candidates)), key=mean, reverse=True)


def _choice(
    job: GenerationJob, form: AnswerForm, prompt: int, place: int, delta: Delta, part: _PromptPart
) -> dict[str, Any]:
    """A whole choice; ``place`` is its number among those of its prompt."""
    logprobs = delta.logprobs
    if part.echoed is not None and logprobs is not None:
        logprobs = {name: part.echoed[name] + values for name, values in logprobs.items()}
    choice = {
        "index": prompt * job.n + place,
        **form.message(job.echoed[prompt] + delta.text),
        "logprobs": logprobs,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }
    if form.prompt_in_choice:
        choice |= _of_prompt(job, prompt, part)
    if job.token_ids:
        choice["token_ids"] = delta.token_ids
    return choice


def _of_prompt(job: GenerationJob, prompt: int, part: _PromptPart) -> dict[str, Any]:
    """What the request wants to know of a prompt."""
    told: dict[str, Any] = {}
    if part.detailed is not None:
        told["prompt_logprobs"] = part.detailed
    if job.prompt_token_ids:
        told["prompt_token_ids"] = job.prompts[prompt]
    return told


class ChunkRenderer:
    """Server-sent events of one streamed answer.

    Args:
        job: the request.
        form: that of the route.
        envelope: of every chunk.
        pieces: of the prompts, if the job wants their log-probabilities: complete for a prompt once a choice of it has
            an event.
        context: tokens of the saved state that every prompt continues.
    """

    def __init__(
        self, job: GenerationJob, form: AnswerForm, envelope: Envelope, pieces: PromptPieces, context: int = 0
    ) -> None:
        self._job = job
        self._form = form
        self._pieces = pieces
        # Prompts whose choices begin with its log-probabilities, and therefore have to wait for them.
        self._unopened = set(range(len(job.prompts))) if job.echoes_logprobs else set()
        self._readers = [_reader(job, form, index, index // job.n) for index in range(job.num_choices)]
        self._usage = UsageCounter(job, context)
        self._running = job.num_choices
        # The constant parts of a chunk, written once: serializing is most of what a stream costs.
        self._head = b"data: " + to_json(envelope.json(form.chunk_kind, job.model))[:-1] + b',"choices":['
        self._usage_tail = (b',"usage":null}' if job.include_usage else b"}") + b"\n\n"
        self._heads = [b'%b{"index":%d,' % (self._head, index) for index in range(job.num_choices)]
        self._text_heads = [head + form.text_head for head in self._heads]
        self._plain_tail = form.text_tail + b',"logprobs":null,"finish_reason":null}]' + self._usage_tail
        # Whether every token makes a chunk, also one that adds no text yet.
        self._always = job.token_ids or job.logprobs is not None

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return self._running == 0

    @property
    def opens_late(self) -> bool:
        """Whether log-probabilities of prompts are still to be written."""
        return bool(self._unopened)

    def opening(self) -> bytes:
        """Chunks that do not wait for the engine: a role, an echoed prompt, its token ids; empty if there are none."""
        if self._job.echoes_logprobs:
            return b""
        return b"".join([self._opening(index) for index in range(self._job.num_choices)])

    def _opening(self, index: int, logprobs: bytes = b"null") -> bytes:
        """The first chunk of a choice, before anything generated; empty if there is nothing to tell.

        Args:
            index: of the choice.
            logprobs: JSON, of the prompt.
        """
        job = self._job
        text = job.echoed[index // job.n]
        opening = self._form.opening(text)
        if opening is None:
            if not job.prompt_token_ids and logprobs == b"null":
                return b""
            opening = self._form.text_head + to_json(text) + self._form.text_tail
        chunk = self._heads[index] + opening + b',"logprobs":' + logprobs + b',"finish_reason":null'
        if job.token_ids:
            chunk += b',"token_ids":[]'
        ids = b',"prompt_token_ids":' + to_json(job.prompts[index // job.n]) if job.prompt_token_ids else b""
        chunk += ids + b"}]" if self._form.prompt_in_choice else b"}]" + ids
        return chunk + self._tail(index)

    def _late_openings(self, prompt: int) -> bytes:
        """The first chunks of all choices of a prompt, whose log-probabilities have arrived."""
        self._unopened.remove(prompt)
        logprobs = to_json(_prompt_part(self._job, self._form, prompt, self._pieces).echoed)
        first = prompt * self._job.n
        return b"".join([self._opening(index, logprobs) for index in range(first, first + self._job.n)])

    def chunks(self, events: Sequence[ChoiceEvent]) -> bytes:
        """One chunk per event that tells something, ended by usage and DONE after the last one."""
        chunks: list[bytes] = []
        for event in events:
            if self._unopened and event.choice // self._job.n in self._unopened:
                chunks.append(self._late_openings(event.choice // self._job.n))
            chunks.append(self._chunk(self._readers[event.choice].read(event), event.state))
        data = b"".join(chunks)
        return data if self._running else data + self._closing()

    def _chunk(self, delta: Delta, state: StateInfo | None) -> bytes:
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
        saved = b"" if state is None else b',"state":' + to_json(state_json(state))
        return text + rest + b"}]" + saved + self._tail(delta.choice)

    def _tail(self, choice: int) -> bytes:
        """What ends a chunk of this choice, behind its list of choices."""
        if not self._job.continuous_usage:
            return self._usage_tail
        return b',"usage":' + to_json(self._usage.json_of(choice)) + b"}\n\n"

    def _closing(self) -> bytes:
        if not self._job.include_usage:
            return DONE
        return self._head + b'],"usage":' + to_json(self._usage.json()) + b"}\n\n" + DONE
