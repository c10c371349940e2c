"""Prompts that come in pieces: absorbed as they come, in bounded memory, to the same state as in one piece."""

import random
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.component_settings import StateCacheConfig
from server.engine.engine import Engine
from server.types import FinishReason
from tests.engine.driving import FIXTURES, Driver, engine_config, random_prompt
from tests.engine.oracle import SMALL, random_tensors, write_checkpoint
from tests.engine.test_engine import ALL_MODES, IN_STEP, VOCAB, Mode, settle

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
READING: dict[str, Any] = {"max_tokens": 0, "save": True, "more": True}
ROOMY = StateCacheConfig(gpu_bytes=64 << 20, host_bytes=64 << 20)


def make_driver(folder: str | Path = "base", *, mode: Mode = IN_STEP, **changes: Any) -> Driver:
    device, overlap = mode
    config = engine_config(FIXTURES / folder, device=device, **{"state_cache": ROOMY, **changes})
    return Driver(Engine(config, overlap=overlap))


def steps(driver: Driver, count: int) -> None:
    for _ in range(count):
        if driver.engine.has_work():
            driver.step()


@ALL_MODES
@pytest.mark.parametrize("name", ["base", "conv"])
@pytest.mark.parametrize("behind", [0, 77])
def test_the_state_is_that_of_one_piece(name: str, behind: int, mode: Mode) -> None:
    rng = random.Random(behind)
    driver, cold = make_driver(name, mode=mode), make_driver(name, mode=mode, state_cache=StateCacheConfig())
    context = random_prompt(behind, VOCAB, 1)
    fields: dict[str, Any] = {}
    if behind:
        driver.submit([context], save=True, name="begun", max_tokens=0)
        driver.run()
        fields["state"] = "begun"
    for number, lengths in enumerate(([200, 300, 1], [128, 64, 64, 64], [150, 1, 1, 1, 200, 63], [1, 2, 500, 3])):
        prompt = random_prompt(sum(lengths), VOCAB, 10 * number + behind)
        before = driver.engine.stats().prompt_tokens
        start = lengths[0]
        request = driver.submit([prompt[:start]], **READING, **fields)
        steps(driver, rng.randrange(4))
        for length in lengths[1:-1]:
            driver.extend(request, prompt[start : start + length])
            start += length
            steps(driver, rng.randrange(4))
            assert driver.progress.get(request, 0) <= behind + start
        assert (request, 0) not in driver.answers
        driver.extend(request, prompt[start:], last=True)
        settle(driver)
        answer = driver.answers[request, 0]
        assert answer.finish_reason is FinishReason.LENGTH and answer.state is not None
        assert answer.state.num_tokens == behind + len(prompt) == driver.progress[request]
        # A beginning of less than a piece is nothing to begin from a saved state with.
        assert driver.engine.stats().prompt_tokens - before in (len(prompt), len(prompt) + behind)
        before = driver.engine.stats().prompt_tokens
        more = driver.submit([[]], state=answer.state.id, max_tokens=9, **GREEDY)
        driver.run()
        assert driver.engine.stats().prompt_tokens == before, "nothing is absorbed twice, not even for its logits"
        expected = cold.complete(context + prompt, max_tokens=9, **GREEDY)
        assert driver.answers[more, 0].token_ids == expected.token_ids


def test_who_waits_for_more_needs_no_step_and_no_slot() -> None:
    driver = make_driver(max_num_seqs=1, swap_bytes=64 << 20, several_keys=True)
    prompt = random_prompt(1000, VOCAB, 3)
    growing = driver.submit([prompt[:300]], tenant="a", priority=-5, **READING)
    steps(driver, 100)
    assert driver.progress[growing] == 256 and not driver.engine.has_work()
    others = [driver.submit([random_prompt(30, VOCAB, seed)], tenant="b", max_tokens=5, **GREEDY) for seed in range(3)]
    steps(driver, 100)
    assert all(driver.answers[other, 0].finish_reason is FinishReason.LENGTH for other in others)
    assert driver.engine.stats().swapped == 1 and not driver.engine.has_work()
    driver.extend(growing, prompt[300:400])
    steps(driver, 100)
    assert driver.progress[growing] == 384 and driver.engine.stats().swapped == 0
    driver.extend(growing, prompt[400:], last=True)
    settle(driver)
    answer = driver.answers[growing, 0]
    assert answer.state is not None and driver.engine.stats().prompt_tokens == 1000 + 90
    cold = make_driver(state_cache=StateCacheConfig())
    more = driver.submit([[]], tenant="a", state=answer.state.id, max_tokens=6, **GREEDY)
    driver.run()
    assert driver.answers[more, 0].token_ids == cold.complete(prompt, max_tokens=6, **GREEDY).token_ids


def test_without_room_to_swap_others_wait_and_the_engine_rests() -> None:
    driver = make_driver(max_num_seqs=1)
    prompt = random_prompt(200, VOCAB, 4)
    growing = driver.submit([prompt[:130]], **READING)
    other = driver.submit([[5, 6]], max_tokens=3, **GREEDY)
    steps(driver, 20)
    assert driver.progress[growing] == 128 and (other, 0) not in driver.answers
    driver.extend(growing, prompt[130:], last=True)
    settle(driver)
    assert driver.answers[growing, 0].state is not None


@ALL_MODES
def test_cancelled_whenever_it_comes(mode: Mode) -> None:
    for count in range(6):
        driver = make_driver(mode=mode)
        prompt = random_prompt(400, VOCAB, 5)
        request = driver.submit([prompt[:200]], name="x", **READING)
        steps(driver, count)
        if count > 3:
            driver.extend(request, prompt[200:350])
            steps(driver, 1)
        driver.cancel(request)
        driver.extend(request, prompt[350:], last=True)
        settle(driver)
        answer = driver.answers[request, 0]
        assert answer.finish_reason is FinishReason.CANCELLED and answer.state is None
        assert driver.engine._states is not None and driver.engine._states._reserved.total() == 0
        assert not driver.engine.scheduler._starved and not driver.engine.has_work()
        assert not driver.engine._reuse._cache._active  # type: ignore[union-attr]


def test_a_beginning_that_is_known_is_not_absorbed_again() -> None:
    driver = make_driver(max_num_batched_tokens=512)
    book = random_prompt(700, VOCAB, 6)
    driver.submit([book[:500]], max_tokens=0)
    driver.run()
    request = driver.submit([book[:600]], **READING)
    driver.extend(request, book[600:], last=True)
    driver.run()
    assert driver.answers[request, 0].cached_tokens == 500
    assert driver.engine.stats().prompt_tokens == 700


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Two million tokens through a window of some thousands: of these remain 4 bytes each, and copies of them."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 1, "intermediate_size": 16}
    config = SMALL | shape
    folder = write_checkpoint(tmp_path / "tiny", config, random_tensors(config))
    driver = make_driver(folder, max_num_batched_tokens=16384, max_num_seqs=2)
    window = random_prompt(16384, config["vocab_size"], 7)
    request = driver.submit([window], **READING)
    process = psutil.Process()
    sizes = []
    for number in range(1, 122):
        while driver.engine.has_work():
            driver.step()
        assert driver.progress[request] == 16384 * number - 64, "all but the last piece of the window"
        driver.extend(request, window, last=number == 121)
        sizes.append(process.memory_info().rss)
    settle(driver)
    answer = driver.answers[request, 0]
    assert answer.state is not None and answer.state.num_tokens == 122 * 16384
    assert max(sizes[10:]) - sizes[9] < 24 << 20, "the transcript takes 8 MB of these"
