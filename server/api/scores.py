"""Log-probabilities of prompts: from the engine's packed pieces to the two forms in which answers carry them."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.api.deltas import TokenNames, finite, name_alternatives, new_decoder
from server.types import PromptLogprobs

_to_json = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class TokenScore:
    """What is known of one token of a prompt.

    Attributes:
        logprob: its log-probability.
        rank: how many tokens were at least as likely, itself included.
        top_ids, top: the most likely tokens at its position, and their log-probabilities, in order.
    """

    logprob: float
    rank: int
    top_ids: Sequence[int]
    top: Sequence[float]


class PromptScores:
    """One prompt's tokens and what the engine found of them.

    Args:
        token_ids: the prompt.
        pieces: what the engine sent, in order; together it speaks of every token but the first.
        names: how to write tokens.
    """

    def __init__(self, token_ids: Sequence[int], pieces: Iterable[PromptLogprobs], names: TokenNames) -> None:
        self._token_ids = token_ids
        self._names = names
        self._logprobs, self._ranks = array("f"), array("i")
        self._top_ids, self._top = array("i"), array("f")
        for piece in pieces:
            self._logprobs.frombytes(piece.logprobs)
            self._ranks.frombytes(piece.ranks)
            self._top_ids.frombytes(piece.top_ids)
            self._top.frombytes(piece.top)
        assert len(self._logprobs) == len(token_ids) - 1
        self._num_top = len(self._top) // max(len(self._logprobs), 1)

    def listed(self, text: str, num_top: int) -> dict[str, Any]:
        """Parallel lists, as OpenAI's completions have them of an echoed prompt; the first token has null.

        Args:
            text: the prompt as it is echoed.
            num_top: alternatives to report per token, at most as many as were asked for of the engine.
        """
        tokens = [self._names.text(token_id) for token_id in self._token_ids]
        logprobs: list[float | None] = [None]
        tops: list[dict[str, float] | None] = [None]
        for token, score in zip(tokens[1:], self._scores(num_top), strict=True):
            logprob = finite(score.logprob)
            logprobs.append(logprob)
            tops.append(name_alternatives(self._names, token, logprob, score.top_ids, score.top))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": self._offsets(text),
        }

    def detailed(self, num_top: int) -> msgspec.Raw:
        """vLLM's ``prompt_logprobs``: of each token, it and the most likely ones by id; null for the first.

        Returns:
            A JSON list: there may be millions of objects, and as text they take a tenth of the memory.
        """
        entries = [b"null"]
        for token_id, score in zip(self._token_ids[1:], self._scores(num_top), strict=True):
            ranked = [(token_id, score.logprob, score.rank)]
            ranked += [
                (other, logprob, place)
                for place, (other, logprob) in enumerate(zip(score.top_ids, score.top, strict=True), 1)
                if other != token_id
            ]
            entries.append(
                _to_json(
                    {
                        other: {"logprob": finite(logprob), "rank": rank, "decoded_token": self._names.decoded(other)}
                        for other, logprob, rank in ranked
                    }
                )
            )
        return msgspec.Raw(b"[" + b",".join(entries) + b"]")

    def _scores(self, num_top: int) -> Iterator[TokenScore]:
        """Of every token but the first."""
        for place, (logprob, rank) in enumerate(zip(self._logprobs, self._ranks, strict=True)):
            start = place * self._num_top
            top = slice(start, start + num_top)
            yield TokenScore(logprob, rank, self._top_ids[top], self._top[top])

    def _offsets(self, text: str) -> list[int]:
        """Where each token begins in the text, in characters."""
        decoder = new_decoder("replace")
        offsets = []
        end = 0
        for token_id in self._token_ids:
            offsets.append(end)
            end += len(decoder.decode(self._names.bytes(token_id)))
        # Tokenizers that put a space before a text do not give it back.
        missing = max(end - len(text), 0)
        return [max(offset - missing, 0) for offset in offsets]
