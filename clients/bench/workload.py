"""What is sent: conversations of one or several turns, drawn from a seed, and the moments at which they begin."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

TOKEN_IDS = range(1000, 2000)
"""Ids that random prompts are drawn from: ordinary tokens in the vocabulary of any model that is not tiny."""
_NOUNS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information"
)
"""Common ones, a token each for most tokenizers: random prompts for endpoints that take only text."""
_WORDS = _NOUNS.split()

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation.

    Attributes:
        prompt: what is new in this turn.
        max_tokens: to generate.
    """

    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow each other; each is sent together with all before it and their answers."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Uniform between ``mean * (1 - ratio)`` and ``mean * (1 + ratio)``, at least 1."""

    mean: int
    ratio: float

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return max(1, rng.randint(round(self.mean * (1 - self.ratio)), round(self.mean * (1 + self.ratio))))


def random_conversations(
    rng: random.Random, number: int, inputs: Lengths, outputs: Lengths, *, turns: int = 1, text: bool = False
) -> list[Conversation]:
    """Random prompts that share nothing.

    Args:
        rng: where everything is drawn from.
        number: of conversations.
        inputs, outputs: tokens of each turn.
        turns: of each conversation.
        text: words, about one token each, instead of token ids; several turns are always text.
    """
    as_text = text or turns > 1
    return [
        Conversation(tuple(Turn(_draw(rng, inputs.draw(rng), text=as_text), outputs.draw(rng)) for _ in range(turns)))
        for _ in range(number)
    ]


def shared_prefixes(
    rng: random.Random, number: int, prefixes: int, prefix_length: int, suffix: Lengths, outputs: Lengths, *, text: bool
) -> list[Conversation]:
    """Single prompts, each one of a few common beginnings with an end of its own, in random order."""
    beginnings = [_draw(rng, prefix_length, text=text) for _ in range(prefixes)]
    conversations = []
    for index in range(number):
        end = _draw(rng, suffix.draw(rng), text=text)
        prompt = join(beginnings[index % prefixes], end)
        conversations.append(Conversation((Turn(prompt, outputs.draw(rng)),)))
    rng.shuffle(conversations)
    return conversations


def passages(rng: random.Random, number: int, path: Path, inputs: Lengths, outputs: Lengths) -> list[Conversation]:
    """Single prompts that are passages of a text file, of so many words, begun at random places.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read as UTF-8 text.
        ValueError: it has no words.
    """
    words = path.read_text(encoding="utf-8").split()
    if not words:
        raise ValueError(f"{path} has no words")
    conversations = []
    for _ in range(number):
        length, start = inputs.draw(rng), rng.randrange(len(words))
        repeated = [words[(start + offset) % len(words)] for offset in range(length)]
        conversations.append(Conversation((Turn(" ".join(repeated), outputs.draw(rng)),)))
    return conversations


def join(first: Prompt, second: Prompt) -> Prompt:
    """Two parts of a prompt as one; both text, or both token ids."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first} {second}"
    assert isinstance(first, list) and isinstance(second, list)
    return first + second


def _draw(rng: random.Random, length: int, *, text: bool) -> Prompt:
    return " ".join(rng.choices(_WORDS, k=length)) if text else rng.choices(TOKEN_IDS, k=length)


@dataclass(frozen=True, slots=True)
class Ramp:
    """A request rate that changes from the first request to the last.

    Attributes:
        strategy: along a line, or by equal factors.
        start, end: requests per second.
    """

    strategy: Literal["linear", "exponential"]
    start: float
    end: float

    def rate(self, progress: float) -> float:
        """Requests per second when this share of the requests has been sent."""
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * progress
        return self.start * float((self.end / self.start) ** progress)


def arrivals(rng: random.Random, number: int, rate: float | Ramp, burstiness: float) -> Sequence[float]:
    """Seconds from the start at which each conversation begins, ascending.

    The intervals follow a gamma distribution of shape ``burstiness``: 1 is a Poisson process, less comes in bursts,
    more comes evenly. With a fixed rate, the last one comes when the rate says it should.

    Args:
        rng: where the intervals are drawn from.
        number: of conversations.
        rate: per second; infinite: all at once.
        burstiness: above 0.
    """
    if rate == float("inf"):
        return [0.0] * number
    moments = list(_moments(rng, number, rate, burstiness))
    if isinstance(rate, Ramp) or number < 2 or not moments[-1]:
        return moments
    factor = (number - 1) / rate / moments[-1]
    return [moment * factor for moment in moments]


def _moments(rng: random.Random, number: int, rate: float | Ramp, burstiness: float) -> Iterator[float]:
    moment = 0.0
    for index in count():
        if index == number:
            return
        yield moment
        current = rate.rate(index / max(1, number - 1)) if isinstance(rate, Ramp) else rate
        moment += rng.gammavariate(burstiness, 1 / (current * burstiness))
