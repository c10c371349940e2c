"""Log-probabilities of prompts: the oracle's, however a prompt is absorbed, and in constant memory."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from server.engine import scoring
from server.engine.engine import Engine
from server.engine.model import Hidden
from server.types import FinishReason
from tests.engine.driving import FIXTURES, Driver, engine_config, random_prompt
from tests.engine.oracle import oracle_logits

VOCAB = 512
TOP = 5
PROMPTS = [random_prompt(length, VOCAB, length) for length in (1, 2, 63, 64, 65, 200)]
ALL_MODES = pytest.mark.parametrize(
    "mode",
    [
        pytest.param(("cpu", False), id="cpu-in-step"),
        pytest.param(("cpu", True), id="cpu-overlapped"),
        pytest.param(("cuda", True), id="cuda", marks=pytest.mark.gpu),
    ],
)


def make_driver(mode: tuple[str, bool], **changes: object) -> Driver:
    device, overlap = mode
    return Driver(Engine(engine_config(FIXTURES / "base", device=device, **changes), overlap=overlap))


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """Log-probabilities of every prompt's every position, float64 [T, V]."""
    config = json.loads((FIXTURES / "base" / "config.json").read_text())
    tensors = load_file(FIXTURES / "base" / "model.safetensors")
    return [oracle_logits(config, tensors, prompt).log_softmax(-1) for prompt in PROMPTS]


def check(driver: Driver, key: tuple[int, int], index: int, expected: list[torch.Tensor], num_top: int) -> None:
    prompt, wanted = PROMPTS[index], expected[index]
    if len(prompt) == 1:
        assert key not in driver.prompts
        return
    scores = driver.prompts[key]
    chosen = wanted[range(len(prompt) - 1), prompt[1:]]
    assert len(scores.logprobs) == len(scores.ranks) == len(prompt) - 1
    torch.testing.assert_close(torch.tensor(scores.logprobs).double(), chosen, atol=1e-4, rtol=0)
    for position, rank in enumerate(scores.ranks):
        most = int((wanted[position] >= chosen[position] - 1e-4).sum())
        least = int((wanted[position] >= chosen[position] + 1e-4).sum())
        assert max(least, 1) <= rank <= most
    top = torch.tensor(scores.top).double().view(len(prompt) - 1, num_top)
    torch.testing.assert_close(top, wanted[:-1].topk(num_top).values if num_top else top, atol=1e-4, rtol=0)
    top_ids = torch.tensor(scores.top_ids).long().view(len(prompt) - 1, num_top)
    torch.testing.assert_close(wanted[:-1].gather(1, top_ids), top, atol=1e-4, rtol=0)


@ALL_MODES
@pytest.mark.parametrize("budget", [64, 150, 4096])
def test_prompts_are_scored_in_any_company(budget: int, mode: tuple[str, bool], expected: list[torch.Tensor]) -> None:
    """Whole or in pieces, beside others that want more, less or nothing, with and without answers, once for all."""
    driver = make_driver(mode, max_num_seqs=3, max_num_batched_tokens=budget)
    rng = random.Random(budget)
    requests: dict[int, tuple[int, int, int, int]] = {}
    before = 0
    for index in rng.sample(range(len(PROMPTS)), len(PROMPTS)):
        num_top, max_tokens, n = rng.choice([0, 1, TOP]), rng.choice([0, 1, 4]), rng.choice([1, 3])
        driver.submit([random_prompt(50, VOCAB, 99)], temperature=0.0, max_tokens=10, logprobs=1, ignore_eos=True)
        request = driver.submit(
            [PROMPTS[index]],
            n=n,
            temperature=0.0,
            max_tokens=max_tokens,
            prompt_logprobs=num_top,
            ignore_eos=True,
        )
        requests[request] = index, num_top, max_tokens, n
        before += 50 + len(PROMPTS[index])
        driver.step()
    driver.run()
    assert driver.engine.stats().prompt_tokens == before
    assert {key[0] for key in driver.prompts} == {
        request for request, (index, *_) in requests.items() if len(PROMPTS[index]) > 1
    }
    for request, (index, num_top, max_tokens, n) in requests.items():
        check(driver, (request, 0), index, expected, num_top)
        for choice in range(n):
            answer = driver.answers[request, choice]
            assert answer.finish_reason is FinishReason.LENGTH
            assert len(answer.token_ids) == max_tokens
            if max_tokens:
                assert answer.token_ids[0] == int(expected[index][-1].argmax())


@ALL_MODES
def test_several_prompts_of_one_request(mode: tuple[str, bool], expected: list[torch.Tensor]) -> None:
    driver = make_driver(mode)
    request = driver.submit(PROMPTS, n=2, max_tokens=0, prompt_logprobs=TOP)
    driver.run()
    for index in range(len(PROMPTS)):
        check(driver, (request, 2 * index), index, expected, TOP)
    assert set(driver.answers) == {(request, choice) for choice in range(2 * len(PROMPTS))}
    stats = driver.engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (sum(map(len, PROMPTS)), 0)
    assert (stats.running, stats.waiting, stats.slots_used) == (0, 0, 0)


@ALL_MODES
def test_a_prompt_is_scored_before_its_first_answer(mode: tuple[str, bool]) -> None:
    driver = make_driver(mode, max_num_seqs=1, max_num_batched_tokens=64)
    request = driver.submit([PROMPTS[-1]], n=2, max_tokens=3, prompt_logprobs=0)
    while not driver.answers:
        driver.step()
    assert len(driver.prompts[request, 0].logprobs) == len(PROMPTS[-1]) - 1
    driver.run()


def test_a_long_prompt_is_scored_in_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver(("cpu", True), max_num_batched_tokens=1024)
    rows: list[int] = []
    logits = driver.engine._runner._step.model.logits

    def counted(hidden: Hidden, rows_R: torch.Tensor, **rest: object) -> torch.Tensor:
        rows.append(len(rows_R))
        return logits(hidden, rows_R, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(driver.engine._runner._step.model, "logits", counted)
    request = driver.submit([random_prompt(5000, VOCAB, 1)], max_tokens=1, prompt_logprobs=1)
    driver.run()
    assert len(driver.prompts[request, 0].logprobs) == 4999
    assert max(rows) == scoring.SCORED_ROWS
    assert sum(rows) == 5000


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prompt_without_numbers_is_an_error(overlap: bool) -> None:
    driver = make_driver(("cpu", overlap), max_num_batched_tokens=64)
    driver.engine._runner._step.model.norm.fill_(torch.nan)
    for max_tokens in (0, 2):
        request = driver.submit([PROMPTS[-1]], n=2, max_tokens=max_tokens, prompt_logprobs=1)
        driver.run()
        for choice in range(2):
            answer = driver.answers[request, choice]
            assert answer.finish_reason is FinishReason.ERROR
            assert answer.error is not None and "not finite" in answer.error
    assert driver.engine.stats().slots_used == 0


def test_only_the_prompt_is_absorbed_without_anything_asked_for() -> None:
    driver = make_driver(("cpu", True))
    request = driver.submit([PROMPTS[2], PROMPTS[3]], n=2, max_tokens=0)
    cancelled = driver.submit([PROMPTS[2]], n=2, max_tokens=0)
    driver.cancel(cancelled)
    driver.run()
    assert [driver.answers[request, choice].finish_reason for choice in range(4)] == [FinishReason.LENGTH] * 4
    assert [driver.answers[cancelled, choice].finish_reason for choice in range(2)] == [FinishReason.CANCELLED] * 2
    assert driver.engine.stats().prompt_tokens == len(PROMPTS[2]) + len(PROMPTS[3])
