"""Which tokens the next step absorbs, and who holds which slot.

There is no prefill phase: a sequence has tokens still to be absorbed, and each step absorbs some,
under a token budget. Decodes (one token each) come first; prompts share the rest in order of
arrival, in pieces that end on a fixed grid of positions, so that how a prompt is cut does not
change its result.
"""

from collections import OrderedDict
from collections.abc import Iterable

from server.engine.batch import Batch, Span
from server.engine.sequence import Sequence
from server.engine.state_pool import SlotAllocator
from server.types import FinishReason

PREFILL_GRID = 64
"""Prompt pieces end at multiples of this position (the kernels' chunk), or at the prompt's end."""


class Scheduler:
    """Owns every sequence from submission to the release of its slot.

    Args:
        allocator: the slots; one per running sequence.
        max_num_batched_tokens: token budget of a step. A prompt still makes progress by one grid
            piece per step when decodes alone fill the budget.
        max_num_queued_reqs: choices that may wait beyond those a free slot awaits.
    """

    def __init__(self, allocator: SlotAllocator, *, max_num_batched_tokens: int, max_num_queued_reqs: int) -> None:
        self.allocator = allocator
        self._token_budget = max_num_batched_tokens
        self._max_queued = max_num_queued_reqs
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.running: dict[Sequence, None] = {}

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.running or self.waiting)

    def has_room(self, num_choices: int) -> bool:
        """Whether so many more sequences may join the queue, all of them."""
        return len(self.waiting) + num_choices <= self.allocator.num_free + self._max_queued

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences behind those that wait already."""
        for seq in sequences:
            self.waiting[seq] = None

    def schedule(self, now: float) -> Batch | None:
        """Choose the next step's spans and count them as launched; None when there is nothing to do.

        Args:
            now: ``time.monotonic()``, noted as the moment of admission of newly leased sequences.
        """
        decodes = [
            self._launch(seq, 1) for seq in self.running if seq.num_launched >= len(seq.prompt) and seq.wants_token
        ]
        # By slot: dense slots let the CPU backend work on a view of the pool, and the order of rows means nothing.
        decodes.sort(key=lambda span: span.slot)
        budget = max(self._token_budget - len(decodes), PREFILL_GRID)
        prefills: list[Span] = []
        leased: list[Sequence] = []
        for seq in self.running:
            if budget <= 0:
                break
            if seq.prompt_remaining:
                budget -= self._launch_prompt(seq, budget, prefills)
        while budget > 0 and self.waiting and self.allocator.num_free:
            seq, _ = self.waiting.popitem(last=False)
            seq.slot = self.allocator.lease()
            seq.admitted = now
            self.running[seq] = None
            leased.append(seq)
            budget -= self._launch_prompt(seq, budget, prefills)
        if not decodes and not prefills:
            return None
        return Batch(tuple(decodes), tuple(prefills), tuple(leased))

    def _launch_prompt(self, seq: Sequence, budget: int, prefills: list[Span]) -> int:
        """Append the longest piece of the prompt that fits; returns its length, or the budget if none does."""
        end = len(seq.prompt)
        if seq.prompt_remaining > budget:
            end = (seq.num_launched + budget) // PREFILL_GRID * PREFILL_GRID
        length = end - seq.num_launched
        if length <= 0:
            # First come, first served: a later prompt's shorter piece must not overtake this one.
            return budget
        prefills.append(self._launch(seq, length))
        return length

    @staticmethod
    def _launch(seq: Sequence, length: int) -> Span:
        assert seq.slot is not None
        start = seq.num_launched
        samples = start + length >= len(seq.prompt)
        span = Span(seq, seq.slot, start, length, samples, seq.num_sampled)
        seq.num_launched += length
        seq.num_sampled += samples
        seq.in_flight += 1
        return span

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence, waiting or running. Its slot is released once no launched step refers to it."""
        assert not seq.finished
        seq.finish_reason = reason
        if seq.slot is None:
            del self.waiting[seq]
            return
        del self.running[seq]
        self._release_if_idle(seq)

    def retire(self, batch: Batch) -> None:
        """Note that a launched step has completed: release the slots nobody refers to any more."""
        for span in batch.spans:
            span.seq.in_flight -= 1
            if span.seq.finished:
                self._release_if_idle(span.seq)

    def _release_if_idle(self, seq: Sequence) -> None:
        if seq.in_flight == 0:
            assert seq.slot is not None
            self.allocator.release(seq.slot)
            seq.slot = None
