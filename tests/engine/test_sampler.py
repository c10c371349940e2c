"""The sampler against independent arithmetic, and its promise that a row depends on nothing but itself."""

import dataclasses
import math
from array import array
from collections import Counter

import pytest
import torch

from server.engine.constraints import mask_words
from server.engine.sampler import (
    BROKEN,
    DEAD_END,
    SamplePlan,
    Sampler,
    has_bias,
    has_penalties,
    is_filtered,
    is_greedy,
    uniform,
)
from server.engine.sequence import Sequence
from server.types import SamplingParams

VOCAB = 40


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def make_sequence(params: SamplingParams, slot: int, *, seed: int = 1, prompt: tuple[int, ...] = (1,)) -> Sequence:
    return Sequence(
        client=b"c",
        request_id=0,
        choice=0,
        prompt=array("i", prompt),
        params=params,
        seed=seed,
        stop_ids=frozenset(params.stop_token_ids),
        max_tokens=params.max_tokens,
        matcher=None,
        arrived=0.0,
        slot=slot,
    )


def plan_for(sequences: list[Sequence], position: int = 0) -> tuple[list[int], SamplePlan]:
    """The order of rows and the plan, as the runner makes them."""
    greedy = [i for i, s in enumerate(sequences) if is_greedy(s)]
    filtered = [i for i, s in enumerate(sequences) if i not in greedy and is_filtered(s)]
    plain = [i for i in range(len(sequences)) if i not in greedy and i not in filtered]
    wanted = [s.params.logprobs for s in sequences if s.params.logprobs is not None]
    plan = SamplePlan(
        len(greedy),
        len(plain),
        len(filtered),
        any(map(has_penalties, sequences)),
        any(map(has_bias, sequences)),
        any(position < s.params.min_tokens for s in sequences),
        max(wanted) if wanted else None,
    )
    return greedy + plain + filtered, plan


def sample(sampler: Sampler, sequences: list[Sequence], logits: torch.Tensor, position: int = 0) -> list[int]:
    """One step; tokens in the order of ``sequences``."""
    order, plan = plan_for(sequences, position)
    device = sampler.done_S.device
    slots = torch.tensor([sequences[i].slot for i in order], device=device)
    positions = torch.full((len(order),), position, device=device)
    tokens = sampler.sample(logits[order].to(device, copy=True), slots, positions, plan).tokens_R.tolist()
    return [tokens[order.index(i)] for i in range(len(sequences))]


def expected_distribution(logits: torch.Tensor, params: SamplingParams) -> list[float]:
    """What the parameters mean, one token at a time."""
    scaled = [x / params.temperature for x in logits.tolist()]
    peak = max(scaled)
    weights = [math.exp(x - peak) for x in scaled]
    total = sum(weights)
    probs = [w / total for w in weights]
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept = [i for i in order if probs[i] >= params.min_p * probs[order[0]]]
    if params.top_k:
        kept = kept[: params.top_k]
    mass = sum(probs[i] for i in kept)
    nucleus, so_far = [], 0.0
    for i in kept:
        if nucleus and so_far >= params.top_p * mass:
            break
        nucleus.append(i)
        so_far += probs[i]
    return [probs[i] / so_far if i in nucleus else 0.0 for i in range(len(probs))]


CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=1.5, top_k=20, top_p=0.7, min_p=0.02),
]


@pytest.mark.parametrize("params", CASES)
def test_frequencies_match_the_distribution(params: SamplingParams, device: torch.device) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    draws = 20_000
    sampler = Sampler(2, VOCAB, device=device)
    seq = make_sequence(params, slot=1)
    sampler.lease([seq])
    _, one = plan_for([seq])
    plan = SamplePlan(one.num_greedy, one.num_plain * draws, one.num_filtered * draws, False, False, False, None)
    tokens = sampler.sample(
        logits.repeat(draws, 1).to(device),
        torch.ones(draws, dtype=torch.int64, device=device),
        torch.arange(draws, device=device),
        plan,
    ).tokens_R
    counts = Counter(tokens.tolist())
    expected = expected_distribution(logits, params)
    for token, probability in enumerate(expected):
        deviation = 5 * math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[token] / draws - probability) <= deviation, (token, counts[token], probability)


def mixed_sequences() -> list[Sequence]:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=2.0, top_k=3),
        SamplingParams(temperature=1.0, min_p=0.3, logit_bias={3: 4.0, 5: -100.0}),
        SamplingParams(temperature=1.0, top_p=0.5, presence_penalty=1.5, frequency_penalty=0.5),
        SamplingParams(temperature=0.9, repetition_penalty=1.4, top_p=0.95, logprobs=3),
        SamplingParams(temperature=1.0, min_tokens=3, stop_token_ids=(0, 1, 2, 3, 4, 5)),
    ]
    return [make_sequence(p, slot=i + 1, seed=100 + i, prompt=(i, i + 7)) for i, p in enumerate(params)]


def test_a_row_is_the_same_alone_and_in_any_batch(device: torch.device) -> None:
    logits = torch.randn(10, len(mixed_sequences()), VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    together = Sampler(9, VOCAB, device=device)
    sequences = mixed_sequences()
    together.lease(sequences)
    batched = [sample(together, sequences, logits[t], t) for t in range(10)]
    for i, seq in enumerate(mixed_sequences()):
        alone = Sampler(9, VOCAB, device=device)
        alone.lease([seq])
        tokens = [sample(alone, [seq], logits[t, i : i + 1], t)[0] for t in range(10)]
        assert tokens == [row[i] for row in batched], seq.params


def pack(allowed: list[set[int]]) -> torch.Tensor:
    """Masks of the allowed tokens."""
    words = [[sum(1 << bit for bit in range(32) if 32 * word + bit in row) for word in range(2)] for row in allowed]
    assert mask_words(VOCAB) == 2
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0, logprobs=2), *CASES])
def test_held_rows_are_sampled_later_as_they_would_have_been(params: SamplingParams, device: torch.device) -> None:
    """With their masks, from their own logits, whatever the slots of others have sampled since."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(4, VOCAB, generator=generator)
    sequences = [make_sequence(params, slot=slot, seed=slot) for slot in (1, 2, 3, 4)]
    allowed = [set(range(0, VOCAB, 3)), {31, 32, 39}]
    masked = logits.clone()
    for row, tokens in zip((2, 3), allowed, strict=True):
        masked[row, [token for token in range(VOCAB) if token not in tokens]] = -torch.inf
    plain = Sampler(5, VOCAB, device=device)
    plain.lease(sequences)
    expected = sample(plain, sequences, masked)
    sampler = Sampler(5, VOCAB, device=device)
    sampler.lease(sequences)
    order, plan = plan_for(sequences[:2])
    plan = dataclasses.replace(plan, num_held=2)
    slots = torch.tensor([order[0] + 1, order[1] + 1, 3, 4], device=device)
    rows = logits[[*order, 2, 3]].to(device)
    sampled = sampler.sample(rows, slots, torch.zeros(4, dtype=torch.int64, device=device), plan)
    assert sampled.tokens_R.tolist() == [expected[index] for index in order]
    sample(sampler, sequences[:2], logits[:2], 1)
    order, plan = plan_for(sequences[2:])
    sampled = sampler.resume([order[0] + 3, order[1] + 3], [0, 0], plan, pack(allowed)[order])
    assert sampled.tokens_R.tolist() == [expected[index + 2] for index in order]
    assert sampler.last_token_S[3:].tolist() == expected[2:]
    if params.logprobs is not None:
        reference = logits[2 + order[0]].double().log_softmax(-1)
        assert sampled.logprobs_R is not None
        assert abs(float(sampled.logprobs_R[0]) - float(reference[expected[2 + order[0]]])) < 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_dead_end_is_told_from_broken_logits(temperature: float, device: torch.device) -> None:
    fields = {"temperature": temperature, "allowed_token_ids": (3, 4), "bad_words": ((3,), (4,))}
    sequences = [
        make_sequence(SamplingParams(**fields), slot=1),
        make_sequence(SamplingParams(temperature=temperature), slot=2),
        make_sequence(SamplingParams(temperature=temperature, logit_bias={5: 50.0}), slot=3),
    ]
    sampler = Sampler(4, VOCAB, device=device)
    sampler.lease(sequences)
    logits = torch.zeros(3, VOCAB)
    logits[1, 0] = torch.nan
    assert sample(sampler, sequences, logits) == [DEAD_END, BROKEN, 5]
    assert sampler.done_S.tolist() == [False, True, True, False], "nothing may be absorbed after no token"


@pytest.mark.parametrize("vocab_size", [VOCAB, 512])
def test_greedy_takes_the_first_of_the_largest(vocab_size: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(0, 9, (6, vocab_size), generator=generator).float()
    sequences = [make_sequence(SamplingParams(temperature=0.0), slot=i + 1) for i in range(6)]
    sampler = Sampler(9, vocab_size, device=device)
    sampler.lease(sequences)
    assert sample(sampler, sequences, logits, 0) == [row.index(max(row)) for row in logits.tolist()]
    for seq, row in zip(sequences, logits, strict=True):
        assert sample(sampler, [seq], row[None], 0) == [row.tolist().index(float(row.max()))]


def test_penalties_follow_the_formula(device: torch.device) -> None:
    params = SamplingParams(
        temperature=0.0, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.5, logprobs=1
    )
    seq = make_sequence(params, slot=1, prompt=(2, 2, 9))
    sampler = Sampler(2, VOCAB, device=device)
    sampler.lease([seq])
    generator = torch.Generator().manual_seed(3)
    outputs: list[int] = []
    for position in range(30):
        logits = torch.randn(1, VOCAB, generator=generator) * 0.5
        expected = logits[0].tolist()
        for token in range(VOCAB):
            if token in (2, 9) or token in outputs:
                expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
            count = outputs.count(token)
            expected[token] -= 0.3 * count + 0.7 * (count > 0)
        token = sample(sampler, [seq], logits, position)[0]
        assert token == max(range(VOCAB), key=expected.__getitem__)
        outputs.append(token)
    assert len(set(outputs)) > 10, "the penalties did not spread the tokens"


def test_a_lease_clears_the_last_tenant(device: torch.device) -> None:
    sampler = Sampler(2, VOCAB, device=device)
    greedy_logits = torch.zeros(1, VOCAB)
    greedy_logits[0, 7] = 1.0
    first = make_sequence(
        SamplingParams(
            temperature=0.0,
            logit_bias={7: -50.0, 8: 50.0},
            frequency_penalty=2.0,
            repetition_penalty=2.0,
            stop_token_ids=(7, 8),
        ),
        slot=1,
        prompt=(7,),
    )
    sampler.lease([first])
    assert sample(sampler, [first], greedy_logits) == [8]
    assert bool(sampler.done_S[1]), "a stop token ends the row on the device"
    second = make_sequence(
        SamplingParams(temperature=0.0, logit_bias={3: 0.1}, frequency_penalty=0.01, repetition_penalty=1.01), slot=1
    )
    sampler.lease([second])
    assert not bool(sampler.done_S[1])
    assert sample(sampler, [second], greedy_logits) == [7]
    assert not bool(sampler.done_S[1])


def test_one_tenants_bias_is_not_the_next_ones(device: torch.device) -> None:
    """Also when a row beside it has a bias, so that the step looks at biases at all."""
    sampler = Sampler(3, VOCAB, device=device)
    sampler.lease([make_sequence(SamplingParams(temperature=0.0, logit_bias={7: 100.0}), slot=1)])
    plain = make_sequence(SamplingParams(temperature=0.0), slot=1)
    biased = make_sequence(SamplingParams(temperature=0.0, logit_bias={9: 100.0}), slot=2)
    sampler.lease([plain])
    sampler.lease([biased])
    logits = torch.zeros(2, VOCAB)
    logits[:, 3] = 1.0
    assert sample(sampler, [plain, biased], logits) == [3, 9]


@pytest.mark.parametrize("logit", [-torch.inf, torch.inf])
def test_nothing_to_choose_from_is_reported(logit: float, device: torch.device) -> None:
    seq = make_sequence(SamplingParams(temperature=1.0, top_p=0.9), slot=1)
    sampler = Sampler(2, VOCAB, device=device)
    sampler.lease([seq])
    assert sample(sampler, [seq], torch.full((1, VOCAB), logit)) == [-1]


def test_min_tokens_bans_stop_tokens_only_until_then(device: torch.device) -> None:
    seq = make_sequence(SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(7,)), slot=1)
    sampler = Sampler(2, VOCAB, device=device)
    sampler.lease([seq])
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 9] = 2.0, 1.0
    assert [sample(sampler, [seq], logits, position)[0] for position in range(3)] == [9, 9, 7]


def test_logprobs_are_of_the_unmodified_logits(device: torch.device) -> None:
    seq = make_sequence(SamplingParams(temperature=0.0, logit_bias={4: 100.0}, logprobs=3), slot=1)
    sampler = Sampler(2, VOCAB, device=device)
    sampler.lease([seq])
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    reference = logits.double().log_softmax(-1)[0]
    _, plan = plan_for([seq])
    sampled = sampler.sample(
        logits.to(device, copy=True), torch.tensor([1], device=device), torch.tensor([0], device=device), plan
    )
    assert sampled.tokens_R.tolist() == [4]
    assert sampled.logprobs_R is not None and sampled.top_ids_RK is not None and sampled.top_logprobs_RK is not None
    assert abs(float(sampled.logprobs_R[0]) - float(reference[4])) < 1e-5
    top = reference.topk(3)
    assert sampled.top_ids_RK[0].tolist() == top.indices.tolist()
    assert torch.allclose(sampled.top_logprobs_RK[0].double().cpu(), top.values, atol=1e-5)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), *CASES])
def test_not_a_number_is_reported_and_stays_in_its_row(params: SamplingParams, device: torch.device) -> None:
    sequences = [make_sequence(params, slot=1, seed=5), make_sequence(params, slot=2, seed=6)]
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(5))
    healthy = Sampler(3, VOCAB, device=device)
    healthy.lease(sequences)
    expected = sample(healthy, sequences, logits)[1]
    logits[0, 3] = torch.nan
    sampler = Sampler(3, VOCAB, device=device)
    sampler.lease(sequences)
    assert sample(sampler, sequences, logits) == [-1, expected]


def test_extreme_logits_and_temperatures_stay_finite(device: torch.device) -> None:
    sampler = Sampler(2, VOCAB, device=device)
    for temperature, scale in ((1e-4, 3e38), (1e-3, 1e30), (100.0, 1e-30)):
        seq = make_sequence(SamplingParams(temperature=temperature, top_p=0.9), slot=1)
        sampler.lease([seq])
        logits = torch.zeros(1, VOCAB)
        logits[0, 11] = scale
        token = sample(sampler, [seq], logits)[0]
        assert token == 11 if scale > 1 else 0 <= token < VOCAB


def test_uniform_numbers_look_uniform_and_do_not_repeat() -> None:
    seeds = torch.arange(300).repeat_interleave(300)
    numbers = uniform(seeds, torch.arange(300).repeat(300))
    assert len(set(numbers.tolist())) > 300 * 300 - 5
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    histogram = torch.histc(numbers.float(), bins=100, min=0, max=1)
    chi_square = float(((histogram - 900) ** 2 / 900).sum())
    assert 50 < chi_square < 160
    grid = numbers.view(300, 300)
    correlation = torch.corrcoef(torch.stack((grid[:-1].flatten(), grid[1:].flatten())))[0, 1]
    assert abs(float(correlation)) < 0.02
