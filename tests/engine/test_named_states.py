"""Saved states: whoever continues one gets what the uninterrupted transcript would have got."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from server.component_settings import StateCacheConfig
from server.engine.engine import Engine
from server.engine.named_states import DEFAULT_TTL, NamedState, NamedStates, NoRoomError, StateLimits, TenantFullError
from server.engine.prefix_cache import PrefixCache
from server.engine.reuse import PrefixReuse
from server.engine.tiers import Entry, Tier
from server.grammar import from_regex
from server.types import FinishReason, Refusal, RefusalReason, StateAction, pack_tokens
from tests.engine.driving import CLASSICS, FIXTURES, Answer, Driver, engine_config, random_prompt

VOCAB = 512
ROOMY = StateCacheConfig(gpu_bytes=256 << 20, host_bytes=256 << 20)
GREEDY: dict[str, object] = {"temperature": 0.0, "ignore_eos": True}
MODES = pytest.mark.parametrize(
    ("device", "overlap"),
    [
        pytest.param("cpu", False, id="cpu-in-step"),
        pytest.param("cpu", True, id="cpu-overlapped"),
        pytest.param("cuda", True, id="cuda", marks=pytest.mark.gpu),
    ],
)


def make_driver(
    name: str = "base",
    *,
    overlap: bool = False,
    device: str = "cpu",
    cache: StateCacheConfig = ROOMY,
    **changes: object,
) -> Driver:
    config = engine_config(FIXTURES / name, device=device, state_cache=cache, **changes)
    return Driver(Engine(config, overlap=overlap))


def run(driver: Driver, prompts: list[list[int]], n: int = 1, **options: object) -> list[Answer]:
    """Every answer to a request that the engine takes."""
    request = driver.submit(prompts, n, **(GREEDY | options))  # type: ignore[arg-type]
    assert request not in driver.rejected, driver.rejected[request]
    driver.run()
    return [driver.answers[request, choice] for choice in range(len(prompts) * n)]


@MODES
@pytest.mark.parametrize("name", ["base", "conv", "gqa"])
def test_a_continued_state_answers_like_the_whole_transcript(name: str, device: str, overlap: bool) -> None:
    driver = make_driver(name, device=device, overlap=overlap)
    cold = make_driver(name, device=device, cache=StateCacheConfig())
    transcript = random_prompt(50, VOCAB, 1)
    reference = None
    for turn in range(4):
        new = random_prompt(turn * 5, VOCAB, 100 + turn)  # of the second turn on; the first is the beginning
        before = driver.engine.stats().prompt_tokens
        (answer,) = run(driver, [transcript if reference is None else new], state=reference, save=True, max_tokens=18)
        if reference is not None:
            assert driver.engine.stats().prompt_tokens - before == len(new)
            assert answer.cached_tokens == len(transcript)
            transcript = transcript + new
        assert answer.token_ids == cold.complete(transcript, max_tokens=18, **GREEDY).token_ids
        transcript = transcript + answer.token_ids
        assert answer.state is not None and answer.state.num_tokens == len(transcript)
        assert answer.state.nbytes > 0
        reference = answer.state.id
    # Nothing at all after it: the answer just goes on.
    before = driver.engine.stats().prompt_tokens
    (more,) = run(driver, [[]], state=reference, max_tokens=9)
    assert more.token_ids == cold.complete(transcript, max_tokens=9, **GREEDY).token_ids
    assert driver.engine.stats().prompt_tokens == before and more.cached_tokens == len(transcript)


@MODES
def test_a_stop_token_is_no_part_of_the_state(device: str, overlap: bool) -> None:
    driver = make_driver(device=device, overlap=overlap)
    cold = make_driver(device=device, cache=StateCacheConfig())
    prompt = random_prompt(30, VOCAB, 2)
    free = cold.complete(prompt, max_tokens=20, **GREEDY)
    (answer,) = run(driver, [prompt], save=True, max_tokens=99, stop_token_ids=(free.token_ids[12],))
    assert answer.finish_reason is FinishReason.STOP
    kept = prompt + answer.token_ids[:-1]
    assert answer.state is not None and answer.state.num_tokens == len(kept)
    new = random_prompt(5, VOCAB, 3)
    before = driver.engine.stats().prompt_tokens
    (more,) = run(driver, [new], state=answer.state.id, max_tokens=9)
    assert more.token_ids == cold.complete(kept + new, max_tokens=9, **GREEDY).token_ids
    assert driver.engine.stats().prompt_tokens - before == len(new)
    # Without anything new, the stop token comes again, for that is what the model says here.
    before = driver.engine.stats().prompt_tokens
    (same,) = run(driver, [[]], state=answer.state.id, max_tokens=9)
    assert same.token_ids == cold.complete(kept, max_tokens=9, **GREEDY).token_ids
    assert driver.engine.stats().prompt_tokens == before and same.cached_tokens == len(kept)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_is_no_part_of_the_state(overlap: bool, include: bool) -> None:
    """The transcript ends with the last token that holds nothing of what was cut off."""
    cache = StateCacheConfig(host_bytes=256 << 20)
    config = engine_config(CLASSICS, tokenizer=True, state_cache=cache)
    driver, cold = Driver(Engine(config, overlap=overlap)), Driver(Engine(engine_config(CLASSICS, tokenizer=True)))
    table = driver.engine._requests.texts.plain
    assert table is not None
    prompt = [1, 366, 712, 435]
    free = cold.complete(prompt, max_tokens=40, **GREEDY)
    text = free.text.decode()
    for stop in (text[20:23], text[31:32], text[41:49], text[1:2]):
        (answer,) = run(
            driver, [prompt], save=True, max_tokens=40, stop=("\0none", stop), include_stop_str_in_output=include
        )
        assert answer.finish_reason is FinishReason.STOP and answer.stop_reason == stop
        assert answer.state is not None
        kept = answer.state.num_tokens - len(prompt)
        said = [b"".join(table[token] for token in answer.token_ids[:count]) for count in (kept, kept + 1)]
        assert answer.text.startswith(said[0])
        assert kept == len(answer.token_ids) or not answer.text.startswith(said[1]), "as much as there is"
        transcript = prompt + answer.token_ids[:kept]
        (more,) = run(driver, [[366]], state=answer.state.id, max_tokens=9)
        assert more.token_ids == cold.complete([*transcript, 366], max_tokens=9, **GREEDY).token_ids


def test_choices_and_prompts_are_saved_one_by_one() -> None:
    driver, cold = make_driver(), make_driver(cache=StateCacheConfig())
    base, other = random_prompt(20, VOCAB, 4), random_prompt(25, VOCAB, 5)
    answers = run(driver, [base, other], 2, save=True, temperature=1.0, seed=1, max_tokens=6)
    states = [answer.state for answer in answers]
    assert len({state.id for state in states if state is not None}) == 4
    for prompt, answer in zip((base, base, other, other), answers, strict=True):
        assert answer.state is not None and answer.state.num_tokens == len(prompt) + 6
        (more,) = run(driver, [[7]], state=answer.state.id, max_tokens=5)
        assert more.token_ids == cold.complete([*prompt, *answer.token_ids, 7], max_tokens=5, **GREEDY).token_ids
    # One state, several continuations at once.
    assert states[0] is not None
    ends = run(driver, [[8], [9], []], state=states[0].id, max_tokens=5)
    transcript = base + answers[0].token_ids
    for new, end in zip(([8], [9], []), ends, strict=True):
        assert end.token_ids == cold.complete(transcript + new, max_tokens=5, **GREEDY).token_ids


def test_penalties_count_what_the_state_holds() -> None:
    driver, cold = make_driver(), make_driver(cache=StateCacheConfig())
    prompt = random_prompt(40, VOCAB, 6)
    (answer,) = run(driver, [prompt], save=True, max_tokens=8)
    assert answer.state is not None
    (more,) = run(driver, [[]], state=answer.state.id, max_tokens=20, repetition_penalty=1.7)
    whole = prompt + answer.token_ids
    assert more.token_ids == cold.complete(whole, max_tokens=20, **GREEDY, repetition_penalty=1.7).token_ids


def test_a_state_of_a_prompt_alone() -> None:
    driver, cold = make_driver(), make_driver(cache=StateCacheConfig())
    prompt = random_prompt(300, VOCAB, 7)
    (answer,) = run(driver, [prompt], save=True, name="book", max_tokens=0)
    assert answer.state is not None and answer.state.num_tokens == 300
    before = driver.engine.stats().prompt_tokens
    (more,) = run(driver, [[5, 6]], state="book", max_tokens=5)
    assert driver.engine.stats().prompt_tokens - before == 2
    assert more.token_ids == cold.complete([*prompt, 5, 6], max_tokens=5, **GREEDY).token_ids
    before = driver.engine.stats().prompt_tokens
    (same,) = run(driver, [[]], state="book", max_tokens=5)
    assert driver.engine.stats().prompt_tokens == before and same.cached_tokens == 300
    assert same.token_ids == cold.complete(prompt, max_tokens=5, **GREEDY).token_ids


@MODES
def test_nothing_is_absorbed_twice_for_want_of_logits(device: str, overlap: bool) -> None:
    """However a state came to its end, going on from it without anything new absorbs nothing."""
    config = engine_config(CLASSICS, tokenizer=True, device=device, state_cache=ROOMY)
    driver = Driver(Engine(config, overlap=overlap))
    cold = Driver(Engine(engine_config(CLASSICS, tokenizer=True, device=device)))
    prompt = [1, 366, 712, 435]
    free = cold.complete(prompt, max_tokens=30, **GREEDY).token_ids
    sampling: list[dict[str, object]] = [
        {"max_tokens": 0},
        {"max_tokens": 1},
        {"max_tokens": 20},
        {"max_tokens": 20, "logprobs": 2},
        {"max_tokens": 20, "stop": ("\0never",)},
        {"max_tokens": 20, "repetition_penalty": 1.5, "min_tokens": 20},
        {"max_tokens": 20, "temperature": 1.0, "seed": 3},
        {"max_tokens": 20, "stop_token_ids": (free[8],)},
        {"max_tokens": 1, "stop_token_ids": (free[0],)},
        {"max_tokens": 20, "stop_token_ids": (free[19],)},
        {"max_tokens": 12, "grammar": from_regex("[a-z ]{40,90}"), "ignore_eos": False},
        {"max_tokens": 30, "grammar": from_regex(" [a-z]{4}"), "ignore_eos": False},
    ]
    for params in sampling:
        answers = run(driver, [prompt, [*prompt, 9]], 2, save=True, **params)
        for choice, answer in enumerate(answers):
            assert answer.state is not None and answer.error is None
            stops = params.get("stop_token_ids", ())
            said = [token for token in answer.token_ids if token not in (*stops, 2)]  # type: ignore[misc]
            transcript = [*prompt, 9][: 4 + choice // 2] + said
            assert answer.state.num_tokens == len(transcript), params
            assert len(answer.token_ids) <= params["max_tokens"]  # type: ignore[operator]
            before = driver.engine.stats().prompt_tokens
            (more,) = run(driver, [[]], state=answer.state.id, max_tokens=4, logprobs=0)
            assert driver.engine.stats().prompt_tokens == before, params
            assert more.cached_tokens == len(transcript)
            expected = cold.complete(transcript, max_tokens=4, logprobs=0, **GREEDY)
            assert more.token_ids == expected.token_ids
            first = [one.logprobs[0].sampled for one in (more, expected)]
            assert first[0] == pytest.approx(first[1], abs=1e-3)


@MODES
def test_a_prompt_that_was_only_read_replays(device: str, overlap: bool) -> None:
    driver, cold = make_driver(device=device, overlap=overlap), make_driver(device=device, cache=StateCacheConfig())
    prompt = random_prompt(130, VOCAB, 11)
    run(driver, [prompt], 1, max_tokens=0)
    (answer,) = run(driver, [prompt], max_tokens=6)
    assert answer.token_ids == cold.complete(prompt, max_tokens=6, **GREEDY).token_ids
    assert answer.cached_tokens == len(prompt) == driver.engine.stats().prompt_tokens


def test_cancelled_while_the_last_token_is_absorbed() -> None:
    for steps in range(1, 8):
        driver = make_driver(overlap=True)
        request = driver.submit([random_prompt(20, VOCAB, 12)], save=True, name="x", max_tokens=4, **GREEDY)
        for _ in range(steps):
            driver.step()
        driver.cancel(request)
        driver.run()
        answer = driver.answers[request, 0]
        assert (answer.finish_reason is FinishReason.LENGTH) == (answer.state is not None)
        assert driver.engine._states is not None and driver.engine._states._reserved.total() == 0
        assert driver.engine.scheduler.allocator.num_used == 0


def test_what_is_refused() -> None:
    driver = make_driver(max_model_len=64)
    (answer,) = run(driver, [random_prompt(20, VOCAB, 8)], tenant="a", save=True, name="mine", max_tokens=4)
    assert answer.state is not None

    def reason(**options: object) -> RefusalReason:
        request = driver.submit([random_prompt(40, VOCAB, 9)], **options)  # type: ignore[arg-type]
        return driver.rejected[request].reason

    assert reason(state="mine", tenant="b") is RefusalReason.UNKNOWN_STATE
    assert reason(state=answer.state.id, tenant="b") is RefusalReason.UNKNOWN_STATE
    assert reason(state="other", tenant="a") is RefusalReason.UNKNOWN_STATE
    assert reason(state="mine", tenant="a") is RefusalReason.TOO_LONG
    for action in (StateAction.DESCRIBE, StateAction.DELETE, StateAction.FORK):
        told = driver.command(action, "mine", tenant="b")
        assert isinstance(told, Refusal) and told.reason is RefusalReason.UNKNOWN_STATE
    assert driver.command(StateAction.LIST, tenant="b") == []
    assert driver.command(StateAction.LIST, tenant="a") == [answer.state]
    without = make_driver(cache=StateCacheConfig())
    for options in ({"state": "mine"}, {"save": True}):
        request = without.submit([[5]], **options)  # type: ignore[arg-type]
        assert without.rejected[request].reason is RefusalReason.STATES_OFF


def test_forks_and_names() -> None:
    driver = make_driver()
    prompt = random_prompt(20, VOCAB, 10)
    (first,) = run(driver, [prompt], save=True, name="x", max_tokens=4)
    forked = driver.command(StateAction.FORK, "x", name="y")
    assert isinstance(forked, list) and first.state is not None
    assert forked[0].num_tokens == first.state.num_tokens and forked[0].id != first.state.id
    # The name goes to the newer state.
    (second,) = run(driver, [[4]], state="x", save=True, name="x", max_tokens=4)
    assert second.state is not None
    assert driver.command(StateAction.DESCRIBE, "x") == [second.state]
    told = driver.command(StateAction.DESCRIBE, first.state.id)
    assert isinstance(told, Refusal)
    assert driver.command(StateAction.DELETE, second.state.id) == [second.state]
    assert isinstance(driver.command(StateAction.DESCRIBE, "x"), Refusal)
    (more,) = run(driver, [[]], state="y", max_tokens=4)
    cold = make_driver(cache=StateCacheConfig())
    assert more.token_ids == cold.complete(prompt + first.token_ids, max_tokens=4, **GREEDY).token_ids


@pytest.mark.parametrize("on_disk", [False, True])
def test_who_waits_for_a_state_gets_it_though_it_is_deleted(on_disk: bool, tmp_path: Path) -> None:
    """And though it would have been given up for want of room."""
    parked = make_driver().engine._runner.parked_bytes
    room = StateCacheConfig(host_bytes=2 * parked, folder=tmp_path if on_disk else None, disk_bytes=64 * parked)
    driver, cold = make_driver(cache=room, max_num_seqs=1), make_driver(cache=StateCacheConfig())
    book = random_prompt(300, VOCAB, 1)
    run(driver, [book], save=True, name="book", max_tokens=0)
    held = driver.submit([[5]], max_tokens=30, **GREEDY)
    driver.step()
    readers = [driver.submit([[9 + i]], 2, state="book", max_tokens=6, **GREEDY) for i in range(2)]
    cancelled = driver.submit([[20]], state="book", max_tokens=6, **GREEDY)
    others = [
        driver.submit([random_prompt(70, VOCAB, seed)], priority=-1, max_tokens=1, **GREEDY) for seed in range(2, 8)
    ]
    driver.cancel(cancelled)
    before = driver.engine.stats().prompt_tokens
    told = driver.command(StateAction.DELETE, "book")
    assert isinstance(told, list) and told[0].name == "book"
    assert driver.command(StateAction.LIST) == []
    refused = driver.submit([[4]], state="book", **GREEDY)
    assert driver.rejected[refused].reason is RefusalReason.UNKNOWN_STATE
    driver.run()
    assert driver.engine.stats().prompt_tokens - before == 70 * len(others) + len(readers)
    for i, reader in enumerate(readers):
        expected = cold.complete([*book, 9 + i], max_tokens=6, **GREEDY).token_ids
        assert [driver.answers[reader, choice].token_ids for choice in range(2)] == [expected] * 2
    assert len(driver.answers[held, 0].token_ids) == 30
    assert driver.engine.stats().saved.nbytes == 0
    if on_disk:
        assert not list((tmp_path / "saved").iterdir())


def test_a_save_without_room_does_not_wait_for_those_who_wait_for_its_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion waits for somebody who waits for the slot, whose state cannot be parked: it ends all the same."""
    room = StateCacheConfig(host_bytes=64 << 20, folder=tmp_path, disk_bytes=64 << 20)
    driver, cold = make_driver(cache=room, max_num_seqs=1), make_driver(cache=StateCacheConfig())
    book = random_prompt(300, VOCAB, 1)
    run(driver, [book], save=True, name="book", max_tokens=0)
    saver = driver.submit([[5]], max_tokens=10, save=True, **GREEDY)
    reader = driver.submit([[9]], state="book", max_tokens=6, **GREEDY)
    monkeypatch.setattr(PrefixReuse, "keep_answer", lambda *_: False)

    steps, step = iter(range(200)), Engine.step

    def bounded(engine: Engine) -> None:
        assert next(steps, None) is not None, "they wait for each other"
        step(engine)

    monkeypatch.setattr(Engine, "step", bounded)
    assert isinstance(driver.command(StateAction.DELETE, "book"), list)
    driver.run()
    monkeypatch.undo()
    assert len(driver.answers[saver, 0].token_ids) == 10 and driver.answers[saver, 0].state is not None
    assert driver.answers[reader, 0].token_ids == cold.complete([*book, 9], max_tokens=6, **GREEDY).token_ids
    driver.engine.close()


def test_a_full_store_refuses_and_loses_nothing() -> None:
    parked = make_driver().engine._runner.parked_bytes
    driver = make_driver(cache=StateCacheConfig(host_bytes=4 * parked))
    cold = make_driver(cache=StateCacheConfig())
    prompts = [random_prompt(70, VOCAB, seed) for seed in range(20, 22)]
    answers = run(driver, prompts, save=True, max_tokens=5)
    request = driver.submit([[5, 6]], save=True)
    assert driver.rejected[request].reason is RefusalReason.STATES_FULL
    # Other prompts come and go, and take the rest of the room.
    for seed in range(30, 36):
        run(driver, [random_prompt(70, VOCAB, seed)], max_tokens=3)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.state is not None
        (more,) = run(driver, [[9]], state=answer.state.id, max_tokens=5)
        assert more.cached_tokens == len(prompt) + 5, "the snapshot is still there"
        expected = cold.complete([*prompt, *answer.token_ids, 9], max_tokens=5, **GREEDY)
        assert more.token_ids == expected.token_ids
    assert answers[0].state is not None
    driver.command(StateAction.DELETE, answers[0].state.id)
    run(driver, [[5, 6]], save=True, max_tokens=2)


def test_room_of_requests_that_save_nothing_is_given_back() -> None:
    parked = make_driver().engine._runner.parked_bytes
    driver = make_driver(cache=StateCacheConfig(host_bytes=4 * parked))
    for seed in range(3):
        request = driver.submit([random_prompt(20, VOCAB, seed)] * 2, save=True, max_tokens=50, **GREEDY)
        assert request not in driver.rejected
        if seed:
            driver.step()
        driver.cancel(request)
        driver.run()
    assert driver.command(StateAction.LIST) == []
    run(driver, [[5, 6], [7]], save=True, max_tokens=2)


@dataclass
class Shelf:
    """Holds no bytes; remembers what it was told to give up."""

    dropped: list[int] = field(default_factory=list)

    def move(self, payload: int, tier: Tier) -> int | None:
        return payload

    def drop(self, payload: int) -> None:
        self.dropped.append(payload)

    def unread(self, payload: int) -> None:
        pass

    def ready(self, payload: int) -> bool:
        return True

    def take_unwritten(self) -> list[int]:
        return []


def test_held_snapshots_move_down_and_are_never_given_up() -> None:
    shelf = Shelf()
    cache: PrefixCache[int] = PrefixCache({Tier.DEVICE: 2, Tier.HOST: 2}, shelf)
    held: list[Entry[int]] = []
    for number in range(3):
        cache.keep("", pack_tokens([number]), number, Tier.DEVICE, 1, complete=True)
        entry = cache.hold("", pack_tokens([number, 9]))
        assert entry is not None and entry.payload == number
        held.append(entry)
    for number in range(10, 20):
        cache.keep("", pack_tokens([number]), number, Tier.DEVICE, 1, complete=True)
    assert {entry.payload for entry in held} == {0, 1, 2} and not {0, 1, 2} & set(shelf.dropped)
    assert cache.tiers.usage(Tier.DEVICE)[0] + cache.tiers.usage(Tier.HOST)[0] == 4
    for entry in held:
        cache.tiers.release(entry)
    for number in range(20, 30):
        cache.keep("", pack_tokens([number]), number, Tier.DEVICE, 1, complete=True)
    assert {0, 1, 2} <= set(shelf.dropped)
    assert cache.hold("", pack_tokens([1, 2])) is None
    assert [entry.nbytes for entry in held] == [0, 0, 0], "whoever still knows them sees that they are gone"


@dataclass
class Lot:
    """Parking for as many snapshots as there are transcripts."""

    entries: dict[bytes, Entry[int]] = field(default_factory=dict)

    def hold(self, state: NamedState) -> Entry[int] | None:
        tokens = state.tokens
        cache: PrefixCache[int] = PrefixCache({Tier.HOST: 1}, Shelf())
        if tokens not in self.entries:
            cache.keep("", tokens, 0, Tier.HOST, 1, complete=True)
            entry = cache.hold("", tokens)
            assert entry is not None
            self.entries[tokens] = entry
        else:
            self.entries[tokens].holds += 1
        return self.entries[tokens]

    def release(self, entry: Entry[int]) -> None:
        entry.holds -= 1

    def file_written(self, state: NamedState) -> Entry[int] | None:
        raise AssertionError("there are no files")

    def file_removed(self, state: NamedState) -> None:
        raise AssertionError("there are no files")

    def set_aside(self, nbytes: int) -> None:
        raise AssertionError("there are no files")


def test_states_expire_and_make_room() -> None:
    now = [1000.0]
    lot = Lot()
    states = NamedStates(lot, StateLimits(nbytes=2, state_nbytes=1), clock=lambda: now[0])

    def save(name: str | None, ttl: float | None, token: int) -> NamedState:
        return states.complete(states.save("a", name, ttl, pack_tokens([token])))

    states.reserve("a", 2)
    first = save("one", 10, 1)
    second = save(None, None, 2)
    assert (first.expires, second.expires) == (1010, 1000 + DEFAULT_TTL)
    with pytest.raises(NoRoomError, match="2 bytes are kept or about to be, of at most 2; delete some"):
        states.reserve("a", 1)
    fork = states.complete(states.fork(first, "two", 50))
    assert states.nbytes == 2, "the snapshot is shared"
    assert states.stats({}).transcript_bytes == 8, "and so is the transcript"
    now[0] = 1010
    assert states.find("a", "one") is None and states.find("a", first.id) is None
    assert states.find("a", "two") is fork
    assert lot.entries[pack_tokens([1])].holds == 1
    with pytest.raises(NoRoomError):
        states.reserve("a", 1)
    now[0] = 1050
    assert list(states.of("a")) == [second]
    states.reserve("a", 1)
    states.give_up("a")
    assert lot.entries[pack_tokens([1])].holds == 0
    assert states.nbytes == 1 and states.stats({}).transcript_bytes == 4


def test_transcripts_have_their_room() -> None:
    """Of states of a few bytes: they would fill the host's memory with what they are states of."""
    states = NamedStates(Lot(), StateLimits(nbytes=10, state_nbytes=1, transcript_nbytes=100))
    states.reserve("a", 1)
    state = states.complete(states.save("a", None, None, pack_tokens(range(20))))
    states.reserve("b", 1)
    other = states.complete(states.save("b", None, None, pack_tokens(range(100, 105))))
    with pytest.raises(NoRoomError, match="the transcripts of those that are kept take 100 bytes of memory, of at mo"):
        states.reserve("a", 1)
    states.delete(other)
    states.reserve("a", 2)
    states.complete(states.fork(state, None, None))
    assert states.stats({}).transcript_bytes == 80


def test_a_snapshot_that_grows_is_counted_as_it_was() -> None:
    """One with logits takes the place of one without, between the saves of two states that share it."""
    lot = Lot()
    states = NamedStates(lot, StateLimits(nbytes=1000, state_nbytes=1))
    states.reserve("a", 2)
    saved = []
    for nbytes in (1, 3):
        saving = states.save("a", None, None, pack_tokens([1]))
        assert saving.state.entry is not None
        saving.state.entry.nbytes = nbytes
        saved.append(states.complete(saving))
    for state in saved:
        states.delete(state)
    assert states.nbytes == 0


def test_each_tenant_has_limits_of_its_own() -> None:
    limits = StateLimits(nbytes=1000, state_nbytes=1, count=4, tenant_nbytes=2, tenant_count=3)
    states = NamedStates(Lot(), limits)

    def save(tenant: str, token: int) -> NamedState:
        states.reserve(tenant, 1)
        return states.complete(states.save(tenant, None, None, pack_tokens([token])))

    first = save("a", 1)
    save("a", 2)
    with pytest.raises(TenantFullError, match="2 bytes of this API key are kept or about to be, of at most 2"):
        states.reserve("a", 1)
    states.delete(first)
    states.reserve("a", 1)
    with pytest.raises(TenantFullError):
        states.reserve("a", 1)
    states.give_up("a")
    with pytest.raises(
        TenantFullError, match="4 more saved states: 0 of this API key are kept or about to be, of at most 3"
    ):
        states.reserve("b", 4)
    save("b", 1)
    save("b", 2)
    save("c", 1)
    with pytest.raises(NoRoomError, match="1 more saved states: 4 are kept or about to be, of at most 4"):
        states.reserve("c", 1)
    assert states.nbytes == 2, "tenants share snapshots here"
