"""How many prompt tokens a step absorbs, and of which prompts."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

from server.component_settings import CHUNK
from server.engine.sequence import Sequence
from server.engine.step_shapes import PromptLimit

PREFILL_GRID = CHUNK
"""Prompt pieces end at multiples of this position (the kernels' chunk), or at the prompt's end."""


_MOST_PAUSES = 3
"""Steps in a row that leave prompts alone: requests that were absorbed in one step after the other fold in one step
after the other, too."""


class Reuse(Protocol):
    """What the scheduler asks of prefix reuse; see :class:`server.engine.reuse.PrefixReuse`."""

    def admit(self, seq: Sequence) -> bool:
        """Decide where a waiting sequence begins; False: it should wait for a snapshot that is on its way."""

    def withdraw(self, seq: Sequence) -> None:
        """An admitted sequence did not get a slot after all."""

    def is_wanted(self, seq: Sequence) -> bool:
        """Whether to take a snapshot where the newest launched piece of a prompt ends."""


class PromptBudget:
    """Shares what a step can absorb among the prompts.

    Args:
        max_num_batched_tokens: of a step, decodes included. A prompt still makes progress by one grid piece per step
            when decodes alone use them up.
        limits: in ascending order, the first without decodes. Larger batches are limited like the last; empty: prompts
            get what decodes leave.
        num_slots: the most sequences of a step.
        reuse: lets prompts begin from snapshots; None: every prompt is absorbed from its beginning.

    Attributes:
        tokens: most tokens of a step.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        limits: tuple[PromptLimit, ...],
        num_slots: int,
        reuse: Reuse | None,
    ) -> None:
        self.tokens = max_num_batched_tokens
        self._limits = limits
        self._num_slots = num_slots
        self._reuse = reuse
        self._pauses = 0

    def limit(self, decodes: int, folds: int) -> PromptLimit:
        """How many prompt tokens a step with so many decodes and folds absorbs, and of how many prompts.

        A step may leave prompts alone for the sake of its folds, but never four in a row.
        """
        limits = self._limits
        tokens, prompts = max(self.tokens - decodes, PREFILL_GRID), self._num_slots
        if limits:
            index = min(bisect_left(limits, (decodes,)), len(limits) - 1)
            index = min(bisect_left(limits, (limits[index].decodes, folds)), len(limits) - 1)
            least = 0 if limits[index].tokens == 0 and self._pauses < _MOST_PAUSES else PREFILL_GRID
            tokens, prompts = max(least, min(tokens, limits[index].tokens)), limits[index].prompts
        self._pauses = 0 if tokens else self._pauses + 1
        return PromptLimit(decodes, folds, tokens, prompts)

    def share(
        self, prompts: list[Sequence], limit: PromptLimit, replace: Callable[[Sequence], Sequence | None]
    ) -> tuple[dict[Sequence, int], list[Sequence]]:
        """Tokens of each prompt to absorb in a step, for those that get any, in order.

        Each prompt in turn may take half of what is left, and what the others do not need goes to the first again:
        short prompts are absorbed in order, and a long one does not hold up those behind it.

        Args:
            prompts: sequences with prompt tokens left, the one to be served first first.
            limit: most tokens in all, at least PREFILL_GRID, and most prompts; or no tokens: everybody waits.
            replace: told of a prompt that turns out to have to wait for a snapshot; it may name another one, which then
                comes behind all others.

        Returns:
            The tokens by sequence, and the sequences that turn out to have a snapshot of their whole prompt.
        """
        granted: dict[Sequence, int] = {}
        replayed: list[Sequence] = []
        left = limit.tokens
        if not left:
            return granted, replayed
        prompts = prompts.copy()
        for seq in prompts:
            if len(granted) == limit.prompts:
                break
            is_new = seq.slot is None and not seq.swapped and self._reuse is not None
            if self._reuse is not None and is_new and not self._reuse.admit(seq):
                if (other := replace(seq)) is not None:
                    prompts.append(other)
                continue
            if not seq.prompt_remaining:
                replayed.append(seq)
                continue
            length = _piece(seq, 0, min(left, max(left // 2, PREFILL_GRID)))
            if not length:
                # First come, first served: the shorter piece of a later prompt must not overtake this one.
                if self._reuse is not None and is_new:
                    self._reuse.withdraw(seq)
                break
            granted[seq] = length
            left -= length
        for seq, length in granted.items():
            more = _piece(seq, length, left)
            granted[seq] += more
            left -= more
        return granted, replayed


def _piece(seq: Sequence, granted: int, limit: int) -> int:
    """The longest further piece of a prompt within a limit that ends on the grid, or where the prompt has to stop."""
    start = seq.num_launched + granted
    remaining = seq.prompt_stop - start
    if remaining <= limit:
        return remaining
    return max(0, (start + limit) // PREFILL_GRID * PREFILL_GRID - start)
