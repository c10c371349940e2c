"""Turns between tenants: the order of the queue, shares of slots and of prompt tokens, limits."""

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from server.engine.queue import WaitingQueue, in_turns
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.state_pool import SlotAllocator
from server.types import FinishReason, Refusal, RefusalReason
from tests.engine.test_scheduler import make_sequence


def make_scheduler(slots: int, queued: int = 10_000, *, budget: int = 2048, **changes: object) -> Scheduler:
    fields = {"max_num_batched_tokens": budget, "max_num_queued_reqs": queued, "several_tenants": True}
    return Scheduler(SlotAllocator(slots), **(fields | changes))  # type: ignore[arg-type]


def sequences(tenant: str, count: int, *, prompt: int = 1, tokens: int | None = None) -> list[Sequence]:
    return [make_sequence(prompt, tokens, number, tenant=tenant) for number in range(count)]


def step(scheduler: Scheduler) -> list[Sequence]:
    """One step, in which sequences end that have all their tokens; returns those that got a slot."""
    batch = scheduler.schedule(0.0)
    assert batch is not None
    for span in batch.spans:
        if span.samples and span.seq.num_sampled == span.seq.max_tokens:
            scheduler.finish(span.seq, FinishReason.LENGTH)
    scheduler.retire(batch)
    return list(batch.leased)


def next_started(scheduler: Scheduler) -> list[Sequence]:
    """The sequences that are the next to start."""
    while not (started := step(scheduler)):
        pass
    return started


def model_order(
    waiting: list[Sequence], running: Counter[str], last_turn: dict[str, int], tenants: list[str]
) -> Iterator[Sequence]:
    """The rule, one pick at a time: fewest running, last turn longest ago, tenant come first, priority, arrival."""
    waiting, running, last_turn = waiting.copy(), Counter(running), dict(last_turn)
    turn = max(last_turn.values(), default=0)
    while waiting:
        seq = min(
            waiting,
            key=lambda seq: (
                *(running[seq.tenant], last_turn.get(seq.tenant, 0)),
                *(tenants.index(seq.tenant), seq.priority),
            ),
        )
        waiting.remove(seq)
        turn += 1
        running[seq.tenant] += 1
        last_turn[seq.tenant] = turn
        yield seq


@pytest.mark.parametrize("seed", range(10))
def test_the_order_is_that_of_the_rule_under_any_changes(seed: int) -> None:
    rng = random.Random(seed)
    queue = WaitingQueue()
    waiting: list[Sequence] = []
    aside: list[Sequence] = []
    running: list[Sequence] = []
    last_turn: dict[str, int] = {}
    tenants: list[str] = []
    turns = 0
    for number in range(300):
        action = rng.random()
        if action < 0.5 or not waiting:
            seq = make_sequence(1, 1, number, priority=rng.choice([0, 0, 0, -1, 3]), tenant=rng.choice("aaaabbc"))
            queue.add(seq)
            waiting.append(seq)
        elif action < 0.6:
            seq = waiting.pop(rng.randrange(len(waiting)))
            aside = [other for other in aside if other is not seq]
            queue.remove(seq)
            with pytest.raises(KeyError):
                queue.remove(seq)
        elif action < 0.68:
            seq = rng.choice(waiting)
            queue.set_aside(seq)
            aside.append(seq)
        elif action < 0.75:
            seq = rng.choice(waiting)
            queue.call_back(seq)
            aside = [other for other in aside if other is not seq]
        elif action < 0.9 and len(aside) < len(waiting):
            seq = next(iter(queue))
            queue.start(seq)
            waiting.remove(seq)
            running.append(seq)
            turns += 1
            last_turn[seq.tenant] = turns
        elif running:
            queue.end(running.pop(rng.randrange(len(running))))
        counts = Counter(seq.tenant for seq in running)
        present = [seq for seq in waiting if seq not in aside]
        names = dict.fromkeys(seq.tenant for seq in present)
        tenants = [name for name in tenants if name in names] + [name for name in names if name not in tenants]
        expected = list(model_order(present, counts, last_turn, tenants))
        assert list(queue) == expected
        assert queue.aside == set(aside)
        assert len(queue) == len(waiting) and all(seq in queue for seq in waiting)
        for tenant in "abc":
            assert queue.num_waiting(tenant) == sum(seq.tenant == tenant for seq in waiting)
            assert queue.num_open(tenant) == queue.num_waiting(tenant) + counts[tenant]


def test_thousands_queued_by_one_tenant_do_not_delay_the_first_of_another() -> None:
    scheduler = make_scheduler(slots=4)
    scheduler.add(sequences("a", 4000, tokens=5))
    for _ in range(7):
        step(scheduler)
    (late,) = sequences("b", 1, tokens=5)
    assert scheduler.refusal("b", 1) is None
    scheduler.add([late])
    assert next_started(scheduler)[0] is late


def test_nobody_overtakes_another_tenant_by_calling_himself_urgent() -> None:
    scheduler = make_scheduler(slots=2)
    scheduler.add(make_sequence(1, 5, number, priority=-number, tenant="a") for number in range(1000))
    for _ in range(7):
        step(scheduler)
    (late,) = sequences("b", 1, tokens=5)
    scheduler.add([late])
    assert next_started(scheduler)[0] is late


def test_a_tenants_own_requests_go_by_priority() -> None:
    scheduler = make_scheduler(slots=1)
    scheduler.add(make_sequence(1, 1, number, priority=number % 3, tenant="a") for number in range(9))
    assert [seq.request_id for _ in range(9) for seq in step(scheduler)] == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_tenants_share_the_slots_however_long_their_answers_are() -> None:
    scheduler = make_scheduler(slots=6)
    scheduler.add([*sequences("long", 200, tokens=40), *sequences("short", 400, tokens=2)])
    scheduler.add(sequences("middling", 200, tokens=9))
    shares: Counter[str] = Counter()
    for number in range(300):
        step(scheduler)
        if number >= 100:
            shares.update(seq.tenant for seq in scheduler.running)
    whole = sum(shares.values())
    # Those that ended within a step do not show: short answers fewer, long ones more of what shows.
    assert all(0.2 < shares[tenant] / whole < 0.46 for tenant in ("long", "short", "middling")), shares


def test_a_tenant_alone_gets_everything() -> None:
    scheduler = make_scheduler(slots=5)
    scheduler.add(sequences("a", 20, tokens=3))
    assert len(step(scheduler)) == 5


def test_without_tenants_the_order_is_that_of_arrival() -> None:
    scheduler = make_scheduler(slots=3)
    everyone = sequences("", 30, tokens=1)
    scheduler.add(everyone)
    assert [seq for _ in range(10) for seq in step(scheduler)] == everyone


def test_in_turns() -> None:
    a, b, c = sequences("a", 3), sequences("b", 1), sequences("c", 2)
    urgent = make_sequence(1, priority=-1, tenant="a")
    assert in_turns([*a, *b, urgent, *c]) == [b[0], urgent, c[0], a[0], c[1], a[1], a[2]]
    assert in_turns([]) == []


def test_long_prompts_of_one_tenant_do_not_hold_up_the_prompt_of_another() -> None:
    scheduler = make_scheduler(slots=20, budget=512)
    scheduler.add(sequences("a", 18, prompt=100_000, tokens=1))
    for _ in range(5):
        step(scheduler)
    (short,) = sequences("b", 1, prompt=200, tokens=1)
    scheduler.add([short])
    batch = scheduler.schedule(0.0)
    assert batch is not None
    lengths = {span.seq: span.length for span in batch.prefills}
    assert lengths[short] == 128
    scheduler.retire(batch)
    step(scheduler)
    assert short.finished


def reason(refusal: Refusal | None) -> RefusalReason | None:
    return None if refusal is None else refusal.reason


def test_a_tenant_has_so_many_choices_at_once() -> None:
    scheduler = make_scheduler(slots=2, max_seqs_per_tenant=5)
    assert scheduler.max_request_choices == 5
    scheduler.add(sequences("a", 5, tokens=2))
    for _ in range(2):
        refusal = scheduler.refusal("a", 1)
        assert reason(refusal) is RefusalReason.TENANT_LIMIT
        assert refusal is not None and "5 choices waiting or running" in refusal.message
        assert scheduler.refusal("b", 5) is None
        assert reason(scheduler.refusal("b", 6)) is RefusalReason.TENANT_LIMIT
        step(scheduler)  # Running choices count like waiting ones ...
    assert scheduler.refusal("a", 2) is None  # ... until they have ended.
    assert reason(scheduler.refusal("a", 3)) is RefusalReason.TENANT_LIMIT
    scheduler.finish(next(iter(scheduler.waiting)), FinishReason.CANCELLED)
    assert scheduler.refusal("a", 3) is None


def test_a_choice_counts_until_its_end_and_not_until_its_slot_is_released() -> None:
    """Whoever has got an answer may ask again at once, though a step launched ahead still refers to the slot."""
    scheduler = make_scheduler(slots=2, max_seqs_per_tenant=1)
    (seq,) = sequences("a", 1)
    scheduler.add([seq])
    scheduler.schedule(0.0)
    scheduler.schedule(0.0)
    assert scheduler.refusal("a", 1) is not None
    scheduler.finish(seq, FinishReason.STOP)
    assert seq.slot is not None
    assert scheduler.refusal("a", 1) is None


def test_no_tenant_can_fill_the_queue() -> None:
    scheduler = make_scheduler(slots=10, queued=4096)
    assert scheduler.max_request_choices == 10 + 3840
    assert scheduler.refusal("a", 3850) is None
    assert reason(scheduler.refusal("a", 3851)) is RefusalReason.QUEUE_FULL
    scheduler.add(sequences("a", 3850))
    step(scheduler)
    assert reason(scheduler.refusal("a", 1)) is RefusalReason.QUEUE_FULL
    assert scheduler.refusal("b", 240) is None
    assert reason(scheduler.refusal("b", 241)) is RefusalReason.QUEUE_FULL
    scheduler.add(sequences("b", 240))
    assert scheduler.refusal("c", 15) is None
    scheduler.add(sequences("c", 16))
    assert len(scheduler.waiting) == 4096
    assert reason(scheduler.refusal("d", 1)) is RefusalReason.QUEUE_FULL


def test_without_several_tenants_the_whole_queue_is_there() -> None:
    scheduler = make_scheduler(slots=10, queued=160, several_tenants=False)
    assert scheduler.max_request_choices == 170
    assert scheduler.refusal("", 170) is None
    assert reason(scheduler.refusal("", 171)) is RefusalReason.QUEUE_FULL
