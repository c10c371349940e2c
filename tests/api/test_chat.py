"""Chat completions: from messages to prompts, and the forms of answers."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from server.api.chat_validation import DEFAULT_MAX_TOKENS
from server.api.schemas.chat import ChatCompletion, ChatCompletionChunk
from server.types import unpack_tokens
from tests.api.scripted import (
    ALIAS,
    BOS,
    EOS,
    INFO,
    SCRIPT,
    ScriptedEngine,
    Server,
    script_text,
    script_tokens,
    serve,
)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('The system message comes first.') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{{ style }}{% endif %}"
)
PROMPT = len("u:abc") + len("a:") + 2
"""Tokens of the conversation whose only message is "abc": BOS and EOS besides the bytes."""
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(chat_template=TEMPLATE) as running:
        yield running


def prompt_of(server: Server, **fields: Any) -> list[int]:
    answer = server.chat(**fields, return_token_ids=True, max_tokens=1)
    assert answer.status_code == 200, answer.text
    return answer.json()["prompt_token_ids"]


def stream(server: Server, **fields: Any) -> list[dict[str, Any]]:
    response = server.chat(stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *lines, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
        assert (chunk["object"], chunk["model"]) == ("chat.completion.chunk", "scripted")
        assert chunk["system_fingerprint"] == INFO.fingerprint
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    return chunks


def gather(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the chunks add up to, by choice."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            first = piece["index"] not in choices
            choice = choices.setdefault(
                piece["index"], {"text": "", "role": None, "token_ids": [], "logprobs": None, "finish_reason": None}
            )
            assert first == ("role" in piece["delta"]), "the role comes first, once"
            assert choice["finish_reason"] is None, "nothing follows the end"
            choice["role"] = piece["delta"].get("role", choice["role"])
            choice["text"] += piece["delta"].get("content", "")
            choice["token_ids"] += piece.get("token_ids") or []
            choice["finish_reason"] = piece["finish_reason"]
            choice["stop_reason"] = piece.get("stop_reason")
            if piece["logprobs"] is not None:
                choice["logprobs"] = choice["logprobs"] or {"content": []}
                choice["logprobs"]["content"] += piece["logprobs"]["content"]
    return choices


def test_whole_answer(server: Server) -> None:
    body = server.chat("abc", max_tokens=20).json()
    ChatCompletion.model_validate(body)
    assert list(body) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": script_text(PROMPT, 0, 20)},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": PROMPT,
        "completion_tokens": 20,
        "total_tokens": PROMPT + 20,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_the_template_makes_the_prompt(server: Server) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "tool", "content": "42", "tool_call_id": "7"},
        {"role": "developer", "content": "ü", "name": "me"},
    ]
    said = [*b"s:S", EOS, *b"u:x\ny", EOS, *b"a:", EOS, *b"t:42", EOS, *"d:ü".encode(), EOS]
    assert prompt_of(server, messages=messages) == [BOS, *said, *b"a:"]
    assert prompt_of(server, messages=messages, add_generation_prompt=False) == [BOS, *said]
    assert prompt_of(server, messages=messages, chat_template_kwargs={"style": "!"}) == [BOS, *said, *b"a:!"]
    assert prompt_of(server, messages=messages, add_special_tokens=True) == [BOS, BOS, *said, *b"a:"]
    assert prompt_of(server, messages=messages, truncate_prompt_tokens=4) == [*"ü".encode()[1:], EOS, *b"a:"]


def test_continue_the_last_message(server: Server) -> None:
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "Once "}]
    assert prompt_of(server, messages=messages, continue_final_message=True) == [BOS, *b"u:abc", EOS, *b"a:Once "]
    fields = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, "max_tokens": 9}
    expected = script_text(len("u:abca:Once ") + 2, 0, 9)
    assert server.chat(**fields).json()["choices"][0]["message"] == {"role": "assistant", "content": expected}
    echoed = server.chat(**fields, echo=True).json()["choices"][0]["message"]
    assert echoed == {"role": "assistant", "content": "Once " + expected}
    assert gather(stream(server, **fields, echo=True))[0]["text"] == echoed["content"]
    fields["messages"] = [{"role": "user", "content": [{"type": "text", "text": "Dear Sir"}]}]
    body = server.chat(**fields).json()
    assert body["choices"][0]["message"]["role"] == "user", "it is the user who goes on speaking"
    assert body["usage"]["prompt_tokens"] == len("u:Dear Sir") + 1


def test_stream_adds_up_to_the_whole_answer(server: Server) -> None:
    for fields in (
        {"n": 3, "max_tokens": 40},
        {"n": 2, "max_completion_tokens": 33, "stop": ["was 🌊", "世"]},
        {"max_tokens": 60, "logprobs": True, "top_logprobs": 2},
        {"max_tokens": 20, "logprobs": True, "return_token_ids": True, "stop_token_ids": [33]},
        {"max_tokens": 20, "logprobs": True, "return_tokens_as_token_ids": True},
    ):
        whole = server.chat(**fields).json()
        chunks = stream(server, stream_options={"include_usage": True}, **fields)
        assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
        assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks[:-1])
        assert chunks[0].get("prompt_token_ids") == whole.get("prompt_token_ids")
        pieces = gather(chunks)
        assert len(pieces) == len(whole["choices"])
        for choice in whole["choices"]:
            piece = pieces[choice["index"]]
            assert {"role": piece["role"], "content": piece["text"]} == choice["message"]
            for name in ("finish_reason", "stop_reason", "logprobs"):
                assert piece[name] == choice[name], name
            if "return_token_ids" in fields:
                assert piece["token_ids"] == choice["token_ids"]


def test_the_role_comes_before_the_first_token() -> None:
    with serve(ScriptedEngine(paused=True), chat_template=TEMPLATE) as server:
        body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "n": 2, "max_tokens": 2}
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = (json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line)
            for index in range(2):
                (choice,) = next(lines)["choices"]
                assert (choice["index"], choice["delta"]) == (index, {"role": "assistant", "content": ""})
            server.engine.paused = False


def test_the_last_chunk_of_a_choice_tells_why_it_ended(server: Server) -> None:
    *_, last = stream(server, max_tokens=60, stop="It")
    (choice,) = last["choices"]
    assert (choice["delta"], choice["finish_reason"], choice["stop_reason"]) == ({}, "stop", "It")


def test_continuous_usage(server: Server) -> None:
    fields: dict[str, Any] = {"n": 2, "max_tokens": 7}
    chunks = stream(server, stream_options={"include_usage": True, "continuous_usage_stats": True}, **fields)
    counts: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks[:-1]:
        usage = chunk["usage"]
        assert (usage["prompt_tokens"], usage["total_tokens"]) == (PROMPT, PROMPT + usage["completion_tokens"])
        counts[chunk["choices"][0]["index"]].append(usage["completion_tokens"])
    assert counts[0][0] == counts[1][0] == 0, "the chunk with the role"
    assert all(own == sorted(own) and own[-1] == 7 for own in counts.values())
    assert chunks[-1]["usage"]["completion_tokens"] == 14


def test_logprobs(server: Server) -> None:
    at = SCRIPT.index("世".encode()) - 1
    text = "x" * (at + len(SCRIPT) - PROMPT + 3)
    fields: dict[str, Any] = {"messages": text, "max_tokens": 2, "logprobs": True}
    choice = server.chat(**fields, top_logprobs=3).json()["choices"][0]
    assert choice["logprobs"]["content"] == [
        {
            "token": token,
            "logprob": -1.0,
            "bytes": data,
            "top_logprobs": [
                {"token": "aß", "logprob": -0.5, "bytes": list("aß".encode())},
                {"token": token, "logprob": -1.0, "bytes": data},
                {"token": "bytes:\\xe2", "logprob": -9999.0, "bytes": [0xE2]},
            ],
        }
        for token, data in ((" ", [32]), ("bytes:\\xe4", [0xE4]))
    ]
    plain = server.chat(**fields).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[], []]
    as_ids = server.chat(**fields, top_logprobs=1, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
    assert [entry["token"] for entry in as_ids["content"]] == ["token_id:32", "token_id:228"]
    assert [entry["bytes"] for entry in as_ids["content"]] == [[32], [0xE4]]
    assert as_ids["content"][0]["top_logprobs"][0]["token"] == f"token_id:{ALIAS}"
    assert server.chat(max_tokens=1).json()["choices"][0]["logprobs"] is None


def test_prompt_logprobs(server: Server) -> None:
    fields: dict[str, Any] = {"prompt_logprobs": 1, "max_tokens": 2, "n": 2}
    body = server.chat("ab", **fields).json()
    ChatCompletion.model_validate(body)
    prompt = [BOS, *b"u:ab", EOS, *b"a:"]
    known = server.complete(prompt, **fields).json()["choices"][0]["prompt_logprobs"]
    assert body["prompt_logprobs"] == known
    assert [next(iter(entry)) for entry in known[1:]] == [str(token) for token in prompt[1:]]
    assert known[prompt.index(EOS)][str(EOS)]["decoded_token"] == "</s>"
    assert all("prompt_logprobs" not in choice for choice in body["choices"])


def test_token_ids(server: Server) -> None:
    body = server.chat(n=2, max_tokens=5, return_token_ids=True).json()
    assert body["prompt_token_ids"] == [BOS, *b"u:abc", EOS, *b"a:"]
    assert [choice["token_ids"] for choice in body["choices"]] == [script_tokens(PROMPT, j, 5) for j in range(2)]
    assert all("prompt_token_ids" not in choice for choice in body["choices"])


def test_more_prompt_logprobs_than_an_answer_can_hold(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.validation.MAX_PROMPT_LOGPROBS", 2 * PROMPT)
    assert server.chat(prompt_logprobs=1, n=2).status_code == 200
    assert server.chat(prompt_logprobs=2).json()["error"]["param"] == "prompt_logprobs"


def test_how_long_an_answer_may_get() -> None:
    def most(engine: ScriptedEngine, **fields: Any) -> int | None:
        engine.stop_after = 1
        with serve(engine, chat_template=TEMPLATE) as server:
            assert server.chat(**fields).status_code == 200
        return engine.requests[0].params.max_tokens

    unlimited = msgspec.structs.replace(INFO, max_model_len=None)
    assert most(ScriptedEngine()) == 2000 - PROMPT
    assert most(ScriptedEngine(unlimited)) == DEFAULT_MAX_TOKENS
    assert most(ScriptedEngine(), max_tokens=5) == 5
    assert most(ScriptedEngine(), max_completion_tokens=6) == 6
    assert most(ScriptedEngine(), max_completion_tokens=6, max_tokens=6) == 6
    assert most(ScriptedEngine(unlimited), truncate_prompt_tokens=-1) == DEFAULT_MAX_TOKENS


def test_truncation_leaves_room_for_the_answer() -> None:
    with serve(chat_template=TEMPLATE, max_body_bytes=100_000) as server:
        assert server.chat("x" * 3000).status_code == 400
        body = server.chat("x" * 3000, truncate_prompt_tokens=-1, max_tokens=30).json()
        assert body["usage"]["prompt_tokens"] == 2000 - 30
        prompt = list(unpack_tokens(server.engine.requests[-1].prompts[0]))
    assert prompt[-3:] == [EOS, *b"a:"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": ["a"]}, "messages.0"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "User", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "function", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a", "colour": "red"}]}, "messages.0.colour"),
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [WEATHER]}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "messages"),
    ({"tools": [WEATHER]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"documents": [{"text": "a"}]}, "documents"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"echo": True}, "echo"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"prompt_logprobs": 6}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"n": 17}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"prompt": "a"}, "prompt"),
    ({"suffix": "a"}, "suffix"),
    ({"temperature": -1}, "temperature"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"request_id": "a b"}, "request_id"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused_with_the_name_of_the_field(server: Server, fields: dict[str, Any], param: str) -> None:
    response = server.chat(**fields)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.rpartition(".")[2] in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "none"},
        {"modalities": ["text"], "verbosity": "medium", "service_tier": "flex", "prediction": {"type": "content"}},
        {"user": "me", "metadata": {}, "store": False, "prompt_cache_retention": "24h"},
        {"logprobs": False, "top_logprobs": 0},
        {"logprobs": None, "top_logprobs": None, "max_tokens": None, "tools": None, "chat_template_kwargs": None},
        {"add_generation_prompt": False, "continue_final_message": False},
    ],
    ids=lambda value: str(value)[:50],
)
def test_accepted(server: Server, fields: dict[str, Any]) -> None:
    response = server.chat(**{"max_completion_tokens": 3, **fields})
    assert response.status_code == 200, response.text


def test_the_templates_own_words_explain_a_refusal(server: Server) -> None:
    error = server.chat([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]).json()["error"]
    assert "The system message comes first." in error["message"]


def test_what_the_user_writes_is_not_a_template(server: Server) -> None:
    assert prompt_of(server, messages="{{ bos_token }}{% raw %}") == [BOS, *b"u:{{ bos_token }}{% raw %}", EOS, *b"a:"]


def test_a_model_without_template_says_how_to_give_one() -> None:
    with serve() as server:
        response = server.chat()
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("messages", "no_chat_template")
        assert "--chat-template" in error["message"]
        response = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "no_chat_template")
    with serve(tokenizer=None, chat_template=TEMPLATE) as server:
        error = server.chat().json()["error"]
        assert error["param"] == "messages"
        assert "tokenizer" in error["message"]


def test_a_prompt_too_long_says_so(server: Server) -> None:
    error = server.chat("a" * 2000).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_an_unknown_model(server: Server) -> None:
    response = server.chat(model="gpt-4o")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_a_failing_stream_ends_with_the_error() -> None:
    with serve(ScriptedEngine(fail_after=3), chat_template=TEMPLATE) as server:
        *_, error, done, _ = server.chat(stream=True).text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert done == "data: [DONE]"


def test_tokenize_shows_the_prompt_of_a_chat(server: Server) -> None:
    def tokenize(**fields: Any) -> dict[str, Any]:
        response = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": "ü"}], **fields})
        assert response.status_code == 200, response.text
        return response.json()

    said = [BOS, *"u:ü".encode(), EOS]
    assert tokenize() == {"count": 8, "max_model_len": 2000, "tokens": [*said, *b"a:"], "token_strs": None}
    assert tokenize(add_generation_prompt=False)["tokens"] == said
    assert tokenize(continue_final_message=True)["tokens"] == said[:-1]
    assert tokenize(add_special_tokens=True)["tokens"] == [BOS, *said, *b"a:"]
    assert tokenize(chat_template_kwargs={"style": "!"})["tokens"] == [*said, *b"a:!"]
    assert tokenize(return_token_strs=True)["token_strs"][1:5] == ["u", ":", "bytes:\\xc3", "bytes:\\xbc"]
    for body, param in (
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [WEATHER]}, "tools"),
    ):
        error = server.http.post("/tokenize", json=body).json()["error"]
        assert error["param"] == param
