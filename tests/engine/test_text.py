"""From sampled tokens to text: streamed, whole, and as the tokenizer decodes it, with stop strings anywhere."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.deltas import ChoiceReader, join_events
from server.api.mailbox import ChoiceEvent
from server.tokenizer import Tokenizer
from server.types import FinishReason
from tests.engine.driving import EOS, Answer, Driver

PROMPT = "née 世界: "
LENGTH = 24


def events(answer: Answer) -> list[ChoiceEvent]:
    """The answer as the API process gets it, one event per step."""
    tokens = [[token] for token in answer.token_ids] + [[]] * (len(answer.pieces) - len(answer.token_ids))
    last = len(answer.pieces) - 1
    return [
        ChoiceEvent(
            choice=0,
            token_ids=ids,
            text=piece,
            logprobs=[],
            finish_reason=answer.finish_reason if step == last else FinishReason.RUNNING,
            stop_reason=None,
        )
        for step, (ids, piece) in enumerate(zip(tokens, answer.pieces, strict=True))
    ]


def streamed(answer: Answer) -> str:
    reader = ChoiceReader(0, None)
    return "".join(reader.read(event).text for event in events(answer))


def whole(answer: Answer) -> str:
    return ChoiceReader(0, None).read(join_events(events(answer))).text


def decoded(tokenizer: Tokenizer, token_ids: list[int], *, special: bool) -> bytes:
    """The bytes that the ids add to a text: those of prompt and ids without those of the prompt."""
    table = [*tokenizer.token_bytes(special=special), *[b""] * 512]
    return b"".join(table[token] for token in token_ids)


def generate(driver: Driver, tokenizer: Tokenizer, **fields: Any) -> Answer:
    fields = {"temperature": 1.3, "max_tokens": LENGTH, "logit_bias": {1: 4.0, EOS: 3.0}, **fields}
    return driver.complete(tokenizer.encode(PROMPT, add_special_tokens=False), **fields)


@given(seed=st.integers(0, 2**32), skip=st.booleans(), include=st.booleans(), chooser=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streamed_whole_and_decoded_text_are_one(
    driver: Driver, tokenizer: Tokenizer, seed: int, skip: bool, include: bool, chooser: random.Random
) -> None:
    fields = {"seed": seed, "skip_special_tokens": skip, "include_stop_str_in_output": include, "ignore_eos": True}
    free = generate(driver, tokenizer, **fields)
    assert len(free.token_ids) == LENGTH
    data = decoded(tokenizer, free.token_ids, special=not skip)
    text = data.decode(errors="replace")
    assert streamed(free) == whole(free) == text
    if skip:
        prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
        assert tokenizer.decode(prompt + free.token_ids) == tokenizer.decode(prompt) + text
    # Stop strings out of the text itself, so that they begin and end anywhere, inside tokens and across them.
    stops = []
    for _ in range(3):
        start = chooser.randrange(max(1, len(text)))
        stop = text[start : start + chooser.randrange(1, 5)]
        if stop and "\ufffd" not in stop:
            stops.append(stop)
    stopped = generate(driver, tokenizer, **fields, stop=tuple(stops))
    count, shown = LENGTH, data
    for length in range(1, LENGTH + 1):
        so_far = decoded(tokenizer, free.token_ids[:length], special=not skip)
        found = [(so_far.find(stop.encode()), stop) for stop in stops if stop.encode() in so_far]
        if found:
            start, stop = min(found, key=lambda hit: hit[0])
            count, shown = length, so_far[: start + len(stop.encode())] if include else so_far[:start]
            assert stopped.finish_reason is FinishReason.STOP
            break
    assert stopped.token_ids == free.token_ids[:count]
    assert streamed(stopped) == whole(stopped) == shown.decode(errors="replace")


@pytest.mark.parametrize("skip", [True, False])
def test_the_stopping_token_is_written_where_asked_for(driver: Driver, tokenizer: Tokenizer, skip: bool) -> None:
    fields = {"seed": 1, "skip_special_tokens": skip, "logit_bias": {EOS: 100.0}, "min_tokens": 3}
    ended = generate(driver, tokenizer, **fields)
    assert ended.token_ids[-1] == EOS
    text = decoded(tokenizer, ended.token_ids[:-1], special=not skip)
    assert ended.text == text
    included = generate(driver, tokenizer, **fields, include_stop_str_in_output=True)
    assert included.text == text + (b"" if skip else b"</s>")
    token = ended.token_ids[1]
    fields = {"seed": 1, "stop_token_ids": (token,), "min_tokens": 1, "logit_bias": {token: 100.0}}
    stopped = generate(driver, tokenizer, **fields)
    assert stopped.text == decoded(tokenizer, stopped.token_ids[:-1], special=False)
    included = generate(driver, tokenizer, **fields, include_stop_str_in_output=True)
    assert included.text == decoded(tokenizer, included.token_ids, special=False)
