"""Chat completions of the shipped model, with a template of the tests', through the `openai` client."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

MODEL = "classics-11m"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "It was a dark night."},
    {"role": "user", "content": [{"type": "text", "text": "Where have you been?"}]},
]
RENDERED = '<s>It was a dark night.\n"Where have you been?" she said.\n"'
GREEDY: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 24}
FINISHED: dict[str, Any] = {**GREEDY, "max_completion_tokens": 200, "stop": ['"']}
"""An answer that ends by itself: the client's helpers refuse others."""


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def tokenize(base_url: str, **fields: Any) -> list[int]:
    answer = httpx.post(f"{base_url}/tokenize", json={"messages": MESSAGES, **fields})
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["tokens"]
    return tokens


def test_an_answer_is_the_completion_of_the_rendered_prompt(client: openai.OpenAI, base_url: str) -> None:
    ids = tokenize(base_url)
    assert ids.count(1) == 1, "the template's BOS, and no second one"
    text = httpx.post(f"{base_url}/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text == RENDERED.removeprefix("<s>")
    plain = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=24)
    answer = client.chat.completions.create(**GREEDY)
    (choice,) = answer.choices
    assert choice.message.content == plain.choices[0].text
    assert (choice.message.role, choice.finish_reason) == ("assistant", plain.choices[0].finish_reason)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint == plain.system_fingerprint
    assert answer.usage is not None and plain.usage is not None
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == plain.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == len(ids), "the same prompt a second time"


def test_streams(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "seed": 3, "n": 2, "max_completion_tokens": 30}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    texts = ["", ""]
    roles: list[list[str | None]] = [[], []]
    reasons: dict[int, str] = {}
    for chunk in chunks[:-1]:
        (piece,) = chunk.choices
        assert chunk.object == "chat.completion.chunk"
        texts[piece.index] += piece.delta.content or ""
        roles[piece.index].append(piece.delta.role)
        if piece.finish_reason is not None:
            reasons[piece.index] = piece.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert all(own[0] == "assistant" and not any(own[1:]) for own in roles)


def test_the_clients_own_accumulation_of_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**FINISHED, logprobs=True, top_logprobs=2)
    with client.chat.completions.stream(**FINISHED, logprobs=True, top_logprobs=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.choices[0].logprobs is not None
    assert whole.choices[0].logprobs is not None
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content


def test_logprobs(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3).choices
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert b"".join(bytes(entry.bytes or ()) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        best = entry.top_logprobs[0]
        assert (best.token, best.logprob, best.bytes) == (entry.token, entry.logprob, entry.bytes), "greedy"
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6


def test_continue_the_final_message(client: openai.OpenAI, base_url: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "I have been "}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    ids = tokenize(base_url, messages=messages, **extra)
    assert httpx.post(f"{base_url}/detokenize", json={"tokens": ids}).json()["prompt"].endswith('"I have been ')
    plain = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=8).choices[0].text
    fields: dict[str, Any] = {**GREEDY, "messages": messages, "max_completion_tokens": 8}
    answer = client.chat.completions.create(**fields, extra_body=extra)
    assert answer.choices[0].message.content == plain
    echoed = client.chat.completions.create(**fields, extra_body={**extra, "echo": True})
    assert echoed.choices[0].message.content == "I have been " + plain


# A model that knows no JSON goes on with white space, which JSON allows, until that becomes unlikely.
STRUCTURED: dict[str, Any] = {
    "model": MODEL,
    "messages": MESSAGES,
    "max_tokens": 300,
    "temperature": 0,
    "frequency_penalty": 2,
}


class Sighting(BaseModel):
    """What the client asks for with `parse`."""

    animal: Literal["whale", "shark"]
    legs: int
    names: list[str]


def test_structured_answers(client: openai.OpenAI) -> None:
    schema = Sighting.model_json_schema()
    schema["properties"]["names"] |= {"maxItems": 2, "items": {"type": "string", "maxLength": 8}}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "sighting", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(**STRUCTURED, response_format=form)
    assert answer.choices[0].finish_reason == "stop"
    Sighting.model_validate_json(answer.choices[0].message.content or "")
    chosen = client.chat.completions.create(**STRUCTURED, extra_body={"structured_outputs": {"choice": ["aye", "nay"]}})
    assert chosen.choices[0].message.content in ("aye", "nay")


def test_the_clients_own_parsing(client: openai.OpenAI) -> None:
    class Vote(BaseModel):
        animal: Literal["whale", "shark"]
        sure: bool

    answer = client.chat.completions.parse(**STRUCTURED, response_format=Vote)
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Vote)
    with client.chat.completions.stream(**STRUCTURED, response_format=Vote) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_an_answer_may_go_into_the_next_request_as_it_came(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY)
    messages: list[Any] = [*MESSAGES, answer.choices[0].message, {"role": "user", "content": "And then?"}]
    following = client.chat.completions.create(**{**GREEDY, "messages": messages})
    assert following.usage is not None
    assert answer.usage is not None
    assert following.usage.prompt_tokens > answer.usage.total_tokens


def test_extra_fields(client: openai.OpenAI, base_url: str) -> None:
    extra: dict[str, Any] = {
        "chat_template_kwargs": {"opening": "Well, "},
        "return_token_ids": True,
        "ignore_eos": True,
        "min_tokens": 5,
        "repetition_penalty": 1.1,
        "top_k": 5,
        "request_id": "e2e-1",
    }
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5, extra_body=extra)
    assert answer.id == "chatcmpl-e2e-1"
    assert answer._request_id == "e2e-1"
    assert answer.model_extra is not None
    assert answer.model_extra["prompt_token_ids"] == tokenize(base_url, chat_template_kwargs={"opening": "Well, "})
    assert answer.choices[0].model_extra is not None
    assert len(answer.choices[0].model_extra["token_ids"]) == 5
    raw = client.chat.completions.with_raw_response.create(**GREEDY, extra_headers={"X-Request-Id": "mine"})
    assert (raw.headers["x-request-id"], raw.parse().id) == ("mine", "chatcmpl-mine")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"extra_body": {"chat_template": "x"}}, "chat_template"),
        ({"extra_body": {"chat_template_kwargs": {"closing": 1}}}, "chat_template_kwargs"),
        ({"extra_body": {"unknown_field": 1}}, "unknown_field"),
    ],
)
def test_bad_requests(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{**GREEDY, "stream": stream, **fields})
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
        assert param.rpartition(".")[2] in caught.value.message


def test_async_client(base_url: str) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0) as client:
            whole = await client.chat.completions.create(**GREEDY)
            stream = await client.chat.completions.create(**GREEDY, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == whole.choices[0].message.content
            whole = await client.chat.completions.create(**FINISHED)
            async with client.chat.completions.stream(**FINISHED) as events:
                final = await events.get_final_completion()
            assert final.choices[0].message.content == whole.choices[0].message.content
            with pytest.raises(openai.NotFoundError) as caught:
                await client.chat.completions.create(**{**GREEDY, "model": "gpt-5"})
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")

    asyncio.run(ask())


class Captain(BaseModel):
    """What the model is to answer with."""

    age: int
    aboard: bool
    rank: Literal["captain", "mate"]


def test_an_answer_is_parsed_into_the_clients_own_model(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 200, "temperature": 1}
    for seed in range(3):
        # Without it, a model that has read only books likes to go on with white space.
        answer = client.chat.completions.parse(
            **fields, seed=seed, response_format=Captain, logit_bias={str(token): -100 for token in white_space(client)}
        )
        (choice,) = answer.choices
        assert isinstance(choice.message.parsed, Captain)
        assert choice.finish_reason == "stop"


def white_space(client: openai.OpenAI) -> list[int]:
    base_url = str(client.base_url).removesuffix("/v1/")
    answer = httpx.post(f"{base_url}/tokenize", json={"prompt": "\n\t\r ", "add_special_tokens": False})
    tokens: list[int] = answer.json()["tokens"]
    return tokens


def test_a_choice_of_texts(client: openai.OpenAI) -> None:
    choices = ["At sea.", "At home.", "In the church."]
    answer = client.chat.completions.create(**GREEDY, n=2, extra_body={"structured_outputs": {"choice": choices}})
    assert {choice.message.content for choice in answer.choices} <= set(choices)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_dead_end_passes_the_client(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"regex": "ab"}, "allowed_token_ids": [100]}
    answer = client.chat.completions.create(**GREEDY, extra_body=extra)
    assert str(answer.choices[0].finish_reason) == "abort"
    *_, last = client.chat.completions.create(**GREEDY, stream=True, extra_body=extra)
    assert str(last.choices[0].finish_reason) == "abort"


def test_a_schema_that_cannot_be_enforced_is_the_clients_bad_request(client: openai.OpenAI) -> None:
    schema = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        client.chat.completions.create(
            **GREEDY, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        )
    assert refused.value.param == "response_format.json_schema.schema"


def test_a_conversation_that_is_sent_again_reads_only_what_is_new(client: openai.OpenAI) -> None:
    """Of every turn, the server reads the last answer's end, where texts may tokenize otherwise, and what follows."""
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "There was once a lighthouse keeper who spoke with ships."},
        {"role": "user", "content": "What do you tell them?"},
    ]
    known = 0
    for turn in range(4):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_completion_tokens=30, stop=['"']
        )
        usage = answer.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens
        assert cached is not None
        # At the least, the state that the last prompt left at its end, which closes with a quotation mark.
        assert cached >= known - 1
        assert cached > usage.prompt_tokens // 3 or not turn
        known = usage.prompt_tokens
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        messages.append({"role": "user", "content": f"And what do they answer, in the year {1800 + turn}?"})


def test_a_conversation_goes_on_from_its_state(client: openai.OpenAI, base_url: str) -> None:
    """The answers are those to the whole transcript, as token ids, and nothing but the new message is read."""
    ids = tokenize(base_url)
    asked: dict[str, Any] = {**FINISHED, "max_completion_tokens": 60}
    states = {"save_state": True, "return_token_ids": True}
    first = client.chat.completions.create(**asked, extra_body=states)
    (choice,) = first.choices
    state = first.model_extra["state"] if first.model_extra else {}
    kept = state["num_tokens"] - len(ids)
    answer: list[int] = choice.to_dict()["token_ids"]  # type: ignore[assignment]
    said = httpx.post(f"{base_url}/detokenize", json={"tokens": ids + answer[:kept]}).json()["prompt"]
    text = RENDERED.removeprefix("<s>") + (choice.message.content or "")
    assert text.startswith(said) and '"' not in said[len(RENDERED) - 3 :], "no part of the stop string was kept"
    body = {**asked, "messages": [{"role": "user", "content": "And then?"}]}
    more = client.chat.completions.create(**body, extra_body={"state": state["id"], "return_token_ids": True})
    new: list[int] = more.to_dict()["prompt_token_ids"]  # type: ignore[assignment]
    whole = client.completions.create(
        model=MODEL, prompt=ids + answer[:kept] + new, temperature=0, max_tokens=60, stop='"'
    )
    assert more.choices[0].message.content == whole.choices[0].text
    assert more.usage is not None and more.usage.prompt_tokens == len(ids) + kept + len(new)
    go_on = client.chat.completions.create(
        model=MODEL, messages=[], temperature=0, max_completion_tokens=5, extra_body={"state": state["id"]}
    )
    plain = client.completions.create(model=MODEL, prompt=ids + answer[:kept], temperature=0, max_tokens=5)
    assert go_on.choices[0].message.content == plain.choices[0].text


@pytest.mark.parametrize("headers", [{}, {"X-Session-Id": "talk:1"}], ids=["unnamed", "session"])
def test_a_conversation_that_is_sent_again_is_not_read_again(
    client: openai.OpenAI, headers: dict[str, str], base_url: str
) -> None:
    """What follows the answer is read; and the answer, where it comes back in other tokens."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": f"Where are you{'?' * len(headers)}"}]
    absorbed = None
    for turn in range(4):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=messages,
            seed=turn,
            max_completion_tokens=12,
            extra_headers=headers,
            extra_body={"return_token_ids": True},
        )
        fields = answer.to_dict()
        ids: list[int] = fields["prompt_token_ids"]  # type: ignore[assignment]
        new: list[int] = fields["choices"][0]["token_ids"]  # type: ignore[index]
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        if absorbed is not None:
            before, whole = absorbed
            expected = whole if ids[: len(whole)] == whole else before
            assert ids[: len(before)] == before
            assert (expected == before) == (turn == 3)
            assert answer.usage.prompt_tokens_details.cached_tokens == len(expected)
        absorbed = ids, ids + new[:-1]  # the last token of an answer that was cut has not been absorbed
        content = answer.choices[0].message.content
        assert content
        content = content[turn == 2 :]
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "And then?"}]
    refused = httpx.post(
        f"{base_url}/v1/chat/completions", json={"messages": messages}, headers={"X-Session-Id": "two words"}
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "X-Session-Id")
