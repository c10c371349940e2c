"""Sequences that begin from parked states say what they would have said from the beginning, and absorb less."""

import os
import random
import resource
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
import torch

from server.component_settings import StateCacheConfig
from server.engine.arrivals import Arrivals
from server.engine.engine import Engine
from server.engine.prefix_cache import Ticket
from server.engine.runner import Runner
from server.engine.scheduler import MAX_KEPT_PROMPTS
from server.engine.sequence import Sequence
from server.engine.snapshot import Snapshot, fold_slot, restore_snapshot
from server.engine.snapshot_store import FileSnapshot, Payload, SnapshotStore
from server.engine.state_pool import NULL_SLOT
from server.types import FinishReason, pack_tokens
from tests.engine.driving import CLASSICS, FIXTURES, Answer, Driver, engine_config, random_prompt

VOCAB = 512
ROOMY = StateCacheConfig(gpu_bytes=256 << 20, host_bytes=256 << 20)
NONE = StateCacheConfig()
GREEDY: dict[str, object] = {"temperature": 0.0, "ignore_eos": True}
Mode = tuple[str, bool]
ALL_MODES = pytest.mark.parametrize(
    "mode",
    [
        pytest.param(("cpu", False), id="cpu-in-step"),
        pytest.param(("cpu", True), id="cpu-overlapped"),
        pytest.param(("cuda", True), id="cuda", marks=pytest.mark.gpu),
    ],
)
KINDS = pytest.mark.parametrize(
    ("name", "state_dtype"), [("base", "float32"), ("conv", "float32"), ("gqa", "bfloat16"), ("base", "int8")]
)
"""Checkpoints, and pools with and without rings."""


def make_driver(
    folder: Path = FIXTURES / "base", *, mode: Mode = ("cpu", False), cache: StateCacheConfig = ROOMY, **changes: object
) -> Driver:
    device, overlap = mode
    config = engine_config(folder, device=device, state_cache=cache, **changes)  # type: ignore[arg-type]
    return Driver(Engine(config, overlap=overlap))


def absorbed_by(driver: Driver, prompt: list[int], **params: object) -> tuple[Answer, int]:
    """A prompt's answer, and how many prompt tokens were absorbed for it."""
    before = driver.engine.stats().prompt_tokens
    answer = driver.complete(prompt, **(GREEDY | params))
    absorbed = driver.engine.stats().prompt_tokens - before
    assert answer.cached_tokens == len(prompt) - absorbed
    return answer, absorbed


@ALL_MODES
@KINDS
def test_the_same_prompt_again_absorbs_nothing(name: str, state_dtype: str, mode: Mode) -> None:
    driver = make_driver(FIXTURES / name, mode=mode, state_dtype=state_dtype)
    prompt = random_prompt(70, VOCAB, 1)
    first, absorbed = absorbed_by(driver, prompt, max_tokens=20, logprobs=3)
    assert absorbed == 70
    again, absorbed = absorbed_by(driver, prompt, max_tokens=20, logprobs=3)
    assert absorbed == 0
    assert again.token_ids == first.token_ids
    assert again.logprobs == first.logprobs
    # Others join in, with parameters of their own.
    request = driver.submit([prompt], n=4, temperature=0.9, seed=5, max_tokens=9)
    driver.run()
    assert driver.engine.stats().prompt_tokens == 70
    assert [driver.answers[request, choice].cached_tokens for choice in range(4)] == [70, 0, 0, 0], "counted once"
    alone = make_driver(FIXTURES / name, mode=mode, state_dtype=state_dtype, cache=NONE)
    expected = alone.submit([prompt], n=4, temperature=0.9, seed=5, max_tokens=9)
    alone.run()
    for choice in range(4):
        assert driver.answers[request, choice].token_ids == alone.answers[expected, choice].token_ids


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "state_dtype"), [("base", "float32"), ("conv", "float32"), ("gqa", "bfloat16"), ("base", "int8")]
)
def test_layers_wait_for_what_comes_from_the_host(name: str, state_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late it comes, and whoever decodes beside it or comes next."""
    driver = make_driver(
        FIXTURES / name, mode=("cuda", True), state_dtype=state_dtype, cache=StateCacheConfig(host_bytes=64 << 20)
    )
    # States of few bits are rounded where a prompt is cut, so the other one begins from the same snapshots.
    plain = make_driver(
        FIXTURES / name, mode=("cuda", True), state_dtype=state_dtype, cache=StateCacheConfig(host_bytes=64 << 20)
    )
    assert plain.engine._runner._graphs is not None
    arrivals = plain.engine._runner._graphs.arrivals  # whose events the captured steps wait for, as long as they live
    plain.engine._runner._graphs.arrivals = None
    brought: list[int] = []
    bring = Arrivals.bring

    def late(self: Arrivals, snapshot: Snapshot, slot: int) -> None:
        brought.append(slot)
        torch.cuda._sleep(200_000_000)  # cycles, some 0.1 s
        bring(self, snapshot, slot)

    monkeypatch.setattr(Arrivals, "bring", late)
    prompt = random_prompt(150, VOCAB, 1)
    for one in (driver, plain):
        one.complete(prompt, **GREEDY, max_tokens=1)
    beside = driver.submit([random_prompt(9, VOCAB, 2)], **GREEDY, max_tokens=40)
    driver.step()
    for seed in range(3):
        longer = prompt + random_prompt(1 + 7 * seed, VOCAB, 10 + seed)
        answer, expected = (one.complete(longer, **GREEDY, max_tokens=9) for one in (driver, plain))
        assert answer.cached_tokens == expected.cached_tokens == 150
        assert answer.token_ids == expected.token_ids
    assert len(brought) == 3
    driver.run()
    expected = plain.complete(random_prompt(9, VOCAB, 2), **GREEDY, max_tokens=40)
    assert driver.answers[beside, 0].token_ids == expected.token_ids
    assert arrivals is not None


ENDS = pytest.mark.parametrize("end", ["length", "stop token", "stop string"])


def end_after(free: Answer, length: int, end: str) -> dict[str, object]:
    """Parameters with which an answer ends near this length, like the free one until then."""
    if end == "stop token":
        return {"max_tokens": 99, "stop_token_ids": (free.token_ids[length],)}
    if end == "stop string":
        return {"max_tokens": 99, "stop": (free.text[2 * length : 2 * length + 6].decode(errors="ignore"),)}
    return {"max_tokens": length}


@ALL_MODES
@ENDS
@pytest.mark.parametrize("name", ["base", "conv"])
def test_a_conversation_absorbs_only_what_is_new(name: str, end: str, mode: Mode) -> None:
    is_string = end == "stop string"
    folder, vocab = (CLASSICS, 8192) if is_string else (FIXTURES / name, VOCAB)
    driver = make_driver(folder, mode=mode, tokenizer=is_string)
    cold = make_driver(folder, mode=mode, tokenizer=is_string, cache=NONE)
    transcript = random_prompt(30, vocab, 2)
    known = 0
    for turn in range(4):
        free = cold.complete(transcript, max_tokens=40, **GREEDY)
        before = driver.engine.stats().prompt_tokens
        answer = driver.complete(transcript, **(GREEDY | end_after(free, 17 + turn, end)))
        assert driver.engine.stats().prompt_tokens - before == len(transcript) - known
        assert answer.finish_reason is (FinishReason.LENGTH if end == "length" else FinishReason.STOP)
        length = len(answer.token_ids)
        assert answer.token_ids == free.token_ids[:length]
        # A step launched ahead has absorbed the token that completes a stop string, and it is kept.
        known = len(transcript) + length - (0 if is_string and mode[1] else 1)
        transcript = transcript + answer.token_ids + random_prompt(10 + turn, vocab, 50 + turn)


@ALL_MODES
@ENDS
@pytest.mark.parametrize(
    ("state_dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-3), ("int8", 2e-2)], ids=lambda value: str(value)
)
def test_an_answers_state_is_that_of_its_tokens(state_dtype: str, tolerance: float, end: str, mode: Mode) -> None:
    """However the answer ended and whatever then waited in its ring."""
    tokenizer = end == "stop string"
    folder, vocab = (CLASSICS, 8192) if tokenizer else (FIXTURES / "base", VOCAB)
    driver = make_driver(folder, mode=mode, state_dtype=state_dtype, tokenizer=tokenizer)
    reference = make_driver(folder, state_dtype="float32")
    for length in (15, 16, 17, 30):
        prompt = random_prompt(20, vocab, length)
        free = driver.complete(prompt, tenant="free", max_tokens=60, **GREEDY)
        answer = driver.complete(prompt, tenant="ended", **(GREEDY | end_after(free, length, end)))
        kept = len(answer.token_ids) - (0 if tokenizer and mode[1] else 1)
        tokens = prompt + answer.token_ids[:kept]
        reference.complete(tokens, max_tokens=1, **GREEDY)
        ours, expected = (parked_state(one, scope, tokens) for one, scope in ((driver, "ended"), (reference, "")))
        error = float((ours - expected).norm() / expected.norm())
        assert error < tolerance, f"{length} tokens"


@ALL_MODES
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "share", "tolerance"),
    [
        ("bfloat16", "float32", 0.5, 3e-3),
        ("int8", "float32", 0.25, 1e-2),
        ("int8", "bfloat16", 0.5, 2e-2),
        ("bfloat16", "int8", 1.0, 2e-2),
    ],
)
def test_parked_states_may_be_rounded(dtype: str, state_dtype: str, share: float, tolerance: float, mode: Mode) -> None:
    rounded = StateCacheConfig(gpu_bytes=256 << 20, host_bytes=256 << 20, dtype=dtype)  # type: ignore[arg-type]
    driver = make_driver(mode=mode, cache=rounded, state_dtype=state_dtype)
    exact, reference = make_driver(mode=mode, state_dtype=state_dtype), make_driver()
    prompt = random_prompt(70, VOCAB, 1)
    for one in (driver, exact, reference):
        one.complete(prompt, max_tokens=1, **GREEDY)
    (entry,) = driver.engine._reuse._cache.tiers  # type: ignore[union-attr]
    assert isinstance(entry.payload, Snapshot)
    assert entry.nbytes <= driver.engine._runner.parked_bytes
    (whole,) = exact.engine._reuse._cache.tiers  # type: ignore[union-attr]
    recurrent = whole.payload.parts["recurrent"]  # type: ignore[union-attr]
    assert entry.payload.parts["recurrent"].nbytes == share * recurrent.nbytes
    ours, expected = parked_state(driver, "", prompt), parked_state(reference, "", prompt)
    error = float((ours - expected).norm() / expected.norm())
    assert error < tolerance
    assert absorbed_by(driver, prompt, max_tokens=5)[1] == 0


@torch.inference_mode()
def parked_state(driver: Driver, scope: str, tokens: list[int]) -> torch.Tensor:
    """What a slot holds that begins with these tokens' parked state, float32 [layers, kv_heads, head_k, head_v]."""
    cache, states = driver.engine._reuse._cache, driver.engine._runner._states  # type: ignore[union-attr]
    ticket: Ticket[Payload] = Ticket(scope, pack_tokens([*tokens, 1]), (), reuse=True)
    assert cache.admit(ticket) and ticket.start == len(tokens)
    assert ticket.entry is not None and isinstance(ticket.entry.payload, Snapshot)
    snapshot = ticket.entry.payload
    cache.close(ticket)
    restore_snapshot(states, snapshot, [NULL_SLOT])
    if states.ring_size and snapshot.num_folded < snapshot.num_tokens:
        fold_slot(states, NULL_SLOT, snapshot.num_tokens - snapshot.num_folded)
    slot = torch.tensor([NULL_SLOT], device=states.device)
    return torch.cat([layer.load(slot) for layer in states.layers]).cpu()


@ALL_MODES
def test_prompts_with_a_common_beginning(mode: Mode) -> None:
    driver, cold = make_driver(mode=mode), make_driver(mode=mode, cache=NONE)
    system = random_prompt(101, VOCAB, 3)
    questions = [system + random_prompt(20 + i, VOCAB, 10 + i) for i in range(4)]
    expected = [cold.complete(question, max_tokens=8, **GREEDY).token_ids for question in questions]
    counts = []
    for question, tokens in zip(questions, expected, strict=True):
        answer, absorbed = absorbed_by(driver, question, max_tokens=8)
        assert answer.token_ids == tokens
        counts.append(absorbed)
    assert counts == [121, 122, 22, 23], "the second prompt leaves the state that the third begins from"


@ALL_MODES
def test_prompts_in_flight_absorb_their_common_beginning_once(mode: Mode) -> None:
    driver, cold = make_driver(mode=mode), make_driver(mode=mode, cache=NONE)
    system = random_prompt(150, VOCAB, 3)
    questions = [system + random_prompt(20 + i, VOCAB, 10 + i) for i in range(4)] + [random_prompt(77, VOCAB, 7)] * 5
    expected = [cold.complete(question, max_tokens=8, **GREEDY).token_ids for question in questions]
    request = driver.submit(questions, max_tokens=8, **GREEDY)
    driver.run()
    assert [driver.answers[request, i].token_ids for i in range(len(questions))] == expected
    assert driver.engine.stats().prompt_tokens == 150 + 20 + 21 + 22 + 23 + 77


def test_who_waits_for_a_prompt_keeps_no_slot_from_others() -> None:
    driver = make_driver(max_num_seqs=2, max_num_batched_tokens=128)
    long = random_prompt(3000, VOCAB, 1)
    driver.submit([long], max_tokens=2, **GREEDY)
    driver.step()
    waiting = driver.submit([long], n=2, max_tokens=2, **GREEDY)
    other = driver.submit([random_prompt(30, VOCAB, 2)], max_tokens=3, **GREEDY)
    for _ in range(8):
        driver.step()
    assert driver.answers[other, 0].finish_reason is FinishReason.LENGTH
    assert (waiting, 0) not in driver.answers
    driver.run()
    assert len(driver.answers[waiting, 1].token_ids) == 2
    assert driver.engine.stats().prompt_tokens == 3030


def test_who_waits_for_a_cancelled_prompt_goes_on() -> None:
    driver = make_driver()
    prompt = random_prompt(1000, VOCAB, 1)
    first = driver.submit([prompt], max_tokens=4, **GREEDY)
    second = driver.submit([prompt], max_tokens=4, **GREEDY)
    for _ in range(3):
        driver.step()
    assert driver.engine.stats().running == 1
    driver.cancel(first)
    driver.run()
    assert len(driver.answers[second, 0].token_ids) == 4


def test_long_prompts_leave_states_on_their_way() -> None:
    driver, cold = make_driver(max_num_batched_tokens=1024), make_driver(cache=NONE)
    prompt = random_prompt(5000, VOCAB, 1)
    assert absorbed_by(driver, prompt, max_tokens=1)[1] == 5000
    other = prompt[:4500] + random_prompt(10, VOCAB, 2)
    answer, absorbed = absorbed_by(driver, other, max_tokens=8)
    assert absorbed == 4510 - 4096
    assert answer.token_ids == cold.complete(other, max_tokens=8, **GREEDY).token_ids


def test_states_are_left_where_a_request_says() -> None:
    driver = make_driver()
    template = random_prompt(40, VOCAB, 1)
    driver.submit([[*template, 7, 8, 9]], checkpoint_at=(40, 41), max_tokens=2, **GREEDY)
    driver.run()
    assert absorbed_by(driver, [*template, 5], max_tokens=2)[1] == 1
    assert absorbed_by(driver, [*template, 7, 5], max_tokens=2)[1] == 1


def test_tenants_share_only_on_purpose() -> None:
    prompt = random_prompt(50, VOCAB, 1)
    for shared, expected in ((False, 100), (True, 50)):
        cache = StateCacheConfig(host_bytes=256 << 20, shared=shared)
        driver = make_driver(cache=cache)
        for tenant in ("a", "b", "a", "b"):
            driver.submit([prompt], tenant=tenant, max_tokens=2, **GREEDY)
            driver.run()
        assert driver.engine.stats().prompt_tokens == expected


@ALL_MODES
def test_answers_that_wait_do_not_pile_up_parked_states(mode: Mode) -> None:
    """A parked state that has been given up must not live on with everybody who waits to begin from it."""
    driver = make_driver(mode=mode, max_num_seqs=1)
    scheduler = driver.engine.scheduler
    prompts = [random_prompt(40, VOCAB, seed) for seed in range(MAX_KEPT_PROMPTS + 9)]
    expected = [driver.complete(prompt, max_tokens=2, **GREEDY).token_ids for prompt in prompts]
    requests = []
    for number, prompt in enumerate(prompts):
        requests.append(driver.submit([prompt], n=3, priority=-number, max_tokens=2, **GREEDY))
        while (requests[-1], 0) not in driver.answers:
            driver.step()
        assert len({id(seq.snapshot) for seq in scheduler.waiting if seq.snapshot is not None}) <= MAX_KEPT_PROMPTS
    driver.run()
    for request, tokens in zip(requests, expected, strict=True):
        answers = [driver.answers[request, choice] for choice in range(3)]
        assert [answer.token_ids for answer in answers] == [tokens] * 3
        assert [answer.cached_tokens for answer in answers] == [40, 0, 0]
    assert driver.engine.stats().prompt_tokens == 40 * len(prompts)


def test_an_evaluation_is_the_same_cold_and_warm() -> None:
    driver = make_driver()
    prompts = [random_prompt(40, VOCAB, i) for i in range(3)]

    def evaluate() -> tuple[list[list[float]], list[list[int]]]:
        scored = driver.submit(prompts, max_tokens=0, prompt_logprobs=1)
        generated = driver.submit(prompts, max_tokens=12, **GREEDY)
        driver.run()
        return (
            [driver.prompts[scored, i].logprobs for i in range(3)],
            [driver.answers[generated, i].token_ids for i in range(3)],
        )

    cold = evaluate()
    absorbed = driver.engine.stats().prompt_tokens
    assert evaluate() == cold
    assert driver.engine.stats().prompt_tokens == absorbed + 120, "log-probabilities of a prompt need its every token"


def test_figures() -> None:
    driver = make_driver()
    prompt = random_prompt(50, VOCAB, 1)
    for _ in range(3):
        driver.complete(prompt, max_tokens=5, **GREEDY)
    stats = driver.engine.stats()
    assert (stats.prefix_hits, stats.prefix_misses, stats.prefix_tokens_saved) == (2, 1, 100)
    assert stats.states_parked == {"device": 0, "host": 2, "disk": 0}, "the prompt's end and the answer's"
    logits = 4 * VOCAB
    assert stats.states_parked_bytes["host"] == 2 * driver.engine.info.state_bytes + logits
    assert sum(stats.state_restore.counts) == 2
    assert sum(stats.state_save.counts) == 4


def disk_cache(folder: Path, states: float, driver_bytes: int) -> StateCacheConfig:
    """Room for one state in memory and some on disk."""
    one = driver_bytes + 4 * VOCAB + 4096
    return StateCacheConfig(host_bytes=one, folder=folder, disk_bytes=int(states * one))


def test_states_come_back_from_disk(tmp_path: Path) -> None:
    size = make_driver(cache=NONE).engine.info.state_bytes
    driver, cold = make_driver(cache=disk_cache(tmp_path / "states", 100, size)), make_driver(cache=NONE)
    prompts = [random_prompt(40, VOCAB, i) for i in range(3)]
    expected = [cold.complete(prompt, max_tokens=8, **GREEDY).token_ids for prompt in prompts]
    for _ in range(3):
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert driver.complete(prompt, max_tokens=8, **GREEDY).token_ids == tokens
            driver.engine._reuse._store._writer.submit(int).result()  # type: ignore[union-attr]
    stats = driver.engine.stats()
    assert stats.prompt_tokens == 120
    assert stats.states_parked["disk"] == 5 and sum(stats.state_write.counts) >= 5
    assert sum(stats.state_read.counts) >= 5
    driver.engine.close()
    assert sorted(os.listdir(tmp_path / "states")) == ["lock", "saved"]
    assert os.listdir(tmp_path / "states" / "saved") == []


def driver_with_files(folder: Path, count: int) -> tuple[Driver, list[list[int]], list[list[int]]]:
    """An engine whose parked states have been written to files, the prompts that left them, and their answers."""
    size = make_driver(cache=NONE).engine.info.state_bytes
    driver = make_driver(cache=disk_cache(folder, 100, size))
    prompts = [random_prompt(40, VOCAB, i) for i in range(count)]
    expected = [driver.complete(prompt, max_tokens=8, **GREEDY).token_ids for prompt in prompts]
    driver.engine._reuse._store._writer.submit(int).result()  # type: ignore[union-attr]
    return driver, prompts, expected


def test_logits_from_a_file_outlast_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next file may be read to the same memory while the step is under way that samples from them."""
    driver = make_driver(cache=StateCacheConfig(folder=tmp_path, disk_bytes=64 << 20))
    prompt = random_prompt(40, VOCAB, 1)
    expected = driver.complete(prompt, max_tokens=8, **GREEDY).token_ids
    driver.engine._reuse._store._writer.submit(int).result()  # type: ignore[union-attr]
    free = driver.engine._reuse._store._read_memory._free  # type: ignore[union-attr]
    restore = Runner._restore

    def then_read(*args: Any) -> list[torch.Tensor]:
        logits = restore(*args)
        for memory in tuple(free):
            memory.fill_(0x7F)
        return logits

    monkeypatch.setattr(Runner, "_restore", then_read)
    before = driver.engine.stats().prompt_tokens
    assert driver.complete(prompt, max_tokens=8, **GREEDY).token_ids == expected
    assert driver.engine.stats().prompt_tokens == before
    driver.engine.close()


def test_a_damaged_file_costs_time_and_nothing_else(tmp_path: Path) -> None:
    driver, prompts, expected = driver_with_files(tmp_path, 3)
    damaged = 0
    for path in tmp_path.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1000] ^= 1
        path.write_bytes(content)
        damaged += 1
    assert damaged >= 4
    assert [driver.complete(prompt, max_tokens=8, **GREEDY).token_ids for prompt in prompts] == expected
    assert driver.engine.stats().prompt_tokens > 120
    driver.engine.close()


@pytest.mark.parametrize("ends", [1, 2])
def test_what_is_read_for_nobody_leaves_the_memory(ends: int, tmp_path: Path) -> None:
    """Of two that wait for a file, one is cancelled, or both are: nothing of it stays in memory."""
    driver, prompts, expected = driver_with_files(tmp_path, 3)
    store = driver.engine._reuse._store  # type: ignore[union-attr]
    waiting = [driver.submit([[*prompts[0], 7 + i]], max_tokens=8, **GREEDY) for i in range(2)]
    release = Event()
    store._reader.submit(release.wait, 60)
    driver.step()
    payloads = [entry.payload for entry in driver.engine._reuse._cache.tiers]  # type: ignore[union-attr]
    (file,) = (payload for payload in payloads if isinstance(payload, FileSnapshot) and payload.reading)
    for request in waiting[:ends]:
        driver.cancel(request)
    release.set()
    store._reader.submit(int).result()
    assert (file.source is None) is (ends == 2)
    driver.run()
    assert file.source is None and file.memory is None and file.reading is None
    assert all(driver.answers[request, 0].finish_reason is FinishReason.CANCELLED for request in waiting[:ends])
    assert [driver.complete(prompt, max_tokens=8, **GREEDY).token_ids for prompt in prompts] == expected
    store._reader.submit(int).result()
    driver.engine.close()
    assert not store.reads


@pytest.mark.parametrize("name", ["_read", "_write", "_to_host"])
def test_a_move_that_fails_costs_time_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: nobody waits for ever for a file that cannot be read, and the engine goes on."""
    driver, prompts, expected = driver_with_files(tmp_path, 4)
    failures = 0

    def fail(*_: object) -> None:
        nonlocal failures
        failures += 1
        raise MemoryError

    monkeypatch.setattr(SnapshotStore, name, fail)
    for _ in range(2):
        assert [driver.complete(prompt, max_tokens=8, **GREEDY).token_ids for prompt in prompts] == expected
    assert failures
    monkeypatch.undo()
    assert [driver.complete(prompt, max_tokens=8, **GREEDY).token_ids for prompt in prompts] == expected
    driver.engine.close()


@ALL_MODES
@pytest.mark.parametrize("seed", range(3))
def test_random_traces_say_what_they_would_have_said_alone(seed: int, mode: Mode, tmp_path: Path) -> None:
    """Conversations that grow, branch and begin alike, from several tenants, cancelled now and then, under budgets that
    hold a few states: whatever was evicted, handed down or restored, the answers are those of cold runs."""
    rng = random.Random(seed)
    cold = make_driver(mode=mode, cache=NONE)
    one = cold.engine.info.state_bytes + 4 * VOCAB + 4096
    cache = StateCacheConfig(
        gpu_bytes=3 * one, host_bytes=4 * one, folder=tmp_path, disk_bytes=8 * one, shared=seed == 2
    )
    driver = make_driver(mode=mode, cache=cache, max_num_seqs=3)
    beginnings = [random_prompt(rng.randrange(1, 200), VOCAB, 100 * seed + i) for i in range(4)]
    transcripts = list(beginnings)
    open_requests: dict[int, tuple[list[int], int]] = {}
    expected: dict[tuple[int, ...], list[int]] = {}
    finished = 0
    while finished < 50:
        if len(open_requests) < 6 and rng.random() < 0.5:
            prompt = rng.choice(transcripts) + random_prompt(rng.choice([0, 1, 5, 40]), VOCAB, rng.randrange(20))
            n = rng.choice([1, 1, 3])
            tenant = rng.choice("ab")
            request = driver.submit([prompt], n=n, tenant=tenant, max_tokens=rng.randrange(1, 30), **GREEDY)
            open_requests[request] = prompt, n
        if open_requests and rng.random() < 0.03:
            driver.cancel(rng.choice(list(open_requests)))
        driver.step()
        for request, (prompt, n) in list(open_requests.items()):
            answers = [driver.answers.get((request, choice)) for choice in range(n)]
            if any(answer is None or not answer.finish_reason for answer in answers):
                continue
            del open_requests[request]
            finished += 1
            key = tuple(prompt)
            if key not in expected:
                expected[key] = cold.complete(prompt, max_tokens=30, **GREEDY).token_ids
            for answer in answers:
                assert answer is not None
                assert answer.token_ids == expected[key][: len(answer.token_ids)]
                assert answer.finish_reason in (FinishReason.LENGTH, FinishReason.CANCELLED)
            if len(prompt) < 600:
                transcripts.append(prompt + expected[key][: rng.randrange(30)])
    driver.run()
    stats = driver.engine.stats()
    assert stats.prefix_hits > 5 and stats.states_evicted > 0
    assert not driver.engine._reuse._cache._active  # type: ignore[union-attr]
    assert all(entry.pins == 0 for entry in driver.engine._reuse._cache.tiers)  # type: ignore[union-attr]
    driver.engine.close()


def test_files_that_cannot_be_written_count_as_nothing(tmp_path: Path) -> None:
    size = make_driver(cache=NONE).engine.info.state_bytes
    driver, cold = make_driver(cache=disk_cache(tmp_path, 100, size)), make_driver(cache=NONE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        for seed in range(3):
            prompt = random_prompt(40, VOCAB, seed)
            answer = driver.complete(prompt, max_tokens=8, **GREEDY)
            assert answer.token_ids == cold.complete(prompt, max_tokens=8, **GREEDY).token_ids
            driver.engine._reuse._store._writer.submit(int).result()  # type: ignore[union-attr]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    stats = driver.engine.stats()
    assert stats.states_parked["disk"] == 0 and stats.states_parked_bytes["disk"] == 0
    assert stats.states_evicted >= 4 and stats.states_parked["host"] == 1
    driver.engine.close()


def test_copies_that_have_arrived_are_not_under_way() -> None:
    """Even if nothing has been copied since: who waits for room waits until nothing is."""

    class Left:
        def query(self) -> bool:
            return True

    reuse = make_driver().engine._reuse
    assert reuse is not None
    reuse.store._leaving.append(cast("torch.cuda.Event", Left()))
    assert not reuse.is_busy


def test_who_waits_for_a_snapshot_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds that wait for one, nor does a step look at each of them while they do."""
    driver = make_driver(max_num_seqs=8, max_num_batched_tokens=128)
    text = random_prompt(4000, VOCAB, 1)
    readers = [driver.submit([[*text, 3 + i]], n=2, max_tokens=1, **GREEDY) for i in range(300)]
    other = driver.submit([random_prompt(5, VOCAB, 2)], max_tokens=2, **GREEDY)
    for _ in range(8):
        driver.step()
    assert driver.answers[other, 0].finish_reason is FinishReason.LENGTH
    looked_at = 0
    is_blocked = Sequence.blocked.fget

    def count(seq: Sequence) -> bool:
        nonlocal looked_at
        looked_at += 1
        return is_blocked(seq)

    monkeypatch.setattr(Sequence, "blocked", property(count))
    for _ in range(5):
        driver.step()
    assert looked_at < 50
    assert driver.engine.stats().waiting == 599
    driver.run()
    assert all(len(driver.answers[reader, choice].token_ids) == 1 for reader in readers for choice in range(2))
    assert driver.engine.stats().prompt_tokens == 4000 + 300 + 5
