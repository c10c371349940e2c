"""Which tokens the next step absorbs, and who holds which slot.

There is no prefill phase: a sequence has tokens still to be absorbed, and each step absorbs some,
under a token budget. Decodes (one token each) come first; prompts share the rest, tenant by tenant, the
most urgent and of those the oldest getting most, in pieces that end on a fixed grid of positions, so that
how a prompt is cut does not change its result.
"""

from array import array
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Protocol

from server.engine.admission import Admission
from server.engine.batch import Batch, Fork, Span
from server.engine.prompt_budget import PromptBudget, Reuse
from server.engine.queue import WaitingQueue, in_turns
from server.engine.sequence import Sequence
from server.engine.state_pool import SlotAllocator
from server.engine.step_shapes import PromptLimit
from server.types import FinishReason, Refusal, RefusalReason

_slot = attrgetter("slot")

_RESERVED_SHARE = 16
"""One in so many places of the queue stays free of any one tenant."""

MAX_KEPT_PROMPTS = 16
"""Prompts whose state is kept in memory for answers that wait for a slot."""


class Swap(Protocol):
    """What the scheduler asks of the memory for swapped states; see :class:`server.engine.swap.SwapSpace`."""

    def room(self, num_swapped: int) -> int:
        """How many more sequences may be taken out of their slots now, of whom so many are already."""


class Scheduler:
    """Owns every sequence from submission to the release of its slot.

    Args:
        allocator: the slots; one per running sequence.
        max_num_queued_reqs: choices that may wait beyond those a free slot awaits.
        max_seqs_per_tenant: choices that one tenant may have waiting and running; None: unlimited.
        several_tenants: whether a part of the queue is kept free of any one tenant.
        max_num_batched_tokens, prompt_limits: see :class:`PromptBudget`.
        ring_size: tokens of a state's ring, 0: there are none. It is folded, which takes time, at multiples of this
            position: absolute ones, so that a result does not depend on the batch.
        reuse: lets prompts begin from snapshots; None: every prompt is absorbed from its beginning.
        swap: has room for what running sequences have absorbed; None: they keep their slots until they end.
    """

    def __init__(
        self,
        allocator: SlotAllocator,
        *,
        max_num_batched_tokens: int,
        max_num_queued_reqs: int,
        max_seqs_per_tenant: int | None = None,
        several_tenants: bool = False,
        prompt_limits: tuple[PromptLimit, ...] = (),
        ring_size: int = 0,
        reuse: Reuse | None = None,
        swap: Swap | None = None,
    ) -> None:
        self.allocator = allocator
        self._reuse = reuse
        self._swap = swap
        self._ring_size = ring_size
        self._budget = PromptBudget(max_num_batched_tokens, prompt_limits, allocator.num_slots, reuse)
        self._max_queued = max_num_queued_reqs
        self._max_per_tenant = max_seqs_per_tenant
        self._several_tenants = several_tenants
        self.waiting = WaitingQueue()
        self._admission = Admission(self.waiting, allocator)
        self.running: dict[Sequence, None] = {}
        self.held: dict[Sequence, None] = {}
        """Running sequences whose next token is yet to be sampled, when the mask of their constraint is known."""
        self.swapped: dict[Sequence, None] = {}
        """Waiting sequences that have run."""
        self._starved: dict[Sequence, None] = {}
        """Sequences, waiting or running, that wait for more of their prompt."""
        self._victims: dict[Sequence, Sequence] = {}
        """Of the step being scheduled: who gives a slot up, by who gets one."""
        self._swaps: list[tuple[Sequence, int]] = []
        """Of the step being scheduled: who has given a slot up, and which."""
        self._kept: dict[Sequence, Sequence] = {}
        """Waiting sequences that have, or are about to get, a snapshot of their prompt, each with who absorbed it."""

    @property
    def token_budget(self) -> int:
        """Most tokens of a step."""
        return self._budget.tokens

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs, save those that wait for more of their prompt."""
        return len(self.running) + len(self.waiting) > len(self._starved)

    @property
    def max_request_choices(self) -> int:
        """The most sequences that can be added at once, to an idle scheduler."""
        most = self.allocator.num_slots + self._queue_share(self._max_queued)
        return most if self._max_per_tenant is None else min(most, self._max_per_tenant)

    def refusal(self, tenant: str, num_choices: int) -> Refusal | None:
        """Why so many more sequences of a tenant may not join the queue; None: all of them may."""
        num_open = self.waiting.num_open(tenant)
        if self._max_per_tenant is not None and num_open + num_choices > self._max_per_tenant:
            return Refusal(
                RefusalReason.TENANT_LIMIT,
                f"this API key has {num_open} choices waiting or running: no place for {num_choices} more "
                f"(--max-concurrent-seqs-per-key {self._max_per_tenant})",
            )
        own = self.waiting.num_waiting(tenant)
        places = self._queue_share(self._max_queued - len(self.waiting) + own)
        if own + num_choices > self.allocator.num_free + places:
            return Refusal(
                RefusalReason.QUEUE_FULL,
                f"the queue is full: no place for {num_choices} more choices beside the {len(self.waiting)} that wait "
                f"(--max-num-queued-reqs {self._max_queued})",
            )
        return None

    def _queue_share(self, places: int) -> int:
        """How many of the places that others leave in the queue one tenant may take.

        Where there are several, a part stays free, so that a newcomer is never refused for what one other has queued.
        """
        return places - max(places, 0) // _RESERVED_SHARE if self._several_tenants else places

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences behind those of their tenants and priorities that wait already."""
        for seq in sequences:
            self._add(seq)

    def begin_again(self, seq: Sequence) -> Sequence:
        """End a sequence that has sampled nothing; the one that waits in its place, before its equals."""
        again = seq.again()
        again.followers, seq.followers = seq.followers, []
        for follower in again.followers:
            follower.leader = again
        self.finish(seq, FinishReason.ERROR)
        self._add(again, first=True)
        return again

    def _add(self, seq: Sequence, *, first: bool = False) -> None:
        self.waiting.add(seq, first=first)
        if seq.starved:
            self._starved[seq] = None
            self.waiting.set_aside(seq)

    def extend(self, seq: Sequence, tokens: "array[int]", *, last: bool) -> None:
        """Give a sequence more of its prompt; ``last``: all that is left of it."""
        assert isinstance(seq.prompt, array), "its prompt has come whole"
        seq.prompt.extend(tokens)
        seq.grows = not last
        if seq in self._starved and not seq.starved:
            del self._starved[seq]
            self.waiting.call_back(seq)

    def schedule(self, now: float) -> Batch | None:
        """Choose the next step's spans and count them as launched; None when there is nothing to do.

        Args:
            now: ``time.monotonic()``, noted as the moment of admission of newly leased sequences.
        """
        candidates = self._admission.candidates()
        self._swaps = []
        self._victims = self._choose_victims(candidates)
        candidates += self._victims
        leased = [seq for seq in candidates if seq.swapped and not seq.prompt_remaining]
        for seq in leased:
            self._lease(seq, now)
        decodes, prompts = self._launch_running()
        folding = self._folding(decodes)
        limit = self._budget.limit(len(decodes), len(folding))
        ready: list[Sequence] = []
        for seq in candidates:
            if seq.leader is None and seq.slot is None:
                (prompts if seq.prompt_remaining else ready).append(seq)
        pieces, replayed = self._share(prompts, limit, candidates)
        for seq in pieces:
            if seq.slot is None:
                self._lease(seq, now)
                leased.append(seq)
        prefills, saves = self._launch_pieces(pieces)
        for seq in replayed:
            for follower in self._keep(seq, seq.followers):
                follower.snapshot = seq.snapshot
            seq.followers = []
        ready += replayed
        forks = [
            self._fork(index, span.seq, candidates, now)
            for index, span in enumerate(prefills)
            if span.samples and not span.discards and span.seq.followers
        ]
        for seq in ready:
            self._lease(seq, now)
        leased += ready + [branch.seq for fork in forks for branch in fork.branches]
        # Whoever was to have the slots of these cannot begin in this step.
        left = [seq for seq in self._victims.values() if not seq.prompt_remaining and self._may_decode(seq)]
        if left:
            decodes = sorted([*decodes, *map(self._decode, left)], key=_slot)
            folding = self._folding(decodes)
        self._victims = {}
        if not decodes and not prefills and not ready:
            return None
        replays = tuple(self._launch(seq, 0) for seq in ready)
        if folding:
            # The kernels want these to come first.
            decodes = folding + [span for span in decodes if (span.start + 1) % self._ring_size]
        return Batch(
            tuple(decodes),
            tuple(prefills),
            tuple(leased),
            replays,
            tuple(forks),
            num_folding=len(folding),
            swaps=tuple(self._swaps),
            saves=tuple(saves),
        )

    def _share(
        self, prompts: list[Sequence], limit: PromptLimit, candidates: list[Sequence]
    ) -> tuple[dict[Sequence, int], list[Sequence]]:
        """What :meth:`PromptBudget.share` does.

        Whoever turns out to wait for a snapshot that another prompt will leave makes room for the next one. Who waits
        for a file does not, so that few are read at once.
        """
        others = self._admission.others(candidates)
        refused: list[Sequence] = []

        def replace(seq: Sequence) -> Sequence | None:
            if seq.awaited is None:
                return None
            refused.append(seq)
            # One that was to have somebody else's slot leaves none.
            return None if seq in self._victims else next(others, None)

        shares = self._budget.share(in_turns(prompts), limit, replace)
        for seq in refused:
            self._admission.set_aside(seq)
        return shares

    def _launch_running(self) -> tuple[list[Span], list[Sequence]]:
        """Decodes of the running sequences, by slot, save those about to give way; and who has prompt tokens left."""
        decodes: list[Span] = []
        prompts: list[Sequence] = []
        sitting_out = set(self._victims.values())
        for seq in self.running:
            if sitting_out and seq in sitting_out:
                continue
            if seq.prompt_remaining:
                prompts.append(seq)
            elif self._may_decode(seq):
                decodes.append(self._decode(seq))
        # The order of rows means nothing, but dense slots let the CPU backend work on a view of the pool.
        decodes.sort(key=_slot)
        return decodes, prompts

    def _launch_pieces(self, pieces: Mapping[Sequence, int]) -> tuple[list[Span], list[int]]:
        """Pieces of prompts, of so many tokens each, and the indices of those after which to take a snapshot."""
        prefills: list[Span] = []
        saves: list[int] = []
        for seq, length in pieces.items():
            prefills.append(self._launch(seq, length))
            if self._reuse is not None and self._reuse.is_wanted(seq):
                saves.append(len(prefills) - 1)
        return prefills, saves

    def _folding(self, decodes: list[Span]) -> list[Span]:
        """Those that fold their rings with this token."""
        size = self._ring_size
        return [span for span in decodes if (span.start + 1) % size == 0] if size else []

    def _choose_victims(self, candidates: list[Sequence]) -> dict[Sequence, Sequence]:
        """Whose slots go to more urgent sequences of the same tenants in this step, if these get any tokens.

        Args:
            candidates: sequences for which there are free slots.

        Returns:
            The running sequence by the one that gets its slot.
        """
        victims: dict[Sequence, Sequence] = {}
        room = 0 if self._swap is None else self._swap.room(len(self.swapped))
        if room <= 0:
            return victims
        placed = set(candidates)
        # Who waits for more of its prompt needs no slot meanwhile.
        idle = [seq for seq in self._starved if seq.slot is not None]
        for seq in self._admission.unblocked(self.waiting) if idle else ():
            if len(victims) == min(room, len(idle)):
                break
            if seq.leader is None and seq not in placed:
                victims[seq] = idle[len(victims)]
        placed |= victims.keys()
        for tenant in self.waiting.overtaken():
            # The least urgent, and of those the newest, gives way first.
            own = (seq for seq in self.running if seq.tenant == tenant and self._may_give_way(seq))
            running = sorted(own, key=lambda seq: (seq.priority, seq.admitted))
            for seq in self._admission.unblocked(self.waiting.line(tenant)):
                if len(victims) == room or not running or running[-1].priority <= seq.priority:
                    break
                if seq.leader is None and seq not in placed:
                    victims[seq] = running.pop()
        return victims

    def _may_give_way(self, seq: Sequence) -> bool:
        """Whether a running sequence has more to do than can be taken from it, and all it needs is in its slot."""
        return seq.prompt_remaining > 0 or self._may_decode(seq)

    def _lease(self, seq: Sequence, now: float) -> None:
        if (victim := self._victims.pop(seq, None)) is not None:
            self._take_out(victim)
        self.waiting.start(seq)
        self._kept.pop(seq, None)
        seq.slot = self.allocator.lease()
        if seq.swapped:
            del self.swapped[seq]
        else:
            seq.admitted = now
        self.running[seq] = None

    def _take_out(self, seq: Sequence) -> None:
        """Let a running sequence wait. Launched steps may still refer to its slot: they come before what follows."""
        assert seq.slot is not None
        self._swaps.append((seq, seq.slot))
        del self.running[seq]
        self.waiting.swap(seq)
        if seq in self._starved:
            self.waiting.set_aside(seq)
        self.swapped[seq] = None
        self.allocator.release(seq.slot)
        seq.slot, seq.swapped = None, True

    def _fork(self, source: int, leader: Sequence, candidates: list[Sequence], now: float) -> Fork:
        """Let the followers of a sequence whose prompt ends in this step begin, as many as have a slot."""
        placed = set(candidates)
        branches: list[Span] = []
        waiting: list[Sequence] = []
        for seq in leader.followers:
            if seq.finished:
                continue
            if seq in placed:
                seq.leader, seq.num_launched = None, leader.num_launched
                self._lease(seq, now)
                branches.append(self._launch(seq, 0))
            else:
                waiting.append(seq)
        leader.followers = []
        return Fork(source, tuple(branches), self._keep(leader, waiting))

    def _keep(self, leader: Sequence, followers: list[Sequence]) -> tuple[Sequence, ...]:
        """Those who are to have a snapshot of the leader's prompt while they wait for a slot: all, or none.

        None where the snapshots of enough prompts wait already: urgent requests could pile them up without end. The
        first of the followers then leads the others, and absorbs the prompt once more.
        """
        if followers and len(set(self._kept.values())) >= MAX_KEPT_PROMPTS:
            first, *rest = followers
            first.leader, first.followers, first.leads_again = None, rest, True
            for seq in rest:
                seq.leader = first
            return ()
        for seq in followers:
            seq.leader, seq.num_launched = None, leader.num_launched
            self._kept[seq] = leader
        return tuple(followers)

    def _may_decode(self, seq: Sequence) -> bool:
        """Whether a sequence without prompt tokens left has, or will have on the device, another token to absorb."""
        if seq in self.held:
            return False
        if seq.max_tokens is None or seq.num_sampled < seq.max_tokens:
            return True
        # The last token of an answer is absorbed for whoever goes on with its state, and for nobody else.
        return seq.save is not None and not seq.closes and seq.num_sampled > 0

    def resume(self, sequences: Iterable[Sequence]) -> Batch:
        """Sample held sequences: a batch that absorbs nothing."""
        spans = []
        for seq in sequences:
            del self.held[seq]
            assert seq.slot is not None
            seq.in_flight += 1
            spans.append(Span(seq, seq.slot, seq.num_launched, 0, True, seq.num_sampled - 1))
        return Batch((), (), (), resumed=tuple(spans))

    def _decode(self, seq: Sequence) -> Span:
        """Launch the newest sampled token, of a sequence that may decode: what :meth:`_launch` does, in less time."""
        position = seq.num_sampled
        if position == seq.max_tokens or seq.constraint is not None:
            return self._launch(seq, 1)
        start = seq.num_launched
        seq.num_launched = start + 1
        seq.in_flight += 1
        seq.num_sampled = position + 1
        assert seq.slot is not None
        # Not by its constructor, which takes three times as long, and hundreds are made per step.
        return tuple.__new__(Span, (seq, seq.slot, start, 1, True, position, False))

    def _launch(self, seq: Sequence, length: int) -> Span:
        slot = seq.slot
        assert slot is not None
        start = seq.num_launched
        discards = seq.num_sampled == seq.max_tokens
        # A prompt that is only read leaves logits to the next one.
        at_end = not seq.grows and start + length >= len(seq.prompt)
        samples = at_end and not (discards and (not length or self._reuse is None))
        span = Span(seq, slot, start, length, samples, seq.num_sampled, discards)
        seq.num_launched = start + length
        seq.in_flight += 1
        if seq.grows and seq.starved:
            self._starved[seq] = None
        if discards:
            seq.closes = samples
            return span
        seq.num_sampled += samples
        if samples and seq.constraint is not None:
            self.held[seq] = None
        return span

    def finish(self, seq: Sequence, reason: FinishReason, *, keeps: bool = False) -> None:
        """End a sequence, waiting or running. Its slot is released once no launched step refers to it.

        Args:
            seq: the sequence.
            reason: why it ends.
            keeps: whether its state stays where it is until :meth:`let_go` is called.
        """
        assert not seq.finished
        seq.finish_reason = reason
        seq.in_flight += keeps
        self._starved.pop(seq, None)
        if seq.slot is None:
            self.waiting.remove(seq)
            self._kept.pop(seq, None)
            if seq in self.swapped:
                del self.swapped[seq]
                if not keeps:
                    seq.snapshot = None
            return
        del self.running[seq]
        self.waiting.end(seq)
        self.held.pop(seq, None)
        self._release_if_idle(seq)

    def let_go(self, seq: Sequence) -> None:
        """Nobody needs the state of a sequence any more that has kept it beyond its end."""
        seq.in_flight -= 1
        seq.snapshot = None
        self._release_if_idle(seq)

    def retire(self, batch: Batch) -> None:
        """Note that a launched step has completed: release the slots nobody refers to any more."""
        for span in batch.spans:
            seq = span.seq
            seq.in_flight -= 1
            if seq.finish_reason:
                self._release_if_idle(seq)

    def _release_if_idle(self, seq: Sequence) -> None:
        # A swapped one has given its slot up before.
        if seq.in_flight == 0 and seq.slot is not None:
            self.allocator.release(seq.slot)
            seq.slot = None
