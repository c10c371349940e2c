"""Saved states in chats: how new messages are written behind what was said before, and what answers tell."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.types import unpack_tokens
from tests.api.scripted import BOS, EOS, ScriptedEngine, Server, script_text, serve

STRICT = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}{{ raise_exception('A system message comes first.') }}"
    "{% endif %}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('Only one system message.') }}{% endif %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
HELPFUL = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}s:Be helpful.{{ eos_token }}{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{{ style }}{% endif %}"
)
"""Writes a system message if there is none."""


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture(params=[HELPFUL, STRICT], ids=["helpful", "strict"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve(chat_template=request.param) as running:
        yield running


@pytest.fixture
def helpful() -> Iterator[Server]:
    with serve(chat_template=HELPFUL) as running:
        yield running


def chat(server: Server, messages: Any, **fields: Any) -> dict[str, Any]:
    response = server.chat(messages, **{"max_tokens": 4, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def newest_prompt(server: Server) -> list[int]:
    return list(unpack_tokens(server.engine.requests[-1].prompts[0]))


def test_new_messages_come_behind_the_answer(server: Server) -> None:
    first = chat(server, [says("system", "S"), says("user", "abc")], save_state="talk")
    begun = len("s:Su:abca:") + 3  # and BOS, twice EOS
    assert first["state"]["num_tokens"] == begun + 4
    second = chat(server, [says("user", "de")], state="talk", save_state="talk")
    # What ends the answer, the new message, the beginning of an answer; no BOS and no system message.
    assert newest_prompt(server) == [EOS, *b"u:de", EOS, *b"a:"]
    assert second["choices"][0]["message"]["content"] == script_text(begun + 4 + 8, 0, 4)
    assert second["usage"]["prompt_tokens"] == begun + 4 + 8
    assert second["state"]["num_tokens"] == begun + 4 + 8 + 4
    chat(server, [says("tool", "7"), says("user", "f")], state=second["state"]["id"])
    assert newest_prompt(server) == [EOS, *b"t:7", EOS, *b"u:f", EOS, *b"a:"]
    chat(server, [says("user", "f"), says("assistant", "So")], state="talk", continue_final_message=True)
    assert newest_prompt(server) == [EOS, *b"u:f", EOS, *b"a:So"]


def test_without_messages_the_answer_goes_on(server: Server) -> None:
    first = chat(server, [says("system", "S"), says("user", "abc")], save_state="talk")
    length = first["state"]["num_tokens"]
    more = chat(server, [], state="talk", save_state="talk")
    assert newest_prompt(server) == []
    assert more["choices"][0]["message"] == {"role": "assistant", "content": script_text(length, 0, 4)}
    assert more["usage"]["prompt_tokens"] == length
    chat(server, [says("user", "x")], state="talk")
    assert newest_prompt(server) == [EOS, *b"u:x", EOS, *b"a:"]
    for field in ({"add_generation_prompt": True}, {"continue_final_message": True}, {"documents": [{"a": "b"}]}):
        refused = server.chat([], state="talk", **field)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == next(iter(field))


def test_a_users_message_goes_on_and_is_answered(helpful: Server) -> None:
    fields = {"continue_final_message": True, "save_state": "talk"}
    assert chat(helpful, [says("user", "abc")], **fields)["choices"][0]["message"]["role"] == "user"
    assert helpful.http.get("/v1/states/talk").json()["turn"] == "user"
    assert chat(helpful, [], state="talk", save_state="talk")["choices"][0]["message"]["role"] == "user"
    chat(helpful, [says("assistant", "Well,")], state="talk", continue_final_message=True)
    assert newest_prompt(helpful) == [EOS, *b"a:Well,"]


def test_a_conversation_is_read_and_saved_without_an_answer(helpful: Server) -> None:
    conversation = [says("user", "abc"), says("assistant", "So")]
    unfinished = {"continue_final_message": True, "max_tokens": None}
    for name in ("max_tokens", "max_completion_tokens"):
        read = chat(helpful, conversation, save_state="talk", **unfinished | {name: 0})
        assert read["choices"][0]["message"] == {"role": "assistant", "content": ""}
        assert read["usage"]["completion_tokens"] == 0 and read["state"]["num_tokens"] == read["usage"]["prompt_tokens"]
        assert helpful.http.get("/v1/states/talk").json()["turn"] == "assistant"
    chat(helpful, [says("user", "f")], state="talk")
    assert newest_prompt(helpful) == [EOS, *b"u:f", EOS, *b"a:"]
    assert len(chat(helpful, conversation, max_tokens=0, prompt_logprobs=0)["prompt_logprobs"]) > len("abcSo")


def test_a_conversation_about_a_text(helpful: Server) -> None:
    """Behind what no chat has saved stands a conversation of its own, without a beginning of sequence."""
    prefilled = helpful.http.post("/v1/states/prefill", json={"prompt": "abc", "name": "book"}).json()
    assert (prefilled["num_tokens"], prefilled["turn"]) == (4, None)
    chat(helpful, [says("user", "de")], state="book", save_state="talk")
    assert newest_prompt(helpful) == [*b"s:Be helpful.", EOS, *b"u:de", EOS, *b"a:"]
    assert helpful.http.get("/v1/states/talk").json()["turn"] == "assistant"
    chat(helpful, [says("system", "S"), says("user", "de")], state="book")
    assert newest_prompt(helpful) == [*b"s:S", EOS, *b"u:de", EOS, *b"a:"]
    fork = helpful.http.post("/v1/states/talk/fork").json()
    assert fork["turn"] == "assistant"
    # A completion writes what it likes behind a chat, so that nobody knows within what it ends.
    assert "turn" not in helpful.complete("de", state="talk", save_state="talk").json()["state"]
    assert helpful.http.get("/v1/states/talk").json()["turn"] is None


def test_every_choice_has_a_state(helpful: Server) -> None:
    states = chat(helpful, "abc", save_state=True, n=3)["state"]
    assert len({state["id"] for state in states}) == 3
    fields = {"stream": True, "n": 2, "save_state": True, "state": states[1]["id"], "max_tokens": 3}
    *lines, done, _ = helpful.chat("x", **fields, stream_options={"include_usage": True}).text.split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    ends = [chunk for chunk in chunks if "state" in chunk]
    assert sorted(chunk["choices"][0]["index"] for chunk in ends) == [0, 1]
    assert {chunk["state"]["num_tokens"] for chunk in ends} == {states[1]["num_tokens"] + len("u:xa:") + 2 + 3}
    assert chunks[-1]["usage"]["prompt_tokens"] == states[1]["num_tokens"] + len("u:xa:") + 2


def test_variables_of_the_template_are_read_behind_a_state(helpful: Server) -> None:
    chat(helpful, "abc", save_state="talk")
    chat(helpful, "de", state="talk", chat_template_kwargs={"style": "!"})
    assert newest_prompt(helpful) == [EOS, *b"u:de", EOS, *b"a:!"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"state": "talk", "add_special_tokens": True}, "add_special_tokens"),
        ({"state": "talk", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"state": "talk", "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"state": "talk", "messages": [], "echo": True}, "echo"),
        ({"state": "talk", "messages": [says("user", "a"), says("system", "b")]}, "messages"),
        ({"state": ""}, "state"),
        ({"state": 7}, "state"),
    ],
    ids=str,
)
def test_refused_with_the_name_of_the_field(fields: dict[str, Any], param: str) -> None:
    with serve(chat_template=STRICT) as server:
        chat(server, [says("system", "S"), says("user", "abc")], save_state="talk")
        response = server.http.post("/v1/chat/completions", json={"messages": [says("user", "a")], **fields})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), error


def test_documents_belong_to_the_beginning() -> None:
    template = "{% for d in documents or [] %}{{ d.a }}{% endfor %}{% for m in messages %}{{ m.content }}|{% endfor %}"
    with serve(chat_template=template) as server:
        chat(server, "abc", save_state="talk")
        refused = server.chat("x", state="talk", documents=[{"a": "b"}])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "documents")
        server.http.post("/v1/states/prefill", json={"prompt": "abc", "name": "book"})
        chat(server, "x", state="book", documents=[{"a": "b"}])
        assert newest_prompt(server) == [*b"bx|"]


def test_unknown_states_and_servers_without(helpful: Server) -> None:
    response = helpful.chat("a", state="none")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "state_not_found")
    with serve(ScriptedEngine(states=None), chat_template=HELPFUL) as server:
        response = server.chat("a", state="x")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "states_off")


def test_states_belong_to_their_key() -> None:
    with serve(chat_template=HELPFUL, keys=("one", "two")) as server:
        mine, theirs = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        body = {"messages": [says("user", "a")], "max_tokens": 3}
        saved = server.http.post("/v1/chat/completions", json=body | {"save_state": "talk"}, headers=mine)
        for state in ("talk", saved.json()["state"]["id"]):
            again = body | {"state": state}
            assert server.http.post("/v1/chat/completions", json=again, headers=theirs).status_code == 404
            assert server.http.post("/v1/chat/completions", json=again, headers=mine).status_code == 200


def test_a_template_that_begins_with_nothing(helpful: Server) -> None:
    with serve(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}") as server:
        chat(server, "abc", save_state="talk")
        chat(server, "de", state="talk")
        assert newest_prompt(server) == [*b"de"]
    assert BOS not in newest_prompt(server)
