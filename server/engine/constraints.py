"""Constraints on a sequence's next token that depend on its tokens so far: a grammar, phrases it must not say.

They are followed on the host. What they allow is a mask of one bit per token, packed into 32-bit words [R, W]. Masks
are computed in threads, while the device computes the step at whose end they are needed.
"""

import enum
import logging
import os
import time
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache

import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from server.grammar import GrammarVocabulary
from server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_THREADS = 4
"""Jobs at once, of grammars that take long, and as many of those that do not."""
_JOB_SECONDS = 0.01
_ROW_SECONDS = 0.0005
"""A job that takes more than this, and for each of its rows this in addition, holds somebody up."""
_CACHED_GRAMMARS = 64
_WORD = 32


class Verdict(enum.Enum):
    """What a constraint says of the next token."""

    OPEN = enum.auto()
    """One of those in the mask."""
    COMPLETE = enum.auto()
    """The text is complete, and nothing can follow."""
    BROKEN = enum.auto()
    """The grammar cannot be followed any further: it has become too complex, or no token of the model continues it."""


class MaskJob:
    """The masks of some sequences' next tokens, being computed.

    Attributes:
        future: done when they are; it has no result and never fails.
        masks_RW: int32 [R, W], once done.
        verdicts: one per row, once done.
    """

    __slots__ = ("future", "masks_RW", "verdicts")

    future: "Future[None]"

    def __init__(self, masks_RW: Tensor) -> None:
        self.masks_RW = masks_RW
        self.verdicts = [Verdict.OPEN] * len(masks_RW)


class Constraint:
    """One sequence's constraints and how far they have been followed. Used by one job at a time.

    Args:
        grammar: made by :mod:`server.grammar`; None: none.
        phrases: token ids, two or more each; the last one is banned where the others are the newest tokens.

    Attributes:
        job: computes the mask of the next token; None: none has been asked for.
        row: in the job's masks.
        slow: whether its last job took long, be it because of others in the job.
    """

    __slots__ = ("_longest", "_outputs", "_phrases", "grammar", "job", "matcher", "row", "slow")

    def __init__(self, grammar: str | None, phrases: SequenceOf[tuple[int, ...]]) -> None:
        self.grammar = grammar
        # By the last token but one: few phrases need a look at every step.
        self._phrases: dict[int, list[tuple[int, ...]]] = {}
        for phrase in phrases:
            self._phrases.setdefault(phrase[-2], []).append(phrase)
        self._longest = max(map(len, phrases), default=0)
        self.matcher: LLMatcher | None = None
        self._outputs: list[int] = []
        self.job: MaskJob | None = None
        self.row = 0
        self.slow = False

    @property
    def ready(self) -> bool:
        """Whether the mask of the next token has been computed."""
        return self.job is not None and self.job.future.done()

    @property
    def verdict(self) -> Verdict:
        """What it says; only where it is ready."""
        assert self.job is not None
        return self.job.verdicts[self.row]

    def ends_with(self, token: int) -> bool:
        """Take a last token; whether it makes the text complete, so that nothing can follow. Only where ready."""
        return self.matcher is not None and self.matcher.consume_token(token) and self.matcher.is_stopped()

    def take(self, token: int) -> None:
        """Note a sampled token, for the phrases."""
        if self._phrases:
            self._outputs.append(token)
            del self._outputs[: -self._longest]

    def banned(self) -> list[int]:
        """Tokens that would complete a phrase."""
        tail = tuple(self._outputs)
        phrases = self._phrases.get(tail[-1], []) if tail else []
        return [phrase[-1] for phrase in phrases if tail[1 - len(phrase) :] == phrase[:-1]]


class Constraints:
    """Makes constraints and computes their masks, in threads of its own.

    Args:
        tokenizer: None: there are no grammars.
        vocab_size: V, of the model.
        eos_token_ids: of the model.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: SequenceOf[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids) or (vocab_size,)  # without one, grammars end with an id that nobody has
        self._num_words = mask_words(max(vocab_size, self._eos[0] + 1))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="masks")
        self._slow_threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="slow-masks")
        self._prototype = lru_cache(_CACHED_GRAMMARS)(self._compile)

    def follow(self, sampled: SequenceOf[tuple[Constraint, int | None]]) -> None:
        """Have the masks of next tokens computed.

        The quick ones together, which costs least; of the others each grammar apart, so that nobody waits for another's
        again. Those that were slow for another's sake only are quick when they are apart, and then rejoin the rest.

        Args:
            sampled: constraints, and the token that each has to take before; None: it is at its beginning.
        """
        quick = [each for each in sampled if not each[0].slow]
        if quick:
            self._submit(self._threads, quick)
        apart: dict[str | None, list[tuple[Constraint, int | None]]] = {}
        for constraint, token in sampled:
            if constraint.slow:
                apart.setdefault(constraint.grammar, []).append((constraint, token))
        for group in apart.values():
            self._submit(self._slow_threads, group)

    def _submit(self, threads: ThreadPoolExecutor, sampled: SequenceOf[tuple[Constraint, int | None]]) -> None:
        job = MaskJob(torch.full((len(sampled), self._num_words), -1, dtype=torch.int32))
        for row, (constraint, _) in enumerate(sampled):
            constraint.job, constraint.row = job, row
        job.future = threads.submit(self._run, job, sampled)

    def _run(self, job: MaskJob, sampled: SequenceOf[tuple[Constraint, int | None]]) -> None:
        begun = time.perf_counter()
        try:
            self._follow(job, sampled)
        except BaseException:  # also what Rust calls a panic; nobody else may suffer from it
            logger.exception("grammars could not be followed")
            job.verdicts = [Verdict.BROKEN] * len(sampled)
        slow = time.perf_counter() - begun > _JOB_SECONDS + _ROW_SECONDS * len(sampled)
        for constraint, _ in sampled:
            constraint.slow = slow

    def _follow(self, job: MaskJob, sampled: SequenceOf[tuple[Constraint, int | None]]) -> None:
        matchers: list[tuple[LLMatcher, int]] = []
        consumed: list[tuple[LLMatcher, int]] = []
        for row, (constraint, token) in enumerate(sampled):
            try:
                matcher = self._matcher(constraint)
                if token is not None:
                    constraint.take(token)
            except BaseException:
                logger.exception("a grammar cannot be followed")
                job.verdicts[row] = Verdict.BROKEN
                continue
            if matcher is not None:
                matchers.append((matcher, row))
                if token is not None:
                    consumed.append((matcher, token))
        masks_RW = job.masks_RW
        if consumed:
            self._executor.consume_token_par(consumed)
        if matchers:
            self._executor.unsafe_compute_mask_ptr(
                matchers, masks_RW.data_ptr(), self._num_words * masks_RW.itemsize, len(sampled)
            )
        for matcher, row in matchers:
            job.verdicts[row] = self._judge(matcher, masks_RW[row])
        for row, (constraint, _) in enumerate(sampled):
            if banned := constraint.banned():
                _clear(masks_RW[row], banned)

    def _matcher(self, constraint: Constraint) -> LLMatcher | None:
        if constraint.matcher is None and constraint.grammar is not None:
            constraint.matcher = self._prototype(constraint.grammar).deep_copy()
        return constraint.matcher

    def _judge(self, matcher: LLMatcher, mask_W: Tensor) -> Verdict:
        """The verdict on a mask; makes end-of-sequence tokens beyond the first count like the first."""
        if matcher.is_error():
            logger.warning("a grammar cannot be followed any further: %s", matcher.get_error().partition("\n")[0])
            return Verdict.BROKEN
        if matcher.is_stopped() or torch.equal(mask_W, self._only_eos_W):
            return Verdict.COMPLETE
        first, *others = self._eos
        may_end = bool(mask_W[first // _WORD] & _bit(first))
        for token in others:
            if may_end:
                mask_W[token // _WORD] |= _bit(token)
            else:
                mask_W[token // _WORD] &= ~_bit(token)
        return Verdict.OPEN

    def _compile(self, grammar: str) -> LLMatcher:
        return self._vocabulary.matcher(grammar)

    @cached_property
    def _vocabulary(self) -> GrammarVocabulary:
        assert self._tokenizer is not None
        eos = self._eos[0]
        return GrammarVocabulary(self._tokenizer, self._vocab_size, eos if eos < self._vocab_size else None)

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(max(1, min((os.cpu_count() or 1) - 1, 32)))

    @cached_property
    def _only_eos_W(self) -> Tensor:
        mask_W = torch.zeros(self._num_words, dtype=torch.int32)
        mask_W[self._eos[0] // _WORD] = _bit(self._eos[0])
        return mask_W


def mask_words(num_tokens: int) -> int:
    """Words of a mask of so many tokens."""
    return -(-num_tokens // _WORD)


def _clear(mask_W: Tensor, tokens: SequenceOf[int]) -> None:
    """Take tokens out of a mask; there may be thousands, and an operation for each would take too long."""
    words: dict[int, int] = {}
    for token in tokens:
        words[token // _WORD] = words.get(token // _WORD, -1) & ~_bit(token)
    mask_W[list(words)] &= torch.tensor(list(words.values()), dtype=torch.int32)


def _bit(token: int) -> int:
    """The token's bit in its word, as a signed number."""
    bit = 1 << (token % _WORD)
    return bit - (1 << _WORD) if bit >= 1 << (_WORD - 1) else bit


def allowed_RV(masks_RW: Tensor, vocab_size: int) -> Tensor:
    """Masks with their bits spread out: bool [R, V]."""
    shifts = torch.arange(_WORD, dtype=torch.int32, device=masks_RW.device)
    return ((masks_RW[:, :, None] >> shifts) & 1).bool().flatten(1)[:, :vocab_size]
