"""256 requests with 256 different sets of parameters in one batch: each gives what it gives alone."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from server import grammar
from tests.engine.driving import EOS, Answer, Driver, random_prompt
from tests.engine.test_engine import IN_STEP, Mode, settle

NUM_REQUESTS = 256
VOCAB = 512

GRAMMARS = [
    grammar.from_regex("[a-z]{2,12}[.!]"),
    grammar.from_regex("[^x]*"),
    grammar.from_choices(["one", "two", "three", "世界"]),
    grammar.from_json_schema({"type": "array", "items": {"type": "boolean"}, "minItems": 1}),
    grammar.from_json_schema({"type": "object"}, any_whitespace=False),
]


def parameters(index: int) -> dict[str, Any]:
    """A random set of parameters, different for every index."""
    rng = random.Random(index)

    def token() -> int:
        return rng.randrange(3, VOCAB)

    fields: dict[str, Callable[[], object]] = {
        "temperature": lambda: rng.choice([0.0, 0.3, 1.0, 1.7]),
        "top_p": lambda: rng.uniform(0.3, 1),
        "top_k": lambda: rng.randrange(1, 60),
        "min_p": lambda: rng.uniform(0, 0.2),
        "presence_penalty": lambda: rng.uniform(-2, 2),
        "frequency_penalty": lambda: rng.uniform(-2, 2),
        "repetition_penalty": lambda: rng.uniform(0.5, 2),
        "logit_bias": lambda: {token(): rng.uniform(-9, 9) for _ in range(5)} | {EOS: rng.uniform(-3, 6)},
        "allowed_token_ids": lambda: (EOS, *{token() for _ in range(100)}),
        "bad_words": lambda: tuple(tuple(token() for _ in range(rng.randrange(1, 4))) for _ in range(20)),
        "grammar": lambda: rng.choice(GRAMMARS),
        "min_tokens": lambda: rng.randrange(0, 4),
        "stop": lambda: tuple(rng.choice("aeiou,. ") for _ in range(2)),
        "stop_token_ids": lambda: tuple(token() for _ in range(30)),
        "include_stop_str_in_output": lambda: True,
        "skip_special_tokens": lambda: False,
        "ignore_eos": lambda: True,
        "logprobs": lambda: rng.randrange(0, 5),
    }
    chosen = {name: fields[name]() for name in rng.sample(list(fields), rng.randrange(1, 9))}
    if "grammar" in chosen:
        chosen.pop("ignore_eos", None)
    return {"temperature": 1.0, "seed": index, "max_tokens": rng.randrange(4, 10), **chosen}


def prompt(index: int) -> list[int]:
    return random_prompt(1 + index % 70, 400, index)


@pytest.fixture(scope="module")
def sets() -> list[dict[str, Any]]:
    sets = [parameters(index) for index in range(NUM_REQUESTS)]
    assert len({repr(sorted(one.items())) for one in sets}) == NUM_REQUESTS
    return sets


def same(ours: Answer, alone: Answer, fields: dict[str, Any]) -> None:
    assert (ours.token_ids, ours.text) == (alone.token_ids, alone.text), fields
    assert (ours.finish_reason, ours.stop_reason, ours.error) == (alone.finish_reason, alone.stop_reason, alone.error)
    for one, other in zip(ours.logprobs, alone.logprobs, strict=True):
        assert abs(one.sampled - other.sampled) < 1e-3
        assert len(one.top_ids) == len(other.top_ids) == fields["logprobs"]


@pytest.mark.parametrize(
    "mode", [pytest.param(IN_STEP, id="cpu"), pytest.param(("cuda", True), id="cuda", marks=pytest.mark.gpu)]
)
def test_256_sets_of_parameters_in_one_batch(
    mode: Mode, make: Callable[..., Driver], sets: list[dict[str, Any]]
) -> None:
    size = {"max_num_seqs": NUM_REQUESTS, "max_num_batched_tokens": 100 * NUM_REQUESTS}
    driver = make(mode, **size)
    alone = [driver.complete(prompt(index), **fields) for index, fields in enumerate(sets)]
    assert len({answer.finish_reason for answer in alone}) == 3, "stop, length and abort were meant to happen"
    together = [IN_STEP, ("cpu", True)] if mode == IN_STEP else [mode]
    for one in together:
        driver = make(one, **size)
        # One step takes all the prompts: no graph does, and so many at a time as those do, the first answers would end.
        driver.engine.scheduler._budget._limits = ()
        requests = [driver.submit([prompt(index)], **fields) for index, fields in enumerate(sets)]
        most = 0
        for _ in range(NUM_REQUESTS):
            driver.step()
            most = max(most, driver.engine.stats().running)
        assert most > NUM_REQUESTS - 9, "too few of them run at once"
        settle(driver)
        for index, request in enumerate(requests):
            same(driver.answers[request, 0], alone[index], sets[index])
