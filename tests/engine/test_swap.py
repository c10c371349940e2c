"""Sequences that give their slots up for more urgent ones: nothing is absorbed twice, and no answer changes."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server import grammar
from server.component_settings import StateCacheConfig
from server.engine import runner as runner_module
from server.engine import swap as swap_module
from server.engine.engine import Engine
from server.engine.snapshot_store import SnapshotStore
from server.types import FinishReason
from tests.engine.driving import FIXTURES, Driver, engine_config, random_prompt
from tests.engine.test_engine import ALL_MODES, IN_STEP, VOCAB, Mode, settle

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
BASE = FIXTURES / "base"


def make_driver(folder: Path = BASE, *, mode: Mode = IN_STEP, **changes: Any) -> Driver:
    device, overlap = mode
    config = engine_config(folder, device=device, **{"swap_bytes": 64 << 20, "max_num_seqs": 1, **changes})
    return Driver(Engine(config, overlap=overlap))


def steps_until_first_token(driver: Driver, request: int) -> int:
    for step in range(1, 100):
        driver.step()
        if (answer := driver.answers.get((request, 0))) is not None and answer.token_ids:
            return step
    raise AssertionError("it never begins")


@ALL_MODES
@pytest.mark.parametrize(("name", "dtype"), [("base", "float32"), ("conv", "bfloat16"), ("gqa", "int8")])
def test_an_urgent_request_begins_at_once(name: str, dtype: str, mode: Mode) -> None:
    """Whatever the other one was doing: absorbing its prompt, or decoding, with tokens in its ring or without."""
    plain = make_driver(FIXTURES / name, mode=mode, swap_bytes=0, state_dtype=dtype)
    prompt, urgent = random_prompt(300, VOCAB, 1), random_prompt(20, VOCAB, 2)
    expected = plain.complete(prompt, max_tokens=40, **GREEDY).token_ids
    expected_urgent = plain.complete(urgent, max_tokens=5, **GREEDY).token_ids
    for steps in (1, 2, 4, 9, 20, 35):
        driver = make_driver(FIXTURES / name, mode=mode, state_dtype=dtype)
        first = driver.submit([prompt], priority=1, max_tokens=40, **GREEDY)
        for _ in range(steps):
            driver.step()
        second = driver.submit([urgent], priority=0, max_tokens=5, **GREEDY)
        # Its only step, and with overlap the one behind which that is retired.
        assert steps_until_first_token(driver, second) == (2 if mode[1] else 1)
        stats = driver.engine.stats()
        assert (stats.swapped, stats.swaps_out, stats.swaps_in, stats.running) == (1, 1, 0, 1)
        settle(driver)
        stats = driver.engine.stats()
        assert (stats.swapped, stats.swaps_out, stats.swaps_in) == (0, 1, 1)
        assert stats.swapped_bytes == 2 * driver.engine.info.state_bytes
        assert stats.prompt_tokens == 320, "nothing was absorbed twice"
        assert driver.answers[first, 0].token_ids == expected
        assert driver.answers[second, 0].token_ids == expected_urgent
        assert sum(stats.queue_time.counts) == 2


def test_only_the_less_urgent_of_the_same_key_give_way() -> None:
    driver = make_driver(max_num_seqs=2, several_keys=True)
    for tenant, priority in (("a", 5), ("a", 0)):
        driver.submit([random_prompt(10, VOCAB, priority)], tenant=tenant, priority=priority, max_tokens=30, **GREEDY)
    driver.step()
    driver.submit([random_prompt(10, VOCAB, 3)], tenant="b", priority=-9, max_tokens=30, **GREEDY)
    driver.submit([random_prompt(10, VOCAB, 4)], tenant="a", priority=5, max_tokens=30, **GREEDY)
    for _ in range(3):
        driver.step()
    assert driver.engine.stats().swaps_out == 0
    driver.submit([random_prompt(10, VOCAB, 5)], tenant="a", priority=4, max_tokens=30, **GREEDY)
    driver.step()
    assert driver.engine.stats().swaps_out == 1
    running = [(seq.tenant, seq.priority) for seq in driver.engine.scheduler.running]
    assert sorted(running) == [("a", 0), ("a", 4)], "the slot went to whom it was given up for"
    settle(driver)


def test_the_newest_of_the_least_urgent_gives_way_and_comes_back_first() -> None:
    driver = make_driver(max_num_seqs=3)
    order = []
    for number, priority in enumerate((1, 2, 2)):
        order.append(driver.submit([[number + 5]], priority=priority, max_tokens=60, **GREEDY))
        driver.step()
    late = driver.submit([[9]], priority=2, max_tokens=60, **GREEDY)
    urgent = driver.submit([[10]], priority=0, max_tokens=4, **GREEDY)
    driver.step()
    scheduler = driver.engine.scheduler
    assert [seq.request_id for seq in scheduler.swapped] == [order[2]]
    assert [seq.request_id for seq in scheduler.waiting] == [order[2], late]
    while not driver.answers[urgent, 0].finish_reason:
        driver.step()
    driver.step()
    assert [seq.request_id for seq in scheduler.waiting] == [late] and not scheduler.swapped
    settle(driver)


def test_there_is_only_so_much_room() -> None:
    driver = make_driver(max_num_seqs=4, swap_bytes=5 * make_driver().engine.info.state_bytes // 2)
    for number in range(4):
        driver.submit([[number + 5]], priority=1, max_tokens=50, **GREEDY)
    driver.step()
    for number in range(4):
        driver.submit([[number + 9]], max_tokens=20, **GREEDY)
    driver.step()
    stats = driver.engine.stats()
    assert (stats.swaps_out, stats.swapped, stats.running) == (2, 2, 4)
    settle(driver)


def test_a_failure_to_take_a_state_out_ends_its_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver()
    prompts = [random_prompt(20, VOCAB, seed) for seed in range(2)]
    first = driver.submit([prompts[0]], priority=1, max_tokens=30, **GREEDY)
    driver.step()
    swap = driver.engine._runner.swap
    assert swap is not None

    def fail(*args: Any, **fields: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(swap, "take", fail)
    second = driver.submit([prompts[1]], max_tokens=6, **GREEDY)
    settle(driver)
    assert driver.answers[first, 0].finish_reason is FinishReason.ERROR
    cold = make_driver(swap_bytes=0)
    assert driver.answers[second, 0].token_ids == cold.complete(prompts[1], max_tokens=6, **GREEDY).token_ids


@ALL_MODES
def test_a_prompt_of_several_answers_gives_way_too(mode: Mode) -> None:
    """However long it is: nobody urgent waits for its end."""
    plain = make_driver(mode=mode, swap_bytes=0)
    prompt, urgent = random_prompt(2000, VOCAB, 1), random_prompt(20, VOCAB, 2)
    expected = plain.submit([prompt], 3, max_tokens=4, seed=5, temperature=1.0, ignore_eos=True)
    plain.run()
    for slots in (1, 2):
        driver = make_driver(mode=mode, max_num_seqs=slots)
        first = driver.submit([prompt], 3, priority=1, max_tokens=4, seed=5, temperature=1.0, ignore_eos=True)
        for _ in range(3):
            driver.step()
        seconds = [driver.submit([urgent], max_tokens=5, **GREEDY) for _ in range(slots)]
        assert steps_until_first_token(driver, seconds[-1]) == (2 if mode[1] else 1)
        settle(driver)
        stats = driver.engine.stats()
        assert (stats.swaps_out, stats.swaps_in) == (1, 1)
        assert stats.prompt_tokens == 2000 + 20 * slots, "nothing was absorbed twice"
        for choice in range(3):
            assert driver.answers[first, choice].token_ids == plain.answers[expected, choice].token_ids


@ALL_MODES
def test_who_is_to_give_way_goes_on_while_nobody_can_begin(mode: Mode) -> None:
    """Other prompts, as urgent as the one that waits and before it, take all that a step absorbs."""
    driver = make_driver(mode=mode, max_num_seqs=4)
    first = driver.submit([[5]], priority=5, max_tokens=200, **GREEDY)
    for _ in range(2):
        driver.step()
    for seed in range(3):
        driver.submit([random_prompt(1500, VOCAB, seed)], max_tokens=3, **GREEDY)
    for _ in range(2):
        driver.step()
    before = len(driver.answers[first, 0].token_ids)
    driver.submit([random_prompt(1500, VOCAB, 9)], max_tokens=3, **GREEDY)
    for _ in range(10):
        driver.step()
    assert driver.engine.stats().swaps_out == 0, "the urgent one has had no turn yet"
    assert len(driver.answers[first, 0].token_ids) == before + 10
    settle(driver)
    alone = make_driver(mode=mode, swap_bytes=0)
    assert driver.answers[first, 0].token_ids == alone.complete([5], max_tokens=200, **GREEDY).token_ids


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.4},
    {"temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": 0.7},
    {"temperature": 1.0, "logprobs": 2, "min_tokens": 9, "stop_token_ids": tuple(range(3, 90))},
    {"temperature": 0.0, "logit_bias": {7: 3.0}, "bad_words": ((9, 4), (11,))},
]


@ALL_MODES
@pytest.mark.parametrize("seed", range(3))
def test_random_traces_say_what_they_would_have_said_alone(seed: int, mode: Mode) -> None:
    """Requests of any priority, of two tenants, that begin alike, are cancelled, and save and continue states."""
    rng = random.Random(seed)
    cache = StateCacheConfig(gpu_bytes=64 << 20, host_bytes=64 << 20) if seed else StateCacheConfig()
    fields: dict[str, Any] = {"folder": FIXTURES / ("base", "conv", "gqa")[seed], "mode": mode}
    driver = make_driver(max_num_seqs=2, state_cache=cache, swap_bytes=1 << 20, several_keys=True, **fields)
    alone = make_driver(swap_bytes=0, **fields)
    beginnings = [random_prompt(rng.randrange(1, 250), VOCAB, 50 * seed + i) for i in range(4)]
    requests: dict[int, tuple[list[int], dict[str, Any], int]] = {}
    absorbed = 0
    for number in range(40):
        prompt = rng.choice(beginnings) + random_prompt(rng.choice([1, 6, 90]), VOCAB, number)
        params = rng.choice(PARAMS) | {"ignore_eos": True, "seed": number, "max_tokens": rng.randrange(1, 25)}
        n = rng.choice([1, 1, 1, 2])
        save = seed > 0 and rng.random() < 0.3
        request = driver.submit(
            [prompt], n, priority=rng.randrange(4), tenant=rng.choice("aab"), save=save, ttl=60, **params
        )
        requests[request] = prompt, params, n
        for _ in range(rng.randrange(16)):
            driver.step()
        if rng.random() < 0.05:
            driver.cancel(rng.choice(list(requests)))
        stats = driver.engine.stats()
        scheduler = driver.engine.scheduler
        slots = [seq.slot for seq in scheduler.running]
        assert len(set(slots)) == len(slots) == stats.running <= 2
        assert all(seq.swapped and seq.slot is None and seq in scheduler.waiting for seq in scheduler.swapped)
    settle(driver)
    stats = driver.engine.stats()
    assert stats.swaps_out > 5 and stats.swaps_in <= stats.swaps_out
    assert not driver.engine.scheduler.swapped and not driver.engine.scheduler._kept
    for request, (prompt, params, n) in requests.items():
        expected = alone.submit([prompt], n, **params)
        alone.run()
        for choice in range(n):
            answer, wanted = driver.answers[request, choice], alone.answers[expected, choice]
            assert answer.error is None
            if answer.finish_reason is FinishReason.CANCELLED:
                assert answer.token_ids == wanted.token_ids[: len(answer.token_ids)]
            else:
                assert answer.token_ids == wanted.token_ids, (request, params)
                assert answer.finish_reason == wanted.finish_reason
                absorbed += 0 if choice else len(prompt)
    if not seed:
        # Without prefix reuse every prompt is absorbed once, cancelled ones in part.
        assert absorbed <= stats.prompt_tokens <= sum(len(prompt) for prompt, _, _ in requests.values())


@ALL_MODES
def test_giving_way_in_the_middle_of_a_grammar_or_of_a_scored_prompt(mode: Mode, make: Callable[..., Driver]) -> None:
    """Masks go on where they were, and every token of a prompt is scored once."""
    rules: list[dict[str, Any]] = [
        {"grammar": grammar.from_regex("[a-z]{25}")},
        {"grammar": grammar.from_regex("[ab]{12}"), "frequency_penalty": 1.0},
        {"bad_words": ((5, 6), (9, 4, 7)), "logit_bias": {5: 9.0, 6: 9.0}},
        {"prompt_logprobs": 1},
        {},
    ]
    driver = make(mode, max_num_seqs=1, swap_bytes=64 << 20)
    alone = make(mode)
    for number, (rule, temperature) in enumerate(itertools.product(rules, (0.0, 1.0))):
        prompt = random_prompt(300, 400, number)
        params = rule | {"seed": number, "temperature": temperature, "max_tokens": 25, "min_tokens": 12}
        request = driver.submit([prompt], priority=1, **params)
        driver.step()
        for _ in range(3):
            # In the middle of the prompt; then of the answer, as soon as it is not waiting for a mask.
            driver.submit([[7, 8]], max_tokens=2, **GREEDY)
            before = driver.engine.stats().swaps_in
            while driver.engine.stats().swaps_in == before:
                assert driver.engine.has_work(), "it ended before it gave way"
                driver.step()
            for _ in range(3):
                driver.step()
        settle(driver)
        assert driver.engine.stats().swaps_out == 3 * (number + 1)
        expected = alone.submit([prompt], **params)
        alone.run()
        answer, wanted = driver.answers[request, 0], alone.answers[expected, 0]
        assert (answer.token_ids, answer.text) == (wanted.token_ids, wanted.text), params
        assert answer.finish_reason is wanted.finish_reason
        if "prompt_logprobs" in params:
            scores, right = driver.prompts[request, 0], alone.prompts[expected, 0]
            assert (scores.ranks, scores.top_ids) == (right.ranks, right.top_ids)
            assert scores.logprobs == pytest.approx(right.logprobs, abs=1e-4)
            assert len(scores.logprobs) == len(prompt) - 1


@ALL_MODES
@pytest.mark.parametrize("seed", range(2))
def test_random_faults_strike_whom_they_strike(seed: int, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of states fail now and then, on their way out, back, to others and to where they are kept: whoever is not
    told of an error gets the right answer, and nothing is left behind."""
    rng = random.Random(seed)
    cache = StateCacheConfig(gpu_bytes=64 << 20, host_bytes=64 << 20)
    fields: dict[str, Any] = {"folder": FIXTURES / ("base", "conv")[seed], "mode": mode}
    driver = make_driver(max_num_seqs=2, state_cache=cache, swap_bytes=1 << 20, several_keys=True, **fields)
    alone = make_driver(swap_bytes=0, **fields)
    failing = random.Random(seed + 100)
    struck = 0
    for owner, name in (
        (swap_module, "take_snapshot"),
        (runner_module, "take_snapshot"),
        (runner_module, "restore_snapshot"),
        (runner_module, "fork_slot"),
        (SnapshotStore, "_moved"),
    ):
        original = getattr(owner, name)

        def faulty(*args: Any, _original: Any = original, **more: Any) -> Any:
            nonlocal struck
            if failing.random() < 0.1:
                struck += 1
                raise torch.OutOfMemoryError("no memory")
            return _original(*args, **more)

        monkeypatch.setattr(owner, name, faulty)
    beginnings = [random_prompt(rng.randrange(1, 250), VOCAB, 50 * seed + i) for i in range(4)]
    requests: dict[int, tuple[list[int], dict[str, Any], int, str]] = {}
    for number in range(60):
        prompt = rng.choice(beginnings) + random_prompt(rng.choice([1, 6, 90]), VOCAB, number)
        params = rng.choice(PARAMS) | {"ignore_eos": True, "seed": number, "max_tokens": rng.randrange(0, 25)}
        n = rng.choice([1, 1, 2, 3])
        if params["max_tokens"] == 0:
            params, n = {"max_tokens": 0}, 1
        tenant, save = rng.choice("aab"), rng.random() < 0.3
        request = driver.submit([prompt], n, priority=rng.randrange(4), tenant=tenant, save=save, ttl=60, **params)
        requests[request] = prompt, params, n, tenant
        for _ in range(rng.randrange(12)):
            driver.step()
        if rng.random() < 0.1:
            driver.cancel(rng.choice(list(requests)))
    settle(driver)
    monkeypatch.undo()
    errors = answers = 0
    for request, (prompt, params, n, tenant) in requests.items():
        expected = alone.submit([prompt], n, **params)
        alone.run()
        for choice in range(n):
            answer, wanted = driver.answers[request, choice], alone.answers[expected, choice]
            whole = answer.finish_reason not in (FinishReason.CANCELLED, FinishReason.ERROR)
            assert answer.token_ids == (wanted.token_ids if whole else wanted.token_ids[: len(answer.token_ids)])
            assert (answer.error is None) == (answer.finish_reason is not FinishReason.ERROR)
            errors += answer.error is not None
            answers += whole
            if whole and answer.state is not None:
                more = driver.submit([[7]], state=answer.state.id, tenant=tenant, max_tokens=4, **GREEDY)
                driver.run()
                cold = alone.complete(prompt + answer.token_ids + [7], max_tokens=4, **GREEDY)
                assert driver.answers[more, 0].token_ids == cold.token_ids
    settle(driver)
    assert struck > errors > 0 and answers > errors
    driver.complete([5], max_tokens=3)
