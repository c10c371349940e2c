"""From a request to the sequences that it asks for."""

import random
from dataclasses import dataclass

from server.engine.constraints import Constraint
from server.engine.detokenizer import StopMatcher
from server.engine.named_states import NamedState
from server.engine.radix import TOKEN_BYTES
from server.engine.sequence import Save, Sequence, Tokens
from server.tokenizer import Tokenizer
from server.types import GenerateRequest, unpack_tokens, view_tokens

_SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """The text of every token, in bytes; None: there is no tokenizer.

    Attributes:
        plain: nothing for special tokens.
        with_special: these too.
    """

    plain: list[bytes] | None = None
    with_special: list[bytes] | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, vocab_size: int) -> "TokenTexts":
        """Those of a tokenizer, for a model of so many tokens."""
        if tokenizer is None:
            return cls()
        # A model's vocabulary may be padded beyond the tokenizer's: such a token has no text.
        missing = [b""] * (vocab_size - tokenizer.vocab_size)
        return cls(tokenizer.token_bytes() + missing, tokenizer.token_bytes(special=True) + missing)


class Requests:
    """Makes sequences of requests.

    Args:
        texts: of the tokens.
        eos: token ids that end an answer.
        max_model_len: most tokens of a sequence; None: unlimited.
        seed: of the seeds of requests that bring none.

    Attributes:
        texts: the same.
    """

    def __init__(self, texts: TokenTexts, eos: frozenset[int], max_model_len: int | None, seed: int) -> None:
        self.texts = texts
        self._eos = eos
        self._max_model_len = max_model_len
        self._seeds = random.Random(seed)

    def sequences(self, client: bytes, request: GenerateRequest, state: NamedState | None) -> list[Sequence]:
        """One per choice; of each prompt's, the first leads the others.

        Args:
            client: the API process that sent it.
            request: validated by the API process.
            state: which the prompts continue; None: they are beginnings.
        """
        context = b"" if state is None else state.tokens
        # One prompt, however many choices share it. A whole one stays where it is: it may be long, and mostly known.
        view = unpack_tokens if request.more else view_tokens
        prompts = [view(context + prompt) for prompt in request.prompts]
        sequences = [
            self._sequence(client, request, choice, prompts[choice // request.n])
            for choice in range(request.num_choices)
        ]
        if state is not None:
            for seq in sequences:
                seq.island, seq.context = state.island, state
        for index in range(0, len(sequences), request.n):
            leader, *followers = sequences[index : index + request.n]
            leader.followers = followers
            for seq in followers:
                seq.leader = leader
        return sequences

    def _sequence(self, client: bytes, request: GenerateRequest, choice: int, prompt: Tokens) -> Sequence:
        params = request.params
        max_tokens = params.max_tokens
        context = len(prompt) - len(request.prompts[choice // request.n]) // TOKEN_BYTES
        if self._max_model_len is not None:
            room = self._max_model_len - len(prompt)
            max_tokens = room if max_tokens is None else min(max_tokens, room)
        if params.seed is None:
            seed = self._seeds.getrandbits(_SEED_BITS)
        else:
            seed = random.Random(f"{params.seed}/{choice % request.n}").getrandbits(_SEED_BITS)
        phrases = [phrase for phrase in params.bad_words if len(phrase) > 1]
        return Sequence(
            client=client,
            request_id=request.request_id,
            choice=choice,
            prompt=prompt,
            params=params,
            seed=seed,
            table=self.texts.plain if params.skip_special_tokens else self.texts.with_special,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos),
            max_tokens=max_tokens,
            matcher=StopMatcher(params.stop, include=params.include_stop_str_in_output) if params.stop else None,
            constraint=Constraint(params.grammar, phrases) if params.grammar is not None or phrases else None,
            arrived=request.arrived,
            priority=request.priority,
            checkpoint_at=tuple(context + position for position in request.checkpoint_at),
            tenant=request.tenant,
            session=request.session,
            streams=request.more,
            grows=request.more,
            save=Save(request.state_name, request.state_ttl, request.state_turn) if request.save_state else None,
        )
