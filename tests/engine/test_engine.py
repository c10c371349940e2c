"""The engine's invariants, driven step by step on small checkpoints."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.engine.engine import Engine
from server.engine.scheduler import MAX_KEPT_PROMPTS
from server.tokenizer import load_tokenizer
from server.types import FinishReason, GenerateRequest, Refusal, RefusalReason, SamplingParams, pack_tokens
from tests.engine.driving import CLASSICS, CLIENT, FIXTURES, Answer, Driver, engine_config, random_prompt, states_of

VOCAB = 512
Mode = tuple[str, bool]
"""Device, and whether a step is launched before the previous one is retired."""
IN_STEP: Mode = ("cpu", False)
ALL_MODES = pytest.mark.parametrize(
    "mode",
    [
        pytest.param(IN_STEP, id="cpu-in-step"),
        pytest.param(("cpu", True), id="cpu-overlapped"),
        pytest.param(("cuda", True), id="cuda", marks=pytest.mark.gpu),
    ],
)


def make_driver(folder: Path = FIXTURES / "base", *, mode: Mode = IN_STEP, **changes: object) -> Driver:
    device, overlap = mode
    return Driver(Engine(engine_config(folder, device=device, **changes), overlap=overlap))  # type: ignore[arg-type]


def settle(driver: Driver) -> None:
    """Nothing is left: every accepted choice has ended, every slot is free."""
    driver.run()
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting, stats.slots_used) == (0, 0, 0)
    assert driver.engine.scheduler.allocator.num_free == stats.slots_total
    assert not driver.engine._answers.open
    assert all(answer.finish_reason is not FinishReason.RUNNING for answer in driver.answers.values())
    assert {request_id for request_id, _ in driver.answers} == driver.accepted
    assert sum(stats.finished.values()) == stats.accepted == len(driver.answers)


@pytest.mark.parametrize(
    ("mode", "max_num_seqs", "expected"),
    [
        (IN_STEP, 4, 2048),
        (IN_STEP, 3000, 3064),
        pytest.param(("cuda", True), 4, 8192, marks=pytest.mark.gpu),
    ],
)
def test_the_device_decides_about_the_size_of_a_step(mode: Mode, max_num_seqs: int, expected: int) -> None:
    driver = make_driver(mode=mode, max_num_batched_tokens=None, max_num_seqs=max_num_seqs)
    assert driver.engine.scheduler.token_budget == expected


@ALL_MODES
@pytest.mark.parametrize("name", ["base", "gqa", "conv", "nofuse"])
def test_greedy_answers_are_the_expected_ones(name: str, mode: Mode) -> None:
    expected = load_file(FIXTURES / name / "expected.safetensors")
    driver = make_driver(FIXTURES / name, mode=mode)
    answer = driver.complete(expected["ids_65"].tolist(), temperature=0.0, max_tokens=48, ignore_eos=True, logprobs=2)
    assert answer.finish_reason is FinishReason.LENGTH
    margins = expected["greedy_margin"].tolist()
    for position, (token, wanted) in enumerate(zip(answer.token_ids, expected["greedy_ids"].tolist(), strict=True)):
        if margins[position] <= 0.01 and token != wanted:
            break
        assert token == wanted, f"position {position}"
        assert abs(answer.logprobs[position].sampled - float(expected["greedy_logprobs"][position])) < 1e-3
    settle(driver)


MIXED_REQUESTS: list[tuple[int, dict[str, object]]] = [
    (1, {"temperature": 0.0, "max_tokens": 12}),
    (5, {"temperature": 1.0, "seed": 1, "max_tokens": 9}),
    (64, {"temperature": 0.8, "top_p": 0.9, "seed": 2, "max_tokens": 20}),
    (65, {"temperature": 0.7, "top_k": 20, "seed": 3, "max_tokens": 5, "logprobs": 4}),
    (130, {"temperature": 0.0, "frequency_penalty": 1.0, "presence_penalty": 0.5, "max_tokens": 16}),
    (200, {"temperature": 1.2, "min_p": 0.05, "seed": 4, "repetition_penalty": 1.3, "max_tokens": 7}),
    (33, {"temperature": 0.0, "logit_bias": {7: 3.0, 9: -100.0}, "max_tokens": 11}),
    (300, {"temperature": 1.0, "seed": -5, "max_tokens": 1}),
    (17, {"temperature": 0.9, "seed": 2**62, "min_tokens": 4, "stop_token_ids": tuple(range(100)), "max_tokens": 30}),
]


def mixed_answers(driver: Driver, order: list[int], *, spaced: bool) -> dict[int, Answer]:
    ids = {}
    for index in order:
        length, params = MIXED_REQUESTS[index]
        ids[index] = driver.submit([random_prompt(length, VOCAB, index)], ignore_eos=True, **params)
        if spaced:
            driver.step()
    settle(driver)
    return {index: driver.answers[ids[index], 0] for index in order}


@ALL_MODES
def test_an_answer_is_the_same_alone_and_in_any_batch(mode: Mode) -> None:
    """Arrival order, batch mates, token budget and slot must not show in any answer."""
    alone = {}
    for index in range(len(MIXED_REQUESTS)):
        alone |= mixed_answers(make_driver(mode=mode), [index], spaced=False)
    assert len({tuple(answer.token_ids) for answer in alone.values()}) == len(alone)
    for budget, seed in ((64, 0), (200, 1), (4096, 2)):
        order = random.Random(seed).sample(range(len(MIXED_REQUESTS)), len(MIXED_REQUESTS))
        driver = make_driver(mode=mode, max_num_batched_tokens=budget, max_num_seqs=5)
        together = mixed_answers(driver, order, spaced=seed == 1)
        for index, answer in together.items():
            assert answer.token_ids == alone[index].token_ids, MIXED_REQUESTS[index]
            assert answer.finish_reason == alone[index].finish_reason
            for ours, theirs in zip(answer.logprobs, alone[index].logprobs, strict=True):
                assert abs(ours.sampled - theirs.sampled) < 1e-4
                assert ours.top_ids == theirs.top_ids


@ALL_MODES
def test_cancelled_at_every_step(mode: Mode) -> None:
    """Whenever it comes, a cancellation ends the request once, frees its slot, and hurts nobody else."""
    driver = make_driver(mode=mode, max_num_seqs=2)
    neighbour_prompt, prompt = random_prompt(40, VOCAB, 1), random_prompt(300, VOCAB, 2)
    expected = driver.complete(neighbour_prompt, temperature=0.0, max_tokens=30).token_ids
    for steps in range(16):
        neighbour = driver.submit([neighbour_prompt], temperature=0.0, max_tokens=30)
        victim = driver.submit([prompt], temperature=0.0, max_tokens=10)
        for _ in range(steps):
            driver.step()
        driver.cancel(victim)
        driver.cancel(victim)
        answer = driver.answers[victim, 0]
        if steps < 10:
            assert answer.finish_reason is FinishReason.CANCELLED
        driver.step()
        driver.step()
        assert driver.engine.stats().slots_used <= 1, "the cancelled request keeps its slot"
        settle(driver)
        assert driver.answers[neighbour, 0].token_ids == expected
    assert answer.finish_reason is FinishReason.LENGTH, "the last round was meant to come after the end"


@ALL_MODES
@pytest.mark.parametrize("name", ["base", "conv"])
def test_a_recycled_slot_shows_nothing_of_its_last_tenant(name: str, mode: Mode) -> None:
    driver = make_driver(FIXTURES / name, mode=mode, max_num_seqs=1)
    states = driver.engine._runner._step.states
    prompt = random_prompt(70, VOCAB, 3)
    answers = []
    for garbage in (0.0, torch.nan, torch.inf, 1e30):
        states.parts["recurrent"].fill_(garbage)
        if states.conv_LSWD is not None:
            states.conv_LSWD.fill_(garbage)
        answers.append(driver.complete(prompt, temperature=0.0, max_tokens=20).token_ids)
    assert len(answers[0]) == 20
    assert all(answer == answers[0] for answer in answers)


@ALL_MODES
def test_the_state_absorbs_the_transcript_and_nothing_after_a_stop_token(mode: Mode) -> None:
    """state == f(tokens[:num_absorbed]): the stopping token is not absorbed, also when a step was launched ahead."""
    prompt = random_prompt(50, VOCAB, 4)
    free_run = make_driver(mode=mode).complete(prompt, temperature=0.0, max_tokens=20, ignore_eos=True).token_ids
    stop = next(token for token in free_run[5:] if free_run.index(token) >= 5)
    stop_at = free_run.index(stop)
    driver = make_driver(mode=mode, max_num_seqs=1)
    stopped = driver.complete(prompt, temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    assert stopped.token_ids == free_run[: stop_at + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    fresh = make_driver(mode=mode, max_num_seqs=1)
    fresh.complete(prompt + free_run[:stop_at], temperature=0.0, max_tokens=1)
    ours, reference = states_of(driver.engine, 1), states_of(fresh.engine, 1)
    assert float((ours - reference).norm() / reference.norm()) < 1e-5


@ALL_MODES
def test_idle_slots_stay_bit_identical(mode: Mode) -> None:
    driver = make_driver(mode=mode, max_num_seqs=4)
    states = driver.engine._runner._step.states.parts["recurrent"]
    states[:, 3:].fill_(torch.nan)
    before = states[:, 3:].clone()
    driver.submit([random_prompt(70, VOCAB, 5)], temperature=0.0, max_tokens=10)
    driver.submit([random_prompt(5, VOCAB, 6)], temperature=0.0, max_tokens=10)
    settle(driver)
    assert torch.equal(states[:, 3:].view(torch.int32), before.view(torch.int32))


@ALL_MODES
def test_n_and_several_prompts(mode: Mode) -> None:
    driver = make_driver(mode=mode)
    prompts = [random_prompt(10, VOCAB, 7), random_prompt(20, VOCAB, 8)]
    request = driver.submit(prompts, n=3, temperature=1.0, seed=11, max_tokens=8, ignore_eos=True)
    again = driver.submit(prompts, n=3, temperature=1.0, seed=11, max_tokens=8, ignore_eos=True)
    settle(driver)
    answers = [driver.answers[request, choice].token_ids for choice in range(6)]
    assert len({tuple(tokens) for tokens in answers}) == 6, "choices of one request repeat each other"
    assert answers == [driver.answers[again, choice].token_ids for choice in range(6)]
    for index, prompt in enumerate(prompts):
        alone = driver.submit([prompt], temperature=1.0, seed=11, max_tokens=8, ignore_eos=True)
        settle(driver)
        assert driver.answers[alone, 0].token_ids == answers[3 * index], "a prompt's place in its request shows"


def submit_apart(driver: Driver, prompts: list[list[int]], n: int, **params: object) -> int:
    """Like ``driver.submit``, but every choice absorbs its prompt itself."""
    request = driver.submit(prompts, n=n, **params)
    for seq in driver.engine._answers.open[CLIENT, request]:
        seq.leader, seq.followers = None, []
    return request


@ALL_MODES
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("base", {}),
        # States of few bits are rounded after each piece of a prompt: it is absorbed whole, or in pieces of 64.
        ("gqa", {"state_dtype": "int8", "max_num_batched_tokens": 4096}),
        ("conv", {"state_dtype": "bfloat16", "max_num_batched_tokens": 64}),
    ],
)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_choices_of_a_prompt_absorb_it_once(name: str, changes: dict[str, object], slots: int, mode: Mode) -> None:
    """With slots for all of them, for some or for one at a time, and the answers are those of separate sequences."""
    driver = make_driver(FIXTURES / name, mode=mode, max_num_seqs=slots, **changes)
    prompts = [random_prompt(length, VOCAB, length) for length in (150, 1, 64)]
    for params in (
        {"temperature": 0.0, "max_tokens": 5, "logprobs": 2},
        {"temperature": 1.0, "seed": 5, "max_tokens": 20, "repetition_penalty": 1.2, "stop_token_ids": (1, 2, 3)},
        {"temperature": 0.8, "top_p": 0.9, "seed": 6, "max_tokens": 1},
        {"temperature": 1.0, "seed": 7, "max_tokens": 6, "bad_words": tuple((i, i + 1) for i in range(0, 400, 2))},
    ):
        before = driver.engine.stats().prompt_tokens
        request = driver.submit(prompts, n=4, ignore_eos=True, **params)
        settle(driver)
        between = driver.engine.stats().prompt_tokens
        assert between - before == 150 + 1 + 64
        apart = submit_apart(driver, prompts, 4, ignore_eos=True, **params)
        settle(driver)
        assert driver.engine.stats().prompt_tokens - between == 4 * (150 + 1 + 64)
        for choice in range(12):
            ours, theirs = driver.answers[request, choice], driver.answers[apart, choice]
            assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason), (params, choice)
            for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert abs(one.sampled - other.sampled) < 1e-4


@ALL_MODES
@pytest.mark.parametrize("seed", range(4))
def test_random_forks_end_as_if_they_ran_alone(seed: int, mode: Mode) -> None:
    """Forks among other traffic, with few slots, priorities and cancellations at any moment."""
    rng = random.Random(seed)
    kinds = [
        {"temperature": 0.0, "max_tokens": 6},
        {"temperature": 0.0, "max_tokens": 1},
        {"temperature": 1.0, "seed": 3, "max_tokens": 9, "stop_token_ids": tuple(range(60))},
    ]
    lengths = [1, 40, 64, 129]
    alone = {}
    reference = make_driver(mode=mode)
    for length in lengths:
        for kind, params in enumerate(kinds):
            request = submit_apart(reference, [random_prompt(length, VOCAB, length)], 5, ignore_eos=True, **params)
            settle(reference)
            alone[length, kind] = [reference.answers[request, choice] for choice in range(5)]
    driver = make_driver(mode=mode, max_num_seqs=rng.choice([1, 2, 4]), max_num_batched_tokens=rng.choice([64, 200]))
    submitted: dict[int, tuple[int, int]] = {}
    cancelled = set()
    absorbed = 0
    for _ in range(80):
        action = rng.random()
        if action < 0.3:
            length, kind = rng.choice(lengths), rng.randrange(len(kinds))
            prompt, n = random_prompt(length, VOCAB, length), rng.randint(1, 5)
            request = driver.submit([prompt], n=n, priority=rng.randint(-1, 1), ignore_eos=True, **kinds[kind])
            submitted[request] = length, kind
            absorbed += length
        elif action < 0.4 and submitted:
            request = rng.choice(list(submitted))
            driver.cancel(request)
            cancelled.add(request)
        else:
            driver.step()
    settle(driver)
    for (request, choice), answer in driver.answers.items():
        expected = alone[submitted[request]][choice]
        if answer.finish_reason is FinishReason.CANCELLED:
            assert request in cancelled
            assert answer.token_ids == expected.token_ids[: len(answer.token_ids)]
        else:
            assert (answer.token_ids, answer.finish_reason) == (expected.token_ids, expected.finish_reason)
    assert driver.engine.stats().prompt_tokens <= absorbed, "a prompt was absorbed more than once"


@ALL_MODES
def test_a_fork_is_not_disturbed_by_what_takes_its_leaders_slot(mode: Mode) -> None:
    """The leader ends at once and its slot goes to an urgent stranger before the followers get theirs."""
    driver = make_driver(mode=mode, max_num_seqs=1)
    prompt, other = random_prompt(70, VOCAB, 1), random_prompt(90, VOCAB, 2)
    params = {"temperature": 0.0, "ignore_eos": True}
    expected = driver.complete(prompt, max_tokens=12, **params).token_ids
    request = driver.submit([prompt], n=3, max_tokens=12, **params)
    driver.step()
    driver.submit([other], max_tokens=30, priority=-1, **params)
    settle(driver)
    assert [driver.answers[request, choice].token_ids for choice in range(3)] == [expected] * 3
    assert driver.engine.stats().prompt_tokens == 70 + 70 + 90


@ALL_MODES
def test_urgent_requests_do_not_pile_up_snapshots(mode: Mode) -> None:
    """Each takes the only slot before the second answers to all prompts so far, whose states must be kept somewhere."""
    driver = make_driver(mode=mode, max_num_seqs=1)
    scheduler = driver.engine.scheduler
    prompts = [random_prompt(5, VOCAB, seed) for seed in range(MAX_KEPT_PROMPTS + 9)]
    params = {"temperature": 0.0, "max_tokens": 2, "ignore_eos": True, "prompt_logprobs": 1}
    expected = [driver.complete(prompt, **params).token_ids for prompt in prompts]
    before = driver.engine.stats().prompt_tokens
    requests = []
    most = 0
    for number, prompt in enumerate(prompts):
        requests.append(driver.submit([prompt], n=3, priority=-number, **params))
        while driver.answers.get((requests[-1], 0), Answer()).finish_reason is FinishReason.RUNNING:
            driver.step()
        most = max(most, len({id(seq.snapshot) for seq in scheduler.waiting if seq.snapshot is not None}))
    settle(driver)
    assert 2 <= most <= MAX_KEPT_PROMPTS
    for request, tokens in zip(requests, expected, strict=True):
        assert [driver.answers[request, choice].token_ids for choice in range(3)] == [tokens] * 3
        # However often a prompt is absorbed, its log-probabilities are told once.
        assert len(driver.prompts[request, 0].logprobs) == 4
        assert (request, 1) not in driver.prompts
    assert driver.engine.stats().prompt_tokens - before <= 2 * 5 * len(prompts)


def test_choices_share_their_prompt() -> None:
    """Memory for prompts must not grow with n: a body of many tokens with a large n would be the end of the engine."""
    driver = make_driver()
    driver.submit([random_prompt(50, VOCAB, 1), random_prompt(50, VOCAB, 2)], n=5, max_tokens=1)
    assert len({id(seq.prompt) for seq in driver.engine.scheduler.waiting}) == 2
    settle(driver)


def test_a_prompt_stays_where_it_came() -> None:
    """A long one that is mostly known would be answered later for every copy of it."""
    driver = make_driver()
    packed = pack_tokens(random_prompt(50, VOCAB, 1))
    params = SamplingParams(max_tokens=1)
    driver.engine.submit(CLIENT, GenerateRequest(request_id=0, prompts=(packed,), params=params, arrived=0.0))
    (seq,) = driver.engine.scheduler.waiting
    assert seq.packed_prompt is packed and seq.prompt.tobytes() == packed
    settle(driver)


@ALL_MODES
def test_a_long_prompt_does_not_hold_up_a_short_one(mode: Mode) -> None:
    driver = make_driver(mode=mode, max_num_batched_tokens=256)
    driver.submit([random_prompt(50_000, VOCAB, 1)], max_tokens=1)
    driver.step()
    short = driver.submit([random_prompt(3, VOCAB, 2)], max_tokens=1)
    for _ in range(3):
        driver.step()
    assert driver.answers[short, 0].finish_reason is FinishReason.LENGTH
    driver.engine.forget_client(CLIENT)


def test_an_end_of_sequence_id_given_as_a_stop_id_is_the_stop_reason() -> None:
    driver = make_driver(CLASSICS)
    fields = {"temperature": 0.0, "logit_bias": {2: 100.0}, "max_tokens": 4}
    assert driver.complete([1, 5], **fields).stop_reason is None
    assert driver.complete([1, 5], stop_token_ids=(2,), ignore_eos=True, **fields).stop_reason == 2


def test_a_request_is_queued_whole_or_refused_whole() -> None:
    driver = make_driver(max_num_seqs=2, max_num_queued_reqs=3)
    prompt = random_prompt(5, VOCAB, 9)
    fits = driver.submit([prompt], n=4, max_tokens=3)
    refused = driver.submit([prompt, prompt], max_tokens=3)
    last = driver.submit([prompt], max_tokens=3)
    assert driver.accepted == {fits, last}
    assert list(driver.rejected) == [refused]
    assert driver.rejected[refused].reason is RefusalReason.QUEUE_FULL
    assert "queue is full" in driver.rejected[refused].message
    settle(driver)
    driver.submit([prompt, prompt], max_tokens=3)
    settle(driver)


def test_the_limit_of_a_key_holds_over_all_api_processes() -> None:
    engine = make_driver(max_num_seqs=4, max_concurrent_seqs_per_key=3).engine
    assert engine.info.max_request_choices == 3

    def submit(client: bytes, tenant: str, n: int) -> Refusal | None:
        request = GenerateRequest(
            request_id=1,
            prompts=(pack_tokens([5]),),
            n=n,
            params=SamplingParams(max_tokens=4),
            arrived=0.0,
            tenant=tenant,
        )
        engine.submit(client, request)
        return engine.take_outputs()[client].rejected.get(1)

    assert submit(b"api-0", "alice", 2) is None
    refusal = submit(b"api-1", "alice", 2)
    assert refusal is not None and refusal.reason is RefusalReason.TENANT_LIMIT
    assert submit(b"api-2", "bob", 3) is None
    engine.forget_client(b"api-0")
    assert submit(b"api-1", "alice", 3) is None


@ALL_MODES
@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_ends_every_request_once(seed: int, mode: Mode) -> None:
    rng = random.Random(seed)
    driver = make_driver(mode=mode, max_num_seqs=3, max_num_queued_reqs=6)
    open_requests = []
    for _ in range(60):
        action = rng.random()
        if action < 0.4:
            prompts = [random_prompt(rng.choice([1, 30, 64, 150]), VOCAB, rng.randrange(99))] * rng.randint(1, 2)
            open_requests.append(
                driver.submit(
                    prompts,
                    n=rng.randint(1, 4),
                    max_tokens=rng.choice([1, 2, 9]),
                    temperature=rng.choice([0.0, 1.0]),
                    top_p=rng.choice([1.0, 0.5]),
                    stop_token_ids=tuple(range(rng.choice([0, 200]))),
                )
            )
        elif action < 0.5 and open_requests:
            driver.cancel(rng.choice(open_requests))
        else:
            driver.step()
        stats = driver.engine.stats()
        assert stats.accepted == stats.running + stats.waiting + sum(stats.finished.values())
    settle(driver)
    assert len(driver.accepted) + len(driver.rejected) == len(open_requests)


def test_a_lost_client_leaves_nothing_behind() -> None:
    driver = make_driver(max_num_seqs=2)
    for _ in range(4):
        driver.submit([random_prompt(20, VOCAB, 10)], max_tokens=50)
    driver.step()
    driver.engine.forget_client(CLIENT)
    assert driver.engine.take_outputs() == {}
    driver.engine.step()
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting, stats.slots_used) == (0, 0, 0)
    assert stats.finished["cancelled"] == 4


def test_a_model_that_yields_no_numbers_ends_in_an_error() -> None:
    driver = make_driver()
    driver.engine._runner._step.model.norm.fill_(torch.nan)
    answer = driver.complete(random_prompt(5, VOCAB, 11), max_tokens=5)
    assert answer.finish_reason is FinishReason.ERROR
    assert answer.error is not None and "not finite" in answer.error
    settle(driver)


def test_figures_add_up() -> None:
    driver = make_driver(max_num_seqs=2)
    lengths = [1, 64, 130, 7]
    for length in lengths:
        driver.submit([random_prompt(length, VOCAB, length)], max_tokens=4, ignore_eos=True)
    settle(driver)
    stats = driver.engine.stats()
    assert stats.prompt_tokens == sum(lengths)
    assert stats.generated_tokens == 16
    assert stats.finished == {"stop": 0, "length": 4, "cancelled": 0, "error": 0, "abort": 0}
    for histogram in (stats.time_to_first_token, stats.time_per_output_token, stats.end_to_end, stats.queue_time):
        assert sum(histogram.counts) == 4
        assert histogram.sum >= 0
    # Each answer absorbs its prompt and all sampled tokens but the last.
    assert stats.tokens_per_step.sum == sum(lengths) + 4 * 3


def test_max_model_len_ends_an_answer() -> None:
    driver = make_driver(max_model_len=20)
    answer = driver.complete(random_prompt(15, VOCAB, 12), max_tokens=None, ignore_eos=True)
    assert len(answer.token_ids) == 5
    assert answer.finish_reason is FinishReason.LENGTH


def test_a_very_long_prompt_is_absorbed_in_constant_memory() -> None:
    """200,000 tokens; the pool and the budget do not grow with them."""
    driver = make_driver(max_num_batched_tokens=4096, max_num_seqs=2)
    shapes = [tensor.shape for tensor in (driver.engine._runner._step.states.parts["recurrent"],)]
    prompt = random_prompt(2000, VOCAB, 13) * 100
    answer = driver.complete(prompt, temperature=0.0, max_tokens=3, ignore_eos=True)
    assert len(answer.token_ids) == 3
    stats = driver.engine.stats()
    assert stats.prompt_tokens == 200_000
    assert stats.tokens_per_step.counts[-1] == 0, "a step took more tokens than the budget"
    assert [driver.engine._runner._step.states.parts["recurrent"].shape] == shapes


@pytest.fixture(scope="module")
def classics() -> Driver:
    return make_driver(CLASSICS, tokenizer=True)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """Text and stop strings are tested on the shipped model."""
    return load_tokenizer(CLASSICS).encode("The old man looked at the sea and")


def test_text_is_the_expected_continuation(classics: Driver, prompt: list[int]) -> None:
    expected = load_file(FIXTURES / "classics-11m" / "expected.safetensors")
    answer = classics.complete(prompt, temperature=0.0, max_tokens=64)
    margins, wanted = expected["greedy_margin"].tolist(), expected["greedy_ids"].tolist()
    first_tie = next((i for i, margin in enumerate(margins) if margin <= 0.01), 64)
    assert first_tie > 10
    assert answer.token_ids[:first_tie] == wanted[:first_tie]
    assert answer.text.startswith(b" ")


def test_a_stop_string_cuts_the_text_before_it(classics: Driver, prompt: list[int]) -> None:
    whole = classics.complete(prompt, temperature=0.0, max_tokens=40).text.decode()
    stop = whole[20:25]
    answer = classics.complete(prompt, temperature=0.0, max_tokens=40, stop=("never in here", stop))
    assert answer.text.decode() == whole[: whole.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, stop)
    late = classics.complete(prompt, temperature=0.0, max_tokens=40, stop=(stop,), min_tokens=40)
    assert late.text.decode() == whole


def test_a_held_back_beginning_is_released_at_the_end(classics: Driver, prompt: list[int]) -> None:
    whole = classics.complete(prompt, temperature=0.0, max_tokens=10).text.decode()
    answer = classics.complete(prompt, temperature=0.0, max_tokens=10, stop=(whole[-1] + "\0never",))
    assert answer.text.decode() == whole
    assert answer.finish_reason is FinishReason.LENGTH


def test_the_end_of_sequence_token_has_no_text(classics: Driver, prompt: list[int]) -> None:
    eos = classics.engine.info.eos_token_ids
    assert eos == (2,)
    answer = classics.complete(prompt, temperature=0.0, max_tokens=10, logit_bias={2: 100.0})
    assert (answer.token_ids, answer.text) == ([2], b"")
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, None)
    ignoring = classics.complete(prompt, temperature=0.0, max_tokens=3, logit_bias={2: 100.0}, ignore_eos=True)
    assert (ignoring.token_ids, ignoring.text) == ([2, 2, 2], b"")
    assert ignoring.finish_reason is FinishReason.LENGTH


def test_sampling_defaults_come_from_the_checkpoint() -> None:
    auto = Engine(engine_config(CLASSICS, generation_config="auto"))
    assert auto.info.default_sampling == {"temperature": 0.8, "top_p": 0.95}
    assert Engine(engine_config(CLASSICS)).info.default_sampling == {}


@ALL_MODES
def test_the_parts_of_every_step_are_timed(mode: Mode) -> None:
    driver = make_driver(mode=mode)
    driver.submit([[1, 2, 3]], max_tokens=4, ignore_eos=True)
    settle(driver)
    parts = driver.engine.stats().step_parts
    steps = {part: sum(histogram.counts) for part, histogram in parts.items()}
    on_device = 4 if mode[0] == "cuda" else 0
    assert steps == {"schedule": 4, "launch": 4, "device": on_device, "retire": 4}
    assert all(0 < histogram.sum < 60 for histogram in parts.values() if sum(histogram.counts))
