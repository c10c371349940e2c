"""What is refused, and by which name; what passes unharmed."""

from typing import Any

import pytest

from tests.api.scripted import VOCAB, Server, serve

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1, [1]]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [[1, "a"]]}, "prompt"),
    ({"prompt": [[[1]]]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": 1}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [VOCAB]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [[1], [2, VOCAB]]}, "prompt"),
    ({"prompt": [1] * 2000}, "prompt"),
    ({"prompt": "a" * 1999}, "prompt"),
    ({"prompt": ["a"] * 17}, "prompt"),
    ({"n": 17}, "n"),
    ({"prompt": ["a", "b"], "n": 9}, "n"),
    ({"n": 0}, "n"),
    ({"n": 10**30}, "n"),
    ({"n": 1.0}, "n"),
    ({"n": "1"}, "n"),
    ({"n": True}, "n"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 17}, "best_of"),
    ({"prompt": ["a"] * 3, "n": 2, "best_of": 6}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 0, "echo": False, "logprobs": 1}, "max_tokens"),
    ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
    ({"max_tokens": 0, "echo": True, "prompt": [1] * 2001}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": False}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": -1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": True}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"presence_penalty": "1"}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": -1}, "repetition_penalty"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": "1"}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": {"1": None}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"01": 1}}, "logit_bias"),
    ({"logit_bias": {" 1": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": [[1, 1]]}, "logit_bias"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"seed": True}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": 1}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["a", None]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": ["a"] * 33}, "stop"),
    ({"stop": "a" * 513}, "stop"),
    ({"checkpoint_at": 1}, "checkpoint_at"),
    ({"checkpoint_at": [0]}, "checkpoint_at"),
    ({"checkpoint_at": [True]}, "checkpoint_at"),
    ({"checkpoint_at": [10_000]}, "checkpoint_at"),
    ({"checkpoint_at": [1] * 65}, "checkpoint_at"),
    ({"stop_token_ids": 1}, "stop_token_ids"),
    ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids"),
    ({"stop_token_ids": [True]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"ignore_eos": "true"}, "ignore_eos"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 1.0}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"stream": 1}, "stream"),
    ({"stream": "false"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"model": 1}, "model"),
    ({"suffix": "b"}, "suffix"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": True}, "truncate_prompt_tokens"),
    ({"add_special_tokens": 0}, "add_special_tokens"),
    ({"add_special_tokens": False, "prompt": [""]}, "prompt"),
    ({"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids"),
    ({"request_id": ""}, "request_id"),
    ({"request_id": "a b"}, "request_id"),
    ({"request_id": "é"}, "request_id"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"request_id": 7}, "request_id"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
    ({"continuous_usage_stats": True}, "continuous_usage_stats"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"add_generation_prompt": True}, "add_generation_prompt"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"use_beam_search": 0}, "use_beam_search"),
    ({"length_penalty": True}, "length_penalty"),
    ({"priority": 1.0}, "priority"),
    ({"priority": True}, "priority"),
    ({"priority": 2**63}, "priority"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 6}, "prompt_logprobs"),
    ({"prompt_logprobs": True}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
    ({"allowed_token_ids": ["1"]}, "allowed_token_ids"),
    ({"allowed_token_ids": [True]}, "allowed_token_ids"),
    ({"allowed_token_ids": 1}, "allowed_token_ids"),
    ({"bad_words": "a"}, "bad_words"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": [1]}, "bad_words"),
    ({"bad_words": ["a"] * 1025}, "bad_words"),
    ({"bad_words": ["a" * 513]}, "bad_words"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens"),
    ({"spaces_between_special_tokens": 1}, "spaces_between_special_tokens"),
    ({"guided_json": {}}, "guided_json"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"structural_tag": "a"}, "structural_tag"),
    ({"messages": []}, "messages"),
    ({"temprature": 1}, "temprature"),
    ({"temprature": None}, "temprature"),
    ({"": 1}, ""),
]

ACCEPTED: list[dict[str, Any]] = [
    {"prompt": ["a"]},
    {"prompt": [1, 2]},
    {"prompt": [[1], [2, 3]]},
    {"prompt": [VOCAB - 1, 0]},
    {"prompt": [1] * 1999},
    {"prompt": " "},
    {"n": 16},
    {"n": 3, "best_of": 3},
    {"n": 2, "best_of": 5},
    {"n": 2, "best_of": 2, "stream": True},
    {"prompt_logprobs": 5},
    {"max_tokens": 0, "prompt_logprobs": 0},
    {"max_tokens": 0, "echo": True, "logprobs": 5, "prompt": [1] * 2000},
    {"best_of": 1},
    {"max_tokens": 1, "min_tokens": 1},
    {"temperature": 0},
    {"temperature": 2},
    {"top_p": 1},
    {"top_k": -1},
    {"top_k": 10**30},
    {"min_p": 1},
    {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 1.3},
    {"logit_bias": {}},
    {"logit_bias": {"0": 100, "299": -100.0}},
    {"priority": -(2**63)},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"stop": []},
    {"stop": "x"},
    {"stop": ["a"] * 32},
    {"stop_token_ids": [0, VOCAB - 1]},
    {"checkpoint_at": [1]},
    {"logprobs": 0},
    {"logprobs": 5},
    {"stream": True, "stream_options": None},
    {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
    {"suffix": ""},
    {"truncate_prompt_tokens": -1},
    {"request_id": "x" * 128, "service_tier": "priority", "prompt_cache_retention": "24h"},
    {"use_beam_search": False, "length_penalty": 1, "skip_special_tokens": True, "bad_words": []},
    {"allowed_token_ids": [1, 1, VOCAB - 1], "bad_words": ["a", " b", " ", "世界"]},
    {"include_stop_str_in_output": True, "skip_special_tokens": False, "spaces_between_special_tokens": True},
    {"user": "me", "metadata": {"a": ["anything"]}, "store": True},
]

EVERY_FIELD = [
    *("model", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty"),
    *("frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("logprobs", "n", "best_of", "stream", "stream_options", "echo", "return_token_ids", "suffix", "user"),
    "priority",
    *("guided_json", "structured_outputs", "prompt_logprobs", "truncate_prompt_tokens", "request_id", "cache_salt"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_with_the_name_of_the_field(server: Server, fields: dict[str, Any], param: str) -> None:
    response = server.complete(**{"prompt": "a", **fields})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]
    assert len(error["message"]) < 300
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("fields", ACCEPTED, ids=lambda value: str(value)[:40])
def test_accepted(server: Server, fields: dict[str, Any]) -> None:
    response = server.complete(**{"prompt": "a", **fields})
    assert response.status_code == 200, response.text


def test_null_means_not_given(server: Server) -> None:
    response = server.complete(**dict.fromkeys(EVERY_FIELD))
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 16


def test_refusals_say_what_to_do_instead(server: Server) -> None:
    assert "at its end only" in server.complete(suffix="b").json()["error"]["message"]
    assert "structured_outputs" in server.complete(guided_json={}).json()["error"]["message"]


def test_prompt_is_required(server: Server) -> None:
    error = server.http.post("/v1/completions", json={"max_tokens": 1}).json()["error"]
    assert error["param"] == "prompt"


def test_refused_requests_never_reach_the_engine() -> None:
    with serve() as server:
        for fields, _ in REFUSED[::10]:
            server.complete(**{"prompt": "a", **fields})
        assert server.engine.requests == []


def test_parameters_reach_the_engine_as_given() -> None:
    with serve() as server:
        server.complete(
            "ab",
            n=2,
            max_tokens=9,
            min_tokens=2,
            temperature=0.5,
            top_p=0.8,
            top_k=7,
            min_p=0.1,
            presence_penalty=0.2,
            frequency_penalty=-0.3,
            repetition_penalty=1.1,
            logit_bias={"5": 2, "6": -1.5},
            seed=-12,
            stop="xyz",
            stop_token_ids=[3, 4],
            ignore_eos=True,
            logprobs=2,
        )
        (request,) = server.engine.requests
    assert request.n == 2
    params = request.params
    assert (params.max_tokens, params.min_tokens, params.temperature, params.top_p) == (9, 2, 0.5, 0.8)
    assert (params.top_k, params.min_p, params.presence_penalty) == (7, 0.1, 0.2)
    assert (params.frequency_penalty, params.repetition_penalty) == (-0.3, 1.1)
    assert params.logit_bias == {5: 2.0, 6: -1.5}
    assert (params.seed, params.stop, params.stop_token_ids) == (-12, ("xyz",), (3, 4))
    assert params.ignore_eos
    assert params.logprobs == 2


def test_defaults_are_the_checkpoints() -> None:
    with serve() as server:
        server.complete(temperature=None)
        server.complete(temperature=0, top_p=1, top_k=0)
        server.complete(top_k=300)
        first, second, third = (request.params for request in server.engine.requests)
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (0.7, 0.9, 40, 16)
    assert (first.seed, first.logprobs, first.stop, first.min_p, first.repetition_penalty) == (None, None, (), 0.0, 1.0)
    assert (second.temperature, second.top_p, second.top_k) == (0, 1, 0)
    assert third.top_k == 0, "as many as the vocabulary has are all of them"


def test_unknown_model(server: Server) -> None:
    response = server.complete(model="gpt-4")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")
    assert server.complete(model="org/scripted").json()["model"] == "org/scripted"
    assert server.complete().json()["model"] == "scripted"


def test_too_long_prompt_says_so(server: Server) -> None:
    error = server.complete([1] * 2000).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2000" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"), [({"prompt": "a"}, "prompt"), ({"stop": "a"}, "stop"), ({"echo": True}, "echo")]
)
def test_without_a_tokenizer_text_is_refused(fields: dict[str, Any], param: str) -> None:
    with serve(tokenizer=None) as server:
        response = server.complete(**{"prompt": [1, 2], **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert "tokenizer" in response.json()["error"]["message"]
