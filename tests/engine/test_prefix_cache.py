"""The prefix cache against a search through all that is parked. No state is involved, only names of states."""

from dataclasses import dataclass, field
from itertools import chain

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from server.engine import radix
from server.engine.prefix_cache import (
    FIRST_SPACING,
    LEAST_GAIN,
    LEAST_WAIT,
    Awaited,
    PrefixCache,
    Ticket,
)
from server.engine.radix import RadixTree, common_tokens
from server.engine.tiers import Entry, SnapshotLostError, Tier
from server.types import pack_tokens

ROOMY = dict.fromkeys(Tier, 1 << 30)


@dataclass(eq=False)
class Parked:
    """What the tests keep in place of a state: what it is a state of."""

    scope: str
    tokens: bytes
    tier: Tier
    complete: bool


@dataclass
class Shelf:
    """Holds the parked ones, and knows which of them are unreadable or still to be fetched."""

    held: set[Parked] = field(default_factory=set)
    lost: set[Parked] = field(default_factory=set)
    slow: set[Parked] = field(default_factory=set)
    unwritten: list[Parked] = field(default_factory=list)
    disk_is_busy: bool = False
    moved: list[Tier] = field(default_factory=list)

    def park(self, scope: str, tokens: bytes, *, complete: bool) -> Parked:
        parked = Parked(scope, tokens, Tier.DEVICE, complete)
        self.held.add(parked)
        return parked

    def move(self, payload: Parked, tier: Tier) -> Parked | None:
        if tier is Tier.DISK and self.disk_is_busy:
            return None
        self.drop(payload)
        self.moved.append(tier)
        moved = Parked(payload.scope, payload.tokens, tier, payload.complete)
        self.held.add(moved)
        return moved

    def drop(self, payload: Parked) -> None:
        if payload.tier is not Tier.SAVED:
            self.held.remove(payload)
        self.lost.discard(payload)

    def take_unwritten(self) -> list[Parked]:
        taken, self.unwritten = self.unwritten, []
        return taken

    def unread(self, payload: Parked) -> None:
        pass

    def ready(self, payload: Parked) -> bool:
        if payload in self.lost:
            raise SnapshotLostError("torn")
        if payload in self.slow:
            self.slow.remove(payload)
            return False
        return True


@dataclass
class Cached:
    """A cache, its shelf, and a short way to take a prompt through it."""

    budgets: dict[Tier, int] = field(default_factory=lambda: dict(ROOMY))
    shelf: Shelf = field(default_factory=Shelf)

    def __post_init__(self) -> None:
        self.cache: PrefixCache[Parked] = PrefixCache(self.budgets, self.shelf)

    def ticket(self, tokens: list[int], scope: str = "", checkpoints: tuple[int, ...] = ()) -> Ticket[Parked]:
        return Ticket(scope, pack_tokens(tokens), checkpoints, reuse=True)

    def absorb(self, ticket: Ticket[Parked], until: int | None = None) -> list[int]:
        """Absorb an admitted prompt; the positions of the snapshots taken."""
        self.cache.started(ticket)
        taken = []
        for point in list(ticket.points):
            if until is not None and point > until:
                break
            assert self.cache.advance(ticket, point)
            complete = point == ticket.length
            parked = self.shelf.park(ticket.scope, ticket.tokens[: 4 * point], complete=complete)
            self.cache.put(ticket, parked, Tier.DEVICE, 1, complete=complete)
            taken.append(point)
        if until is None:
            self.cache.close(ticket)
        else:
            self.cache.advance(ticket, until)
        return taken

    def run(self, tokens: list[int], **ticket: object) -> tuple[int, list[int]]:
        """Where a prompt alone begins, and where it leaves snapshots."""
        made = self.ticket(tokens, **ticket)  # type: ignore[arg-type]
        assert self.cache.admit(made)
        return made.start, self.absorb(made)


def count(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def test_the_same_prompt_begins_at_its_end() -> None:
    cached = Cached()
    prompt = count(0, 9)
    assert cached.run(prompt) == (0, [9])
    assert cached.run(prompt) == (9, [])
    assert cached.run([*prompt, 5]) == (9, [10])
    # A state cannot be cut back.
    assert cached.run(prompt[:8]) == (0, [8])


def test_a_state_without_logits_serves_only_longer_prompts() -> None:
    cached = Cached()
    tokens = pack_tokens(count(0, 20))
    cached.cache.keep("", tokens, cached.shelf.park("", tokens, complete=False), Tier.DEVICE, 1, complete=False)
    assert cached.run(count(0, 21))[0] == 20
    assert cached.run(count(0, 20)) == (0, [20])
    assert cached.run(count(0, 20)) == (20, [])


def test_the_second_prompt_with_a_beginning_leaves_it_to_the_third() -> None:
    cached = Cached()
    system = count(0, 100)
    assert cached.run([*system, 900, 901]) == (0, [102])
    assert cached.run([*system, 910, 911, 912]) == (0, [100, 103])
    assert cached.run([*system, 920]) == (100, [101])


def test_a_common_beginning_of_few_tokens_is_not_worth_a_snapshot() -> None:
    cached = Cached()
    few = count(0, LEAST_GAIN - 1)
    cached.run([*few, 900])
    assert cached.run([*few, 910]) == (0, [LEAST_GAIN])


def test_long_prompts_leave_snapshots_at_doubling_positions() -> None:
    cached = Cached()
    prompt = count(0, 5 * FIRST_SPACING)
    spaced = [FIRST_SPACING, 2 * FIRST_SPACING, 4 * FIRST_SPACING]
    assert cached.run(prompt) == (0, [*spaced, len(prompt)])
    other = [*prompt[: 3 * FIRST_SPACING], 7]
    assert cached.run(other) == (2 * FIRST_SPACING, [3 * FIRST_SPACING, len(other)])


def test_checkpoints_that_a_client_names() -> None:
    cached = Cached()
    assert cached.run(count(0, 50), checkpoints=(3, 30, 50)) == (0, [3, 30, 50])
    assert cached.run([*count(0, 30), 7]) == (30, [31])


def test_scopes_do_not_see_each_other() -> None:
    cached = Cached()
    cached.run(count(0, 50), scope="a")
    assert cached.run(count(0, 50), scope="b")[0] == 0
    assert cached.run(count(0, 50), scope="a")[0] == 50


def test_two_identical_prompts_in_flight_are_absorbed_once() -> None:
    cached = Cached()
    first, second = cached.ticket(count(0, 9)), cached.ticket(count(0, 9))
    assert cached.cache.admit(first)
    assert not cached.cache.admit(second) and second.awaited == Awaited(first, 9)
    cached.absorb(first)
    assert cached.cache.admit(second)
    assert second.start == 9


def test_prompts_in_flight_share_their_beginning() -> None:
    cached = Cached()
    system = count(0, 100)
    first = cached.ticket([*system, 900, 901])
    others = [cached.ticket([*system, 910 + i]) for i in range(3)]
    assert cached.cache.admit(first)
    assert not any(map(cached.cache.admit, others))
    assert cached.absorb(first, until=100) == [100], "the first one did not stop where the second leaves its path"
    for other in others:
        assert cached.cache.admit(other)
        assert other.start == 100


def test_nobody_waits_for_what_has_been_passed() -> None:
    cached = Cached()
    first, second = cached.ticket([*count(0, 100), 900]), cached.ticket([*count(0, 80), 910])
    assert cached.cache.admit(first)
    cached.absorb(first, until=90)
    assert cached.cache.admit(second)
    assert (second.start, second.points) == (0, [80, 81])


def test_nobody_waits_for_few_tokens_or_for_the_less_urgent() -> None:
    cached = Cached()
    first = cached.ticket([*count(0, LEAST_WAIT - 1), 900])
    second = cached.ticket([*count(0, LEAST_WAIT - 1), 910])
    assert cached.cache.admit(first) and cached.cache.admit(second)
    slow, urgent = cached.ticket(count(0, 200)), cached.ticket(count(0, 200))
    slow.priority = 1
    assert cached.cache.admit(slow) and cached.cache.admit(urgent)


def test_who_waits_goes_on_alone_when_the_other_is_cancelled() -> None:
    cached = Cached()
    first, second = cached.ticket(count(0, 50)), cached.ticket(count(0, 50))
    cached.cache.admit(first)
    assert not cached.cache.admit(second)
    cached.cache.close(first)
    assert cached.cache.admit(second)
    assert (second.start, second.points) == (0, [50])


def test_a_full_tier_hands_its_oldest_down_and_a_hit_brings_it_back() -> None:
    cached = Cached({Tier.DEVICE: 1, Tier.HOST: 1, Tier.DISK: 1})
    for first in range(4):
        cached.run(count(100 * first, 20))
    tiers = {entry.payload.tokens[:4]: entry.tier for entry in cached.cache.tiers}
    assert tiers == {
        pack_tokens([300]): Tier.DEVICE,
        pack_tokens([200]): Tier.HOST,
        pack_tokens([100]): Tier.DISK,
    }
    assert cached.run(count(100, 20))[0] == 20
    tiers = {entry.payload.tokens[:4]: entry.tier for entry in cached.cache.tiers}
    assert tiers[pack_tokens([100])] is Tier.DEVICE
    assert len(tiers) == 3, "the snapshots changed places; none had to go"


def test_what_is_in_a_states_file_takes_no_room_on_disk() -> None:
    cached = Cached({Tier.HOST: 1, Tier.DISK: 1})
    tokens = count(0, 20)
    parked = cached.shelf.park("", pack_tokens(tokens), complete=True)
    assert cached.cache.keep("", pack_tokens(tokens), parked, Tier.DISK, 1, complete=True)
    entry = cached.cache.hold("", pack_tokens(tokens))
    assert entry is not None and entry.tier is Tier.DISK
    file = Parked("", pack_tokens(tokens), Tier.SAVED, complete=True)
    cached.cache.tiers.back(entry, file, complete=True)
    assert (entry.tier, entry.payload) == (Tier.SAVED, file) and parked not in cached.shelf.held
    # Nor does it come back to the disk when the memory has no room for it.
    held = cached.shelf.park("", pack_tokens([7]), complete=True)
    other = cached.shelf.park("", pack_tokens([8]), complete=True)
    for parked, tier in ((held, Tier.HOST), (other, Tier.DISK)):
        assert cached.cache.keep("", parked.tokens, parked, tier, 1, complete=True)
    assert cached.cache.hold("", held.tokens) is not None
    assert cached.cache.hold("", other.tokens) is not None
    cached.shelf.moved.clear()
    assert cached.run(tokens)[0] == 20
    assert entry.tier is Tier.SAVED and not cached.shelf.moved


def test_what_comes_from_elsewhere_lies_where_there_is_room() -> None:
    for budgets, tier in (({Tier.DEVICE: 1}, Tier.DEVICE), ({Tier.DEVICE: 1, Tier.DISK: 1}, Tier.DISK)):
        cached = Cached(budgets)
        parked = cached.shelf.park("", pack_tokens([1, 2]), complete=True)
        assert cached.cache.keep("", pack_tokens([1, 2]), parked, Tier.HOST, 1, complete=True)
        assert [entry.tier for entry in cached.cache.tiers] == [tier]


def test_a_busy_disk_loses_a_snapshot_rather_than_time() -> None:
    cached = Cached({Tier.DEVICE: 1, Tier.DISK: 10})
    cached.shelf.disk_is_busy = True
    cached.run(count(0, 20))
    cached.run(count(100, 20))
    assert [entry.tier for entry in cached.cache.tiers] == [Tier.DEVICE]
    assert cached.cache.tiers.evictions == 1


def test_a_prompt_waits_for_a_slow_snapshot_and_does_without_a_lost_one() -> None:
    cached = Cached()
    cached.run(count(0, 20))
    cached.run(count(0, 40))
    (short, long) = cached.cache.tiers
    cached.shelf.slow.add(long.payload)
    ticket = cached.ticket(count(0, 41))
    assert not cached.cache.admit(ticket)
    cached.shelf.lost.add(long.payload)
    assert cached.cache.admit(ticket)
    assert ticket.entry is short and long.payload not in cached.shelf.held


def test_a_snapshot_in_use_is_not_evicted() -> None:
    cached = Cached({Tier.DEVICE: 1})
    cached.run(count(0, 20))
    reader = cached.ticket([*count(0, 20), 7])
    assert cached.cache.admit(reader) and reader.entry is not None
    cached.run(count(100, 20))
    assert reader.entry.payload in cached.shelf.held
    cached.cache.started(reader)
    cached.run(count(100, 20))
    assert [entry.payload.tokens[:4] for entry in cached.cache.tiers] == [pack_tokens([100])]


@pytest.mark.parametrize("agreeing", [0, 1, 15, 16, 17, 100, 40_000, 99_999, 100_000])
def test_common_tokens(agreeing: int) -> None:
    a = count(0, 100_000)
    b = [*a[:agreeing], *(-1 for _ in a[agreeing:])]
    assert common_tokens(pack_tokens(a), pack_tokens(b), 0) == agreeing
    if agreeing > 7:
        assert common_tokens(pack_tokens(a[7:]), pack_tokens(b), 7) == agreeing - 7
    # The last bytes of one token and the first of the next are no token.
    assert common_tokens(pack_tokens([1, 256]), pack_tokens([1, 512]), 0) == 1


def test_a_known_beginning_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever begins with 100,000 known tokens must not wait long for that to be found out."""
    cached = Cached()
    prefix = count(0, 100_000)
    cached.run(prefix)
    compared = []

    def count_tokens(label: bytes, tokens: bytes, start: int) -> int:
        common = common_tokens(label, tokens, start)
        compared.append(common)
        return common

    monkeypatch.setattr(radix, "common_tokens", count_tokens)
    for suffix in ([7], [8, 8], [9]):
        begun = cached.ticket([*prefix, *suffix])
        compared.clear()
        assert cached.cache.admit(begun) and begun.start == len(prefix)
        assert sum(compared) <= len(prefix) + 2 * len(suffix)
        cached.absorb(begun)


class Tree(RuleBasedStateMachine):
    """The radix tree is a dictionary whose keys are found by what begins with them."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: RadixTree[str] = RadixTree()
        self.model: dict[bytes, str] = {}

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=8), value=st.text())
    def put(self, tokens: list[int], value: str) -> None:
        self.tree.insert(pack_tokens(tokens)).value = value
        self.model[pack_tokens(tokens)] = value

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=8), value=st.text(), data=st.data())
    def put_on_the_way(self, tokens: list[int], value: str, data: st.DataObject) -> None:
        """Of a beginning, looked for from what is known of a shorter one."""
        end = data.draw(st.integers(1, len(tokens)))
        known = [None, *(node for node in self.tree.walk(pack_tokens(tokens))[0] if node.depth <= end)]
        node = self.tree.insert(pack_tokens(tokens), end, below=data.draw(st.sampled_from(known)))
        assert node.depth == end
        node.value = value
        self.model[pack_tokens(tokens[:end])] = value

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.model:
            key = data.draw(st.sampled_from(sorted(self.model)))
            node = self.tree.walk(key)[0][-1]
            assert node.value == self.model.pop(key)
            self.tree.discard(node)

    @rule(tokens=st.lists(st.integers(0, 2), max_size=10))
    def find(self, tokens: list[int]) -> None:
        found, shared = self.tree.walk(pack_tokens(tokens))
        prefixes = [pack_tokens(tokens[:n]) for n in range(len(tokens) + 1)]
        assert [(node.depth, node.value) for node in found] == [
            (len(prefix) // 4, self.model[prefix]) for prefix in prefixes if prefix in self.model
        ]
        assert shared == max(n for n, p in enumerate(prefixes) if n == 0 or any(k.startswith(p) for k in self.model))

    @invariant()
    def nothing_is_kept_for_nothing(self) -> None:
        nodes = [self.tree.root]
        values = 0
        while nodes:
            node = nodes.pop()
            values += node.value is not None
            nodes += node.children.values()
            if node.parent is not None:
                assert node.value is not None or len(node.children) > 1
                assert node.depth == node.parent.depth + len(node.label) // 4
        assert values == len(self.model)


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

# Prompts of a few blocks: long enough beginnings in common, and short enough to write down.
BLOCKS = [count(1000 * i, 40) for i in range(3)] + [[7], [8, 9]]
PROMPTS = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5).map(lambda blocks: list(chain(*blocks)))
SCOPES = st.sampled_from(["a", "b"])


class Traffic(RuleBasedStateMachine):
    """Prompts in any order of events, under small budgets, against a search through everything that is parked."""

    waiting: Bundle[Ticket[Parked]] = Bundle("waiting")
    running: Bundle[Ticket[Parked]] = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.cached = Cached({Tier.DEVICE: 3, Tier.HOST: 2, Tier.DISK: 4})
        self.cache, self.shelf = self.cached.cache, self.cached.shelf
        self.tickets: list[Ticket[Parked]] = []
        self.saved: list[tuple[Entry[Parked], Parked | None]] = []

    @rule(target=waiting, prompt=PROMPTS, scope=SCOPES, checkpoint=st.integers(1, 99))
    def arrive(self, prompt: list[int], scope: str, checkpoint: int) -> Ticket[Parked]:
        return self.cached.ticket(prompt, scope, (checkpoint,))

    @rule(target=running, ticket=consumes(waiting))
    def admit(self, ticket: Ticket[Parked]) -> object:
        """Whoever is let in begins at the longest prefix there is; whoever is not waits for more than that."""
        usable = [
            len(parked.tokens) // 4
            for parked in self.shelf.held | self.files
            if parked.scope == ticket.scope
            and ticket.tokens.startswith(parked.tokens)
            and (parked.complete or len(parked.tokens) < len(ticket.tokens))
        ]
        longest = max(usable, default=0)
        if self.cache.admit(ticket):
            assert ticket.start == longest
            assert all(longest < point <= ticket.length for point in ticket.points)
            self.tickets.append(ticket)
            return ticket
        other, position = next((t, p) for t in self.tickets for p in t.points if Awaited(t, p) == ticket.awaited)
        assert other.scope == ticket.scope and position > longest
        assert other.tokens[: 4 * position] == ticket.tokens[: 4 * position]
        # It will be let in, in the end: everybody it may wait for is running.
        return multiple()

    @rule(ticket=running)
    def absorb_some(self, ticket: Ticket[Parked]) -> None:
        if ticket in self.tickets and ticket.points:
            self.cached.absorb(ticket, until=ticket.points[0])

    @rule(ticket=consumes(running), cancelled=st.booleans())
    def end(self, ticket: Ticket[Parked], cancelled: bool) -> None:
        self.tickets.remove(ticket)
        if cancelled:
            self.cache.close(ticket)
        else:
            self.cached.absorb(ticket)

    @rule(prompt=PROMPTS, scope=SCOPES, complete=st.booleans())
    def keep(self, prompt: list[int], scope: str, complete: bool) -> None:
        tokens = pack_tokens(prompt)
        parked = self.shelf.park(scope, tokens, complete=complete)
        self.cache.keep(scope, tokens, parked, Tier.DEVICE, 1, complete=complete)

    @property
    def files(self) -> set[Parked]:
        """Of the states that are saved there and not lost."""
        return {file for entry, file in self.saved if file is not None and entry.nbytes}

    @rule(prompt=PROMPTS, scope=SCOPES, written=st.booleans())
    def save(self, prompt: list[int], scope: str, written: bool) -> None:
        entry = self.cache.hold(scope, pack_tokens(prompt))
        if entry is not None:
            self.saved.append((entry, None))
            if written:
                self.write(len(self.saved) - 1)

    def write(self, number: int) -> None:
        entry, file = self.saved[number]
        if file is None and entry.nbytes:
            file = Parked(entry.scope, entry.payload.tokens, Tier.SAVED, entry.complete)
            self.cache.tiers.back(entry, file, complete=entry.complete)
            self.saved[number] = entry, file

    @rule(data=st.data(), written=st.booleans())
    def delete(self, data: st.DataObject, written: bool) -> None:
        """A saved state is written after a while, or deleted."""
        if not self.saved:
            return
        number = data.draw(st.integers(0, len(self.saved) - 1))
        if written:
            self.write(number)
            return
        entry, file = self.saved.pop(number)
        if file is not None:
            self.cache.tiers.unback(entry, file)
        self.cache.tiers.release(entry)

    @rule(prompt=PROMPTS, scope=SCOPES, complete=st.booleans())
    def find_saved(self, prompt: list[int], scope: str, complete: bool) -> None:
        tokens = pack_tokens(prompt)
        file = Parked(scope, tokens, Tier.SAVED, complete)
        entry = self.cache.find_saved(scope, tokens, file, 1, complete=complete)
        if complete or not entry.complete:
            file.complete = entry.complete  # what it has beyond that is not used
            self.saved.append((entry, file))
        else:
            self.saved.append((entry, None))

    def draw_on_disk(self, data: st.DataObject) -> Parked | None:
        """One of those on disk, if there are any."""
        on_disk = sorted((p for p in self.shelf.held if p.tier is Tier.DISK), key=lambda p: (p.scope, p.tokens))
        return data.draw(st.sampled_from(on_disk)) if on_disk else None

    @rule(data=st.data())
    def fail_to_write(self, data: st.DataObject) -> None:
        """A file of the cache's could not be written."""
        if (parked := self.draw_on_disk(data)) is not None:
            self.shelf.unwritten.append(parked)
            self.cache.tiers.recover()
            assert parked not in self.shelf.held

    @rule(budget=st.integers(0, 4))
    def resize(self, budget: int) -> None:
        """What does not fit any more is handed on, save what is pinned or held."""
        self.cache.tiers.resize(Tier.DISK, budget)
        self.cached.budgets[Tier.DISK] = max(budget, self.cache.tiers.usage(Tier.DISK)[0])

    @rule(busy=st.booleans())
    def disk(self, busy: bool) -> None:
        self.shelf.disk_is_busy = busy

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """A snapshot on disk becomes unreadable, is found out, and is served to nobody."""
        if (parked := self.draw_on_disk(data)) is not None:
            self.shelf.lost.add(parked)
            ticket = Ticket(parked.scope, parked.tokens + pack_tokens([5]), (), reuse=True)
            if self.cache.admit(ticket):
                assert parked not in self.shelf.held or ticket.entry is None or ticket.entry.payload is not parked
            self.cache.close(ticket)
            self.shelf.lost.clear()

    @invariant()
    def books_balance(self) -> None:
        entries = list(self.cache.tiers)
        in_files = {entry.payload for entry in entries if entry.tier is Tier.SAVED}
        assert in_files <= self.files
        assert {entry.payload for entry in entries} - in_files == self.shelf.held
        places = {(entry.scope, entry.payload.tokens) for entry in entries}
        assert len(places) == len(entries), "two snapshots of the same tokens"
        for tier in Tier:
            count = sum(entry.tier is tier for entry in entries)
            assert self.cache.tiers.usage(tier) == (count, count)
            assert tier is Tier.SAVED or count <= self.cached.budgets[tier]
            held = sum(entry.tier is tier and entry.holds > 0 for entry in entries)
            assert self.cache.tiers.held(tier) == (held, held)
        for entry in entries:
            assert entry.tier is entry.payload.tier and entry.complete == entry.payload.complete
            assert entry.num_tokens == len(entry.payload.tokens) // 4
            assert entry.pins == sum(ticket.entry is entry for ticket in self.tickets)
            assert entry.holds == sum(held is entry for held, _ in self.saved)

    def teardown(self) -> None:
        for ticket in self.tickets:
            self.cache.close(ticket)
        for entry in list(self.cache.tiers):
            self.cache.tiers.drop(entry)
        assert not self.cache._trees and not self.cache._active and not self.shelf.held


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
