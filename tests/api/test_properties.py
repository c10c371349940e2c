"""Whatever comes in, the answer is an answer: no input makes the server fail."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from server.api.body import parse_json
from server.api.chat_template import ChatTemplate
from server.api.chat_validation import ChatValidator
from server.api.completion_validation import CompletionValidator
from server.api.conversation import Conversations
from server.api.deltas import TokenNames
from server.api.forms import CompletionForm
from server.api.job import GenerationJob
from server.api.mailbox import ChoiceEvent
from server.api.rendering import ChunkRenderer, Envelope, render_answer
from server.api.schemas.chat import ChatCompletionRequest
from server.api.schemas.completion import CompletionRequest
from server.api.structured import Grammars
from server.api.validation import RequestValidator
from server.errors import ApiError
from server.types import FinishReason, SamplingParams
from tests.api.scripted import INFO, VOCAB, ByteTokenizer, ScriptedEngine, Server, serve

texts = st.text(st.characters(codec=None), max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.integers(-3, VOCAB + 3) | st.floats(width=64) | texts
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(texts | st.from_regex(r"\d{1,3}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=8,
)
prompts = (
    texts
    | st.lists(texts, max_size=3)
    | st.lists(st.integers(-1, VOCAB), max_size=5)
    | st.lists(st.lists(st.integers(-1, VOCAB), max_size=3), max_size=3)
)
contents = texts | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3)
conversations = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": contents}),
    max_size=3,
)
plausible: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(0, 9),
    "min_tokens": st.integers(0, 5),
    "temperature": st.floats(-0.5, 3),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-2, VOCAB + 1),
    "n": st.integers(0, 5),
    "logprobs": st.integers(0, 6) | st.booleans(),
    "bad_words": st.lists(texts, max_size=3),
    "allowed_token_ids": st.lists(st.integers(0, VOCAB), max_size=3),
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema"])},
        optional={"json_schema": st.fixed_dictionaries({"name": st.just("x"), "schema": values})},
    ),
    "structured_outputs": st.fixed_dictionaries(
        {}, optional={"json": values, "regex": texts, "choice": st.lists(texts), "grammar": texts}
    ),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "stop": texts | st.lists(texts, max_size=3),
    "checkpoint_at": st.lists(st.integers(0, 12), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, VOCAB), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB).map(str), st.floats(-101, 101), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans() | st.none()}),
    "echo": st.booleans(),
    "top_logprobs": st.integers(0, 6),
    "max_completion_tokens": st.integers(0, 9),
    "truncate_prompt_tokens": st.integers(-2, 9),
    "add_special_tokens": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "continue_final_message": st.booleans(),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["style", "other"]), scalars, max_size=1),
    "best_of": st.integers(0, 5),
    "prompt_logprobs": st.integers(0, 6),
    "priority": st.integers(-3, 3),
    "state": texts | st.just("mine"),
    "save_state": st.booleans() | st.just("mine"),
    "state_ttl": st.integers(0, 9),
    "return_token_ids": st.booleans(),
}


def bodies_of(
    schema: type[BaseModel], required: str, example: Any, likely: st.SearchStrategy[Any]
) -> st.SearchStrategy[Any]:
    """Bodies of a route: any values, plausible values, and one odd field beside a good one."""
    fields = [*schema.model_fields, "unknown"]
    fitting = {name: strategy for name, strategy in plausible.items() if name in fields}
    return st.one_of(
        st.fixed_dictionaries({required: likely | values}, optional={n: values for n in fields if n != required}),
        st.fixed_dictionaries({required: likely}, optional=fitting),
        st.builds(lambda name, value: {required: example, name: value}, st.sampled_from(fields) | texts, values),
    )


bodies = bodies_of(CompletionRequest, "prompt", "a", prompts)
chat_bodies = bodies_of(ChatCompletionRequest, "messages", [{"role": "user", "content": "a"}], conversations)
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}{{ style }}"


def encode(body: Any) -> bytes:
    return json.dumps(body).encode()


def check_job(validator: RequestValidator, body: bytes) -> None:
    try:
        job = validator.job(parse_json(body))
    except ApiError as error:
        assert error.status in (400, 404)
        assert error.message
    else:
        params = job.params
        assert 1 <= job.num_choices <= INFO.max_request_choices
        assert all(0 <= token < VOCAB for prompt in job.prompts for token in prompt)
        assert job.state is not None or all(job.prompts)
        assert all(len(prompt) < INFO.max_model_len for prompt in job.prompts)  # type: ignore[operator]
        assert params.max_tokens is not None
        assert 0 <= params.min_tokens <= params.max_tokens
        assert 0 <= params.top_k < VOCAB
        assert 0 < params.top_p <= 1
        assert all(0 <= token < VOCAB for token in (*params.stop_token_ids, *params.logit_bias))
        assert all(0 <= token < VOCAB for token in params.allowed_token_ids or ())
        assert all(phrase and 0 <= min(phrase) <= max(phrase) < VOCAB for phrase in params.bad_words)
        "".join(params.stop).encode()


@given(body=bodies.map(encode) | st.binary(max_size=40) | values.map(encode))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), None], ids=["text", "ids"])
def test_every_body_is_a_job_or_a_clear_refusal(tokenizer: Any, body: bytes) -> None:
    check_job(CompletionValidator(("m",), INFO, tokenizer, Grammars(tokenizer)), body)


@given(body=chat_bodies.map(encode) | values.map(encode))
@settings(max_examples=150, deadline=None)
def test_every_chat_body_is_a_job_or_a_clear_refusal(body: bytes) -> None:
    tokenizer: Any = ByteTokenizer()
    template = ChatTemplate(TEMPLATE, tokenizer.special_tokens)
    conversations = Conversations(tokenizer, template)
    check_job(ChatValidator(("m",), INFO, tokenizer, Grammars(tokenizer), conversations), body)


@pytest.fixture(scope="module")
def quick_server() -> Iterator[Server]:
    """A server whose answers are short, whatever is asked for."""
    with serve(ScriptedEngine(stop_after=7), chat_template=TEMPLATE) as running:
        yield running


@given(route=st.just(("/v1/completions", bodies)) | st.just(("/v1/chat/completions", chat_bodies)), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_input_gives_a_5xx(
    quick_server: Server, route: tuple[str, st.SearchStrategy[Any]], data: st.DataObject
) -> None:
    path, inputs = route
    response = quick_server.http.post(path, content=encode(data.draw(inputs)))
    assert response.status_code in (200, 400, 404)
    if response.status_code == 200:
        assert '"error"' not in response.text
    else:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"


@given(
    data=st.binary(max_size=60) | st.text(max_size=20).map(str.encode),
    cuts=st.lists(st.integers(0, 60), max_size=10),
    choices=st.integers(1, 3),
    echoed=st.text(max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_text_is_the_same_however_its_bytes_are_cut(data: bytes, cuts: list[int], choices: int, echoed: str) -> None:
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(bounds)]
    job = GenerationJob(
        model="m",
        prompts=[[1]],
        echoed=[echoed],
        n=choices,
        candidates=choices,
        priority=0,
        checkpoint_at=(),
        params=SamplingParams(),
        stream=True,
        include_usage=True,
        continuous_usage=False,
        prompt_token_ids=False,
        token_ids=False,
        tokens_as_ids=False,
        request_id=None,
        role="assistant",
        logprobs=None,
    )
    form, envelope = CompletionForm(TokenNames(None)), Envelope("id", 0, "fp")
    renderer = ChunkRenderer(job, form, envelope, {})
    streamed = renderer.opening()
    events: list[list[ChoiceEvent]] = [[] for _ in range(choices)]
    for number, piece in enumerate(pieces):
        reason = FinishReason.LENGTH if number == len(pieces) - 1 else FinishReason.RUNNING
        for choice in range(choices):
            event = ChoiceEvent(
                choice=choice, token_ids=[5], text=piece, logprobs=[], finish_reason=reason, stop_reason=None
            )
            events[choice].append(event)
        streamed += renderer.chunks([own[-1] for own in events])
    assert renderer.done
    expected = [echoed + data.decode(errors="replace")] * choices
    whole = json.loads(render_answer(job, form, envelope, events, {}))
    assert [choice["text"] for choice in whole["choices"]] == expected
    *lines, done, _ = streamed.decode().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert chunks.pop()["usage"] == whole["usage"]
    texts = [""] * choices
    for chunk in chunks:
        (piece_of,) = chunk["choices"]
        texts[piece_of["index"]] += piece_of["text"]
    assert texts == expected
