"""The scheduler under random traffic, with an integrity check after every step. No model is involved."""

import random
from array import array
from collections.abc import Iterable

import pytest

from server.engine.batch import Batch
from server.engine.prompt_budget import PREFILL_GRID
from server.engine.queue import WaitingQueue
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.state_pool import SlotAllocator
from server.engine.step_shapes import PromptLimit
from server.types import FinishReason, SamplingParams


def make_sequence(
    prompt_length: int, max_tokens: int | None = 8, request_id: int = 0, *, priority: int = 0, tenant: str = ""
) -> Sequence:
    return Sequence(
        client=b"c",
        request_id=request_id,
        choice=0,
        prompt=array("i", range(prompt_length)),
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        stop_ids=frozenset(),
        max_tokens=max_tokens,
        matcher=None,
        arrived=0.0,
        priority=priority,
        tenant=tenant,
    )


def make_group(size: int, prompt_length: int, max_tokens: int, priority: int = 0, tenant: str = "") -> list[Sequence]:
    """Choices of one prompt, the leader first."""
    leader, *followers = (
        make_sequence(prompt_length, max_tokens, priority=priority, tenant=tenant) for _ in range(size)
    )
    leader.followers = followers
    for seq in followers:
        seq.leader = leader
    return [leader, *followers]


def make_scheduler(slots: int = 4, budget: int = 128, queued: int = 1000) -> Scheduler:
    return Scheduler(SlotAllocator(slots), max_num_batched_tokens=budget, max_num_queued_reqs=queued)


def check_integrity(scheduler: Scheduler, everyone: list[Sequence], in_flight: list[Batch]) -> None:
    """What must hold between any two calls."""
    flying = [span for batch in in_flight for span in batch.spans]
    holders = [seq for seq in everyone if seq.slot is not None]
    slots = [seq.slot for seq in holders]
    assert len(set(slots)) == len(slots), "two sequences share a slot"
    assert 0 not in slots, "the null slot was leased"
    assert len(slots) == scheduler.allocator.num_used
    assert scheduler.allocator.num_used + scheduler.allocator.num_free == scheduler.allocator.num_slots
    for span in flying:
        assert span.seq.slot == span.slot, "a slot in flight was released"
    for seq in everyone:
        assert seq.in_flight == sum(span.seq is seq for span in flying)
        assert (seq in scheduler.running) == (seq.slot is not None and not seq.finished)
        assert (seq in scheduler.waiting) == (seq.slot is None and not seq.finished)
        if seq.finished:
            assert (seq.slot is None) == (seq.in_flight == 0), "a finished sequence keeps an idle slot"
        # The state never absorbs more than the prompt and the tokens sampled before.
        assert seq.num_launched <= len(seq.prompt) + max(0, seq.num_sampled - 1)
        assert seq.max_tokens is None or seq.num_sampled <= seq.max_tokens


def check_batch(scheduler: Scheduler, batch: Batch, budget: int) -> None:
    for span in batch.prefills:
        end = span.start + span.length
        assert span.length > 0
        assert end % PREFILL_GRID == 0 or end == len(span.seq.prompt), "a piece ends off the grid"
        assert span.samples == (end == len(span.seq.prompt))
    for span in batch.replays + tuple(branch for fork in batch.forks for branch in fork.branches):
        assert span.samples and (span.start, span.length, span.position) == (len(span.seq.prompt), 0, 0)
    for span in batch.decodes:
        assert span.length == 1 and span.samples and span.start >= len(span.seq.prompt)
    assert len({span.seq for span in batch.spans}) == len(batch.spans), "a sequence twice in a batch"
    assert [span.slot for span in batch.decodes] == sorted(span.slot for span in batch.decodes)
    prompt_tokens = sum(span.length for span in batch.prefills)
    assert prompt_tokens <= max(budget - len(batch.decodes), PREFILL_GRID)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_random_traces_keep_integrity(seed: int, overlap: bool) -> None:
    """Arrivals, endings and cancellations in any order, with and without a step in flight."""
    rng = random.Random(seed)
    budget = rng.choice([64, 65, 128, 300, 2048])
    scheduler = make_scheduler(slots=rng.randint(1, 6), budget=budget, queued=rng.randint(0, 8))
    everyone: list[Sequence] = []
    flying: list[Batch] = []
    groups: list[list[Sequence]] = []
    absorbed: dict[Sequence, int] = {}
    with_snapshot: set[Sequence] = set()
    for step in range(120):
        if step < 80 and rng.random() < 0.5:
            length, max_tokens = rng.choice([1, 5, 63, 64, 65, 200, 700]), rng.choice([1, 2, 5, 20])
            group = make_group(
                rng.randint(1, 4), length, max_tokens, priority=rng.randint(-1, 1), tenant=rng.choice("ab")
            )
            if scheduler.refusal("", len(group)) is None:
                scheduler.add(group)
                everyone += group
                groups.append(group)
        alive = [seq for seq in everyone if not seq.finished]
        if alive and rng.random() < 0.15:
            # A request is cancelled with all its choices, of which some may have ended.
            victim = rng.choice(alive)
            for seq in next(group for group in groups if victim in group):
                if not seq.finished:
                    scheduler.finish(seq, FinishReason.CANCELLED)
            check_integrity(scheduler, everyone, flying)
        batch = scheduler.schedule(now=float(step))
        if batch is not None:
            check_batch(scheduler, batch, budget)
            assert {span.seq for span in batch.replays} <= with_snapshot
            for fork in batch.forks:
                source = batch.prefills[fork.source]
                for seq in (*(branch.seq for branch in fork.branches), *fork.waiting):
                    assert seq.prompt == source.seq.prompt and seq not in absorbed
                    absorbed[seq] = source.start + source.length
                with_snapshot.update(fork.waiting)
            for span in batch.spans:
                assert span.start == absorbed.get(span.seq, 0), "tokens skipped or absorbed twice"
                absorbed[span.seq] = span.start + span.length
            flying.append(batch)
        check_integrity(scheduler, everyone, flying)
        while len(flying) > (1 if overlap and batch is not None else 0):
            done = flying.pop(0)
            for span in done.spans:
                if span.samples and not span.seq.finished:
                    span.seq.outputs.append(0)
                    if len(span.seq.outputs) == span.seq.max_tokens:
                        scheduler.finish(span.seq, FinishReason.LENGTH)
                    elif rng.random() < 0.1:
                        scheduler.finish(span.seq, FinishReason.STOP)
            scheduler.retire(done)
            check_integrity(scheduler, everyone, flying)
        if step >= 80 and not scheduler.has_work and not flying:
            break
    else:
        while scheduler.has_work:
            batch = scheduler.schedule(now=0.0)
            assert batch is not None, "work is left but nothing can be scheduled"
            for span in batch.spans:
                if span.samples:
                    span.seq.outputs.append(0)
                    if len(span.seq.outputs) == span.seq.max_tokens and not span.seq.finished:
                        scheduler.finish(span.seq, FinishReason.LENGTH)
            scheduler.retire(batch)
    assert all(seq.finished for seq in everyone)
    assert scheduler.allocator.num_used == 0


def test_decodes_come_first_and_a_prompt_still_moves() -> None:
    scheduler = make_scheduler(slots=100, budget=64, queued=100)
    short = [make_sequence(1, max_tokens=None) for _ in range(80)]
    scheduler.add(short)
    for _ in range(3):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        scheduler.retire(batch)
    long = make_sequence(1000, max_tokens=None)
    scheduler.add([long])
    lengths = []
    while long.prompt_remaining:
        batch = scheduler.schedule(0.0)
        assert batch is not None
        assert len(batch.decodes) == 80
        lengths.append(sum(span.length for span in batch.prefills))
        scheduler.retire(batch)
    # 80 decodes overfill the budget of 64; the prompt moves by one grid piece per step all the same.
    assert lengths == [64] * 15 + [40]


def schedule_prompts(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    batch = scheduler.schedule(0.0)
    assert batch is not None
    scheduler.retire(batch)
    return [(span.seq, span.length) for span in batch.prefills]


def test_short_prompts_are_absorbed_in_order_of_arrival() -> None:
    scheduler = make_scheduler(slots=8, budget=256)
    prompts = [make_sequence(100) for _ in range(5)]
    scheduler.add(prompts)
    # The third gets a piece of what the first two leave; no later one may use the rest.
    assert schedule_prompts(scheduler) == [(prompts[0], 100), (prompts[1], 64), (prompts[2], 64)]
    first = scheduler.schedule(0.0)
    assert first is not None
    assert [(span.seq, span.length) for span in first.prefills] == [
        (prompts[1], 36),
        (prompts[2], 36),
        (prompts[3], 100),
        (prompts[4], 64),
    ]


def test_a_long_prompt_yields_half_of_the_budget_and_takes_what_nobody_needs() -> None:
    scheduler = make_scheduler(slots=2, budget=512)
    long, short, late = make_sequence(5000), make_sequence(40), make_sequence(40)
    scheduler.add([long])
    assert schedule_prompts(scheduler) == [(long, 512)]
    scheduler.add([short, late])
    assert schedule_prompts(scheduler) == [(long, 448), (short, 40)]
    assert late in scheduler.waiting, "there is no slot for it"
    assert schedule_prompts(scheduler) == [(long, 448)]


def test_admission_is_first_come_first_served() -> None:
    scheduler = make_scheduler(slots=2, budget=128)
    first, second, third = (make_sequence(300) for _ in range(3))
    scheduler.add([first, second, third])
    assert schedule_prompts(scheduler) == [(first, 64), (second, 64)]
    assert third in scheduler.waiting


def test_followers_keep_free_slots_for_the_end_of_their_prompt() -> None:
    scheduler = make_scheduler(slots=3, budget=128)
    leader, *followers = make_group(4, 150, 8)
    stranger = make_sequence(10)
    scheduler.add([leader, *followers, stranger])
    first = scheduler.schedule(0.0)
    assert first is not None and first.leased == (leader,)
    scheduler.retire(first)
    assert scheduler.allocator.num_free == 2, "the stranger came later"
    second = scheduler.schedule(0.0)
    assert second is not None
    (fork,) = second.forks
    assert [branch.seq for branch in fork.branches] == followers[:2]
    assert fork.waiting == (followers[2],)
    assert second.leased == (followers[0], followers[1])
    assert list(scheduler.waiting) == [followers[2], stranger]
    scheduler.finish(leader, FinishReason.STOP)
    scheduler.retire(second)
    third = scheduler.schedule(0.0)
    assert third is not None
    assert [span.seq for span in third.replays] == [followers[2]]
    assert len(third.decodes) == 2 and not third.prefills


def test_a_slot_in_flight_is_not_released() -> None:
    scheduler = make_scheduler(slots=1)
    seq, next_seq = make_sequence(3), make_sequence(3)
    scheduler.add([seq, next_seq])
    first = scheduler.schedule(0.0)
    ahead = scheduler.schedule(0.0)
    assert first is not None and ahead is not None
    scheduler.finish(seq, FinishReason.STOP)
    scheduler.retire(first)
    assert scheduler.schedule(0.0) is None, "the only slot is still referred to by the step launched ahead"
    scheduler.retire(ahead)
    batch = scheduler.schedule(0.0)
    assert batch is not None and batch.leased == (next_seq,)


def test_room_counts_free_slots_and_queue_places() -> None:
    scheduler = make_scheduler(slots=2, queued=3)
    assert scheduler.refusal("", 5) is None
    assert scheduler.refusal("", 6) is not None
    scheduler.add([make_sequence(3) for _ in range(4)])
    assert scheduler.refusal("", 1) is None
    assert scheduler.refusal("", 2) is not None
    assert scheduler.schedule(0.0) is not None
    # Two run now, two wait: one place is left.
    assert scheduler.refusal("", 1) is None
    assert scheduler.refusal("", 2) is not None


def test_slots_are_leased_lowest_first_and_not_twice() -> None:
    allocator = SlotAllocator(3)
    assert [allocator.lease() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="no free slot"):
        allocator.lease()
    allocator.release(2)
    with pytest.raises(RuntimeError, match="slot 2 released but not leased"):
        allocator.release(2)
    assert allocator.lease() == 2


@pytest.mark.parametrize(("running", "expected"), [(0, 512), (1, 64), (2, 64), (3, 128), (4, 192), (6, 192)])
def test_prompts_beside_decodes_get_limited_tokens(running: int, expected: int) -> None:
    """So that running requests do not wait long for their next token."""
    limits = ((0, 0, 512, 3), (2, 2, 64, 2), (3, 3, 128, 2), (5, 5, 192, 2))
    scheduler = Scheduler(
        SlotAllocator(8),
        max_num_batched_tokens=512 + running,
        max_num_queued_reqs=10,
        prompt_limits=tuple(PromptLimit(*limit) for limit in limits),
    )
    for request_id in range(running):
        scheduler.add([make_sequence(1, max_tokens=None, request_id=request_id)])
    for _ in range(2 * running + 1):
        scheduler.schedule(0.0)
    scheduler.add([make_sequence(5000, request_id=99)])
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert len(batch.decodes) == running
    assert sum(span.length for span in batch.prefills) == expected


def test_the_lower_priority_value_is_served_first() -> None:
    """It gets the next slot and the budget first; among equals the order of arrival counts."""
    scheduler = make_scheduler(slots=2, budget=256)
    running = make_sequence(5000, request_id=0)
    scheduler.add([running])
    assert schedule_prompts(scheduler) == [(running, 256)]
    late, later, urgent, background = (
        make_sequence(300, request_id=request_id, priority=priority)
        for request_id, priority in enumerate((0, 0, -5, 7), 1)
    )
    scheduler.add([background, late, later, urgent])
    assert list(scheduler.waiting) == [urgent, late, later, background]
    assert schedule_prompts(scheduler) == [(urgent, 192), (running, 64)]
    assert urgent not in scheduler.waiting and late in scheduler.waiting
    scheduler.finish(urgent, FinishReason.CANCELLED)
    scheduler.finish(later, FinishReason.CANCELLED)
    assert list(scheduler.waiting) == [late, background]
    # A prompt that runs came before those of its priority that start now.
    assert schedule_prompts(scheduler) == [(running, 192), (late, 64)]
    scheduler.finish(running, FinishReason.CANCELLED)
    assert schedule_prompts(scheduler) == [(late, 192), (background, 64)]
    assert len(scheduler.waiting) == 0


def test_the_queue_keeps_its_order_under_any_changes() -> None:
    rng = random.Random(0)
    queue, model = WaitingQueue(), []
    for request_id in range(400):
        if model and rng.random() < 0.45:
            seq = model.pop(rng.randrange(len(model)))
            queue.remove(seq)
            assert seq not in queue
            with pytest.raises(KeyError):
                queue.remove(seq)
        else:
            seq = make_sequence(1, request_id=request_id, priority=rng.randint(-2, 2))
            queue.add(seq)
            model.append(seq)
        assert list(queue) == sorted(model, key=lambda seq: (seq.priority, seq.request_id))
        assert len(queue) == len(model) and all(seq in queue for seq in model)


def make_limited(limits: Iterable[tuple[int, int, int, int]], *, ring_size: int = 4) -> Scheduler:
    """A scheduler whose prompts get what is left beside decodes."""
    return Scheduler(
        SlotAllocator(8),
        max_num_batched_tokens=512,
        max_num_queued_reqs=10,
        prompt_limits=tuple(PromptLimit(*limit) for limit in limits),
        ring_size=ring_size,
    )


def test_prompts_get_less_where_many_decodes_fold_at_once() -> None:
    limits = ((0, 0, 512, 3), (4, 1, 256, 2), (4, 2, 192, 2), (4, 4, 64, 2))
    scheduler = make_limited(limits)
    scheduler.add([make_sequence(length, max_tokens=None, request_id=length) for length in (2, 2, 3)])
    scheduler.schedule(0.0)
    scheduler.add([make_sequence(100_000, request_id=99)])
    taken = []
    for _ in range(8):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        folds = sum(span.start % 4 == 3 for span in batch.decodes)
        taken.append((folds, batch.num_tokens - len(batch.decodes)))
    # Two of the three came to a multiple of four together, the third a step before them.
    assert taken == [(1, 256), (2, 192), (0, 256), (0, 256)] * 2


def test_prompts_wait_while_decodes_fold_but_never_four_steps_in_a_row() -> None:
    limits = ((0, 0, 512, 3), (4, 0, 256, 2), (4, 4, 0, 2))
    scheduler = make_limited(limits)
    scheduler.add([make_sequence(length, max_tokens=None, request_id=length) for length in (1, 2, 2)])
    scheduler.schedule(0.0)
    prompt = make_sequence(100_000, request_id=99)
    scheduler.add([prompt])
    taken = []
    for _ in range(8):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        folds = [(span.start + 1) % 4 == 0 for span in batch.decodes]
        assert folds == [True] * batch.num_folding + [False] * (3 - batch.num_folding)
        taken.append((batch.num_folding, batch.num_tokens - len(batch.decodes)))
    # Requests that came one step after the other fold one step after the other.
    assert taken == [(0, 256), (2, 0), (1, 0), (0, 256)] * 2
    assert prompt.slot is not None
    always = make_limited(((0, 0, 512, 3), (4, 0, 0, 2)))
    always.add([make_sequence(2, max_tokens=None, request_id=0)])
    always.schedule(0.0)
    always.add([make_sequence(100_000, request_id=99)])
    batches = [always.schedule(0.0) for _ in range(8)]
    assert [batch.num_tokens - len(batch.decodes) for batch in batches if batch is not None] == [0, 0, 0, 64] * 2


def test_a_step_takes_pieces_of_a_limited_number_of_prompts() -> None:
    scheduler = make_limited(((0, 0, 512, 3), (2, 2, 256, 2)), ring_size=0)
    sequences = [make_sequence(10, request_id=request_id) for request_id in range(7)]
    scheduler.add(sequences)
    batches = [scheduler.schedule(0.0) for _ in range(4)]
    taken = [[span.seq.request_id for span in batch.prefills] for batch in batches if batch is not None]
    assert taken == [[0, 1, 2], [3, 4], [5, 6], []]
