"""What must hold of an engine after every step, whatever is asked of it and whatever fails: every driver looks."""

from collections import Counter

from server.engine.engine import Engine
from server.engine.sequence import Sequence
from server.engine.tiers import Tier


def check(engine: Engine) -> None:
    """Raise AssertionError where something is lost, held twice or left behind."""
    scheduler = engine.scheduler
    waiting, running = [*scheduler.waiting, *scheduler.waiting.aside], list(scheduler.running)
    open_sequences = [seq for choices in engine._answers.open.values() for seq in choices]
    assert Counter(open_sequences) == Counter(waiting + running), "everything open waits or runs, once"
    assert not any(seq.finished for seq in open_sequences)
    _check_slots(engine, waiting, running)
    assert scheduler.held.keys() <= scheduler.running.keys()
    assert scheduler.swapped.keys() == {seq for seq in waiting if seq.swapped}
    assert scheduler._kept.keys() <= set(waiting)
    assert scheduler._starved.keys() == {seq for seq in open_sequences if seq.starved}
    assert not scheduler._victims
    awaiting = [seq for seqs in scheduler._admission.awaiting.values() for seq in seqs if not seq.finished]
    assert Counter(awaiting) == Counter(seq for seq in scheduler.waiting.aside if not seq.starved)
    for seq in open_sequences:
        assert seq.leader is None or (not seq.leader.finished and seq in seq.leader.followers and seq in waiting)
        assert 0 <= seq.num_launched <= len(seq.prompt) + seq.num_sampled
        assert len(seq.outputs) <= seq.num_sampled and seq.in_flight >= 0
    _check_reuse(engine, open_sequences)


def _check_slots(engine: Engine, waiting: list[Sequence], running: list[Sequence]) -> None:
    assert not any(seq.slot for seq in waiting), "who waits has no slot"
    flying = [] if engine._pending is None else [span.seq for span in engine._pending.batch.spans]
    ended = {seq for seq in flying if seq.finished and seq.slot is not None}
    delayed = (
        [] if engine._answers.saves is None else [seq for seq in engine._answers.saves.delayed if seq.slot is not None]
    )
    slots = [seq.slot for seq in {*running, *ended, *delayed}]
    allocator = engine.scheduler.allocator
    assert len(set(slots)) == len(slots) and set(slots) == allocator._leased, "a slot is one's, or free"
    assert allocator.num_free + allocator.num_used == allocator.num_slots
    assert 0 not in allocator._leased and not set(allocator._free) & allocator._leased


def _check_reuse(engine: Engine, open_sequences: list[Sequence]) -> None:
    reuse, states = engine._reuse, engine._states
    if reuse is None or states is None:
        return
    cache, tiers = reuse._cache, reuse._cache.tiers
    tickets = {seq.ticket for seq in open_sequences if seq.ticket is not None}
    assert cache._active.keys() <= tickets, "who has ended leaves no promise"
    pins: Counter[object] = Counter(ticket.entry for ticket in tickets if ticket.entry is not None)
    for tier in Tier:
        entries = tiers._entries[tier]
        assert sum(entry.nbytes for entry in entries) == tiers._used[tier]
        assert all(entry.tier is tier and entry.pins == pins[entry] for entry in entries), "pinned by who begins there"
        assert tier is Tier.SAVED or tiers._used[tier] <= tiers._budgets[tier] + sum(entry.nbytes for entry in pins)  # type: ignore[attr-defined]
    contexts = Counter(seq.context for seq in open_sequences if seq.context is not None)
    assert all(state.awaiting == count for state, count in contexts.items())
    assert all(state.awaiting == contexts[state] for state in states._states.values())
    to_be_saved = sum(seq.save is not None for seq in open_sequences)
    ended = len(engine._answers.waiting) + (0 if engine._answers.saves is None else len(engine._answers.saves))
    assert states._reserved.total() <= to_be_saved + ended, "room is set aside for those who will use it"
    assert states._reserved.total() >= to_be_saved
