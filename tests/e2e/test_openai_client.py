"""The shipped model through the `openai` client, over a real socket."""

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from server.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[2]
MODEL = "classics-11m"
PROMPT = "The old man looked at the sea and"
VOCAB = 8192


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ROOT / "server" / "assets" / MODEL)


def metrics(base_url: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{base_url}/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def wait_idle(base_url: str) -> dict[str, float]:
    deadline = time.monotonic() + 20
    while True:
        values = metrics(base_url)
        if not any(values[f"gale_{name}"] for name in ("slots_used", "requests_running", "requests_waiting")):
            return values
        assert time.monotonic() < deadline, values
        time.sleep(0.05)


def test_greedy_text_is_the_models(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    expected = load_file(ROOT / "tests" / "fixtures" / MODEL / "expected.safetensors")
    greedy = expected["greedy_ids"].tolist()
    # From the first near tie on, rounding decides.
    certain = next((i for i, gap in enumerate(expected["greedy_margin"].tolist()) if gap <= 0.01), len(greedy))
    assert certain > 8
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=certain, extra_body={"return_token_ids": True}
    )
    (choice,) = answer.choices
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == greedy[:certain]
    assert choice.model_extra["prompt_token_ids"] == tokenizer.encode(PROMPT)
    table = tokenizer.token_bytes()
    assert choice.text == b"".join(table[token] for token in greedy[:certain]).decode()
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == certain
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + certain


def test_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": [PROMPT, "It was a"], "max_tokens": 40, "seed": 5, "n": 2}
    whole = client.completions.create(**fields)
    texts = [""] * 4
    reasons: dict[int, str] = {}
    usage = None
    for chunk in client.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        assert usage is None, "usage comes last"
        usage = chunk.usage
        for piece in chunk.choices:
            texts[piece.index] += piece.text
            if piece.finish_reason:
                reasons[piece.index] = piece.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None and whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens
    # The prompts are known from the first time.
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens


def test_every_form_of_prompt_is_the_same_prompt(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    forms: list[Any] = [PROMPT, [PROMPT], ids, [ids]]
    answers = [
        client.completions.create(model=MODEL, prompt=form, temperature=0, max_tokens=8).choices[0].text
        for form in forms
    ]
    assert len(set(answers)) == 1
    several = client.completions.create(model=MODEL, prompt=[PROMPT, "Once"], temperature=0, max_tokens=8)
    assert several.choices[0].text == answers[0]
    assert several.choices[1].text != answers[0]


def test_n_gives_different_choices_and_seeds_repeat_them(client: openai.OpenAI) -> None:
    def ask(seed: int | None) -> list[str]:
        answer = client.completions.create(model=MODEL, prompt=PROMPT, n=3, max_tokens=20, temperature=1, seed=seed)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = ask(1)
    assert len(set(first)) == 3
    assert ask(1) == first
    assert ask(2) != first
    assert ask(None) != ask(None)
    assert ask(-(2**63)) == ask(-(2**63))


def test_max_tokens_defaults_to_sixteen(client: openai.OpenAI) -> None:
    for max_tokens in (openai.omit, None):
        answer = client.completions.create(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=max_tokens, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16


def test_stop_strings(client: openai.OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=40).choices[0].text
    stop = text[20:25]
    expected = text[: text.index(stop)]
    for streamed in (False, True):
        answer = client.completions.create(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=40, stop=[stop, "never"], stream=streamed
        )
        choices = [chunk.choices[0] for chunk in answer] if streamed else [answer.choices[0]]  # type: ignore[union-attr]
        assert "".join(choice.text for choice in choices) == expected
        assert choices[-1].finish_reason == "stop"
        assert choices[-1].model_extra == {"stop_reason": stop}


def test_stop_token_ids_and_minimum(client: openai.OpenAI) -> None:
    def ask(**extra: Any) -> tuple[list[int], str]:
        answer = client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            temperature=0,
            max_tokens=20,
            extra_body={"return_token_ids": True, "ignore_eos": True, **extra},
        )
        assert answer.choices[0].model_extra is not None
        return answer.choices[0].model_extra["token_ids"], answer.choices[0].finish_reason

    ids, _ = ask()
    stopped, reason = ask(stop_token_ids=[ids[5]])
    assert (stopped, reason) == (ids[: ids.index(ids[5]) + 1], "stop")
    longer, _ = ask(stop_token_ids=[ids[5]], min_tokens=12)
    assert len(longer) >= 12


def test_logprobs(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "logprobs": 3}
    (choice,) = client.completions.create(**fields).choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == choice.text
    assert len(logprobs.tokens) == 12
    for token, logprob, top, offset in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset, strict=True
    ):
        assert logprob <= 0
        assert len(top) == 3
        assert top[token] == logprob == max(top.values()), "greedy takes the most likely"
        assert choice.text[offset:].startswith(token)
    pieces = [chunk.choices[0].logprobs for chunk in client.completions.create(**fields, stream=True)]
    assert [token for piece in pieces if piece for token in piece.tokens or ()] == logprobs.tokens
    assert [offset for piece in pieces if piece for offset in piece.text_offset or ()] == logprobs.text_offset


def test_echo(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    plain = client.completions.create(**fields).choices[0].text
    assert client.completions.create(**fields, echo=True).choices[0].text == PROMPT + plain
    streamed = client.completions.create(**fields, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPT + plain


def test_logit_bias_bans_and_forces(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode(" sea", add_special_tokens=False)[-1:]
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={str(token): 100}
    )
    assert answer.choices[0].text == tokenizer.token_bytes()[token].decode() * 4


def test_penalties_change_the_text(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> str:
        fields |= {"model": MODEL, "prompt": "no no no no", "max_tokens": 30, "temperature": 0}
        return str(client.completions.create(**fields).choices[0].text)

    plain = ask()
    assert ask(frequency_penalty=2) != plain
    assert ask(presence_penalty=2) != plain
    assert ask(extra_body={"repetition_penalty": 2.0}) != plain


def test_sampling_filters_of_one_token_are_greedy(client: openai.OpenAI) -> None:
    def ask(temperature: float, **extra: Any) -> str:
        answer = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=12, temperature=temperature, extra_body=extra
        )
        return answer.choices[0].text

    greedy = ask(0)
    assert ask(1, top_k=1) == greedy
    assert ask(1, min_p=1.0) == greedy
    assert ask(1, top_p=1e-6) == greedy


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [VOCAB]}, "prompt"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
        ({"suffix": "x"}, "suffix"),
        ({"extra_body": {"unknown_field": 1}}, "unknown_field"),
    ],
)
def test_bad_requests(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": MODEL, "prompt": "a", **fields})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "gale")
    assert client.models.retrieve(MODEL) == model
    weights = load_file(ROOT / "server" / "assets" / MODEL / "model.safetensors")
    told = model.model_extra or {}
    assert told["num_parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert (told["vocab_size"], told["dtype"], told["state_dtype"]) == (VOCAB, "float32", "float32")
    assert told["state_bytes"] == 10 * 2 * 64 * 128 * 4, "layers, heads, keys, values, bytes"
    assert told["fingerprint"] == client.completions.create(model=MODEL, prompt="a", max_tokens=1).system_fingerprint


def test_async_client(base_url: str) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0) as client:
            fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
            whole = await client.completions.create(**fields)
            stream = await client.completions.create(**fields, stream=True)
            text = "".join([chunk.choices[0].text async for chunk in stream])
            assert text == whole.choices[0].text
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(**{**fields, "top_p": 2})

    asyncio.run(ask())


def test_many_streams_and_clients_that_leave(base_url: str) -> None:
    """64 streams at once, half of which are left at a random chunk; afterwards no slot is held."""
    rng = random.Random(0)
    before = wait_idle(base_url)
    plans = [(rng.randrange(4, 60), rng.randrange(1, 20) if rng.random() < 0.5 else None) for _ in range(64)]

    async def one(client: openai.AsyncOpenAI, number: int, length: int, leave_at: int | None) -> int:
        stream = await client.completions.create(
            model=MODEL,
            prompt="It was " * (number + 1),
            max_tokens=length,
            temperature=1,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async with stream:
            chunks, usage = 0, None
            async for chunk in stream:
                chunks += 1
                usage = chunk.usage
                if chunks == leave_at:
                    return 0
            assert usage is not None
            assert usage.completion_tokens == length
            return length

    async def all_at_once() -> int:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0) as client:
            return sum(await asyncio.gather(*(one(client, i, *plan) for i, plan in enumerate(plans))))

    finished = asyncio.run(all_at_once())
    after = wait_idle(base_url)
    generated = after["gale_generated_tokens_total"] - before["gale_generated_tokens_total"]
    assert finished <= generated <= sum(length for length, _ in plans)
    assert httpx.get(f"{base_url}/health").status_code == 200


def test_a_continuation_is_scored_as_it_was_sampled(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """As evaluation harnesses do it: context and continuation as token ids, echoed with log-probabilities."""
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, seed=7, max_tokens=20, logprobs=2, extra_body={"return_token_ids": True}
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.model_extra is not None
    ids = choice.model_extra["prompt_token_ids"] + choice.model_extra["token_ids"]
    for max_tokens in (0, 1):
        scored = client.completions.create(
            model=MODEL, prompt=[ids, ids[:5]], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
        )
        whole, short = (entry.logprobs for entry in scored.choices)
        assert whole is not None and whole.token_logprobs is not None and whole.top_logprobs is not None
        assert len(whole.token_logprobs) == len(ids) + max_tokens
        assert whole.token_logprobs[0] is None and whole.top_logprobs[0] is None
        end = len(ids)
        assert whole.token_logprobs[end - 20 : end] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-3)
        assert scored.choices[0].text.startswith(tokenizer.decode(ids))
        # Greedy continuations are found by comparing a token's log-probability with the largest.
        greedy = [
            logprob == max(top.values())
            for logprob, top in zip(whole.token_logprobs[1:end], whole.top_logprobs[1:end], strict=True)
        ]
        assert any(greedy) and not all(greedy)
        assert short is not None and short.token_logprobs is not None
        assert short.token_logprobs[1:5] == pytest.approx(whole.token_logprobs[1:5], abs=1e-3)
        assert scored.usage is not None and scored.usage.completion_tokens == 2 * max_tokens


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=1, n=2, extra_body={"prompt_logprobs": 3, "return_token_ids": True}
    )
    for choice in answer.choices:
        assert choice.model_extra is not None
        first, *rest = choice.model_extra["prompt_logprobs"]
        assert first is None
        for token_id, entry in zip(choice.model_extra["prompt_token_ids"][1:], rest, strict=True):
            ranks = {int(other): found["rank"] for other, found in entry.items()}
            assert sorted(set(ranks.values()) | {1, 2, 3}) == sorted(ranks.values())
            assert len(entry) == (3 if ranks[token_id] <= 3 else 4)
            assert all(found["decoded_token"] for found in entry.values())


def test_best_of_is_the_likeliest(base_url: str, client: openai.OpenAI) -> None:
    """And the prompt is absorbed once for all candidates."""
    prompt = f"Of six answers, two: {PROMPT}"  # nobody else begins like this
    fields: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 10, "seed": 3, "logprobs": 0}
    before = wait_idle(base_url)["gale_prompt_tokens_total"]
    everyone = client.completions.create(**fields, n=6)
    assert everyone.usage is not None
    assert wait_idle(base_url)["gale_prompt_tokens_total"] - before == everyone.usage.prompt_tokens

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(everyone.choices, key=mean, reverse=True)
    best = client.completions.create(**fields, n=2, best_of=6)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage is not None
    assert best.usage.total_tokens == everyone.usage.total_tokens
