"""What a text must look like: what is refused before generation, and by which name; what reaches the engine."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from server.grammar import GrammarVocabulary
from tests.api.scripted import EOS, VOCAB, ByteTokenizer, Server, serve

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
NAMED = {"name": "thing", "schema": SCHEMA}


def form(**fields: Any) -> dict[str, Any]:
    return {"response_format": fields}


def outputs(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (form(), "response_format.type"),
    (form(type="json"), "response_format.type"),
    (form(type=1), "response_format.type"),
    ({"response_format": "text"}, "response_format"),
    (form(type="json_object", schema={}), "response_format.schema"),
    (form(type="json_schema"), "response_format.json_schema"),
    (form(type="json_object", json_schema=NAMED), "response_format.json_schema"),
    (form(type="text", json_schema=NAMED), "response_format.json_schema"),
    (form(type="json_schema", json_schema={"schema": SCHEMA}), "response_format.json_schema.name"),
    (form(type="json_schema", json_schema={"name": "a b", "schema": SCHEMA}), "response_format.json_schema.name"),
    (form(type="json_schema", json_schema={"name": "a"}), "response_format.json_schema.schema"),
    (form(type="json_schema", json_schema=NAMED | {"schema": []}), "response_format.json_schema.schema"),
    (form(type="json_schema", json_schema=NAMED | {"schema": {"type": 1}}), "response_format.json_schema.schema"),
    (
        form(type="json_schema", json_schema=NAMED | {"strict": False, "schema": {"uniqueItems": True}}),
        "response_format.json_schema.schema",
    ),
    (form(type="json_schema", json_schema=NAMED | {"strict": 1}), "response_format.json_schema.strict"),
    (form(type="json_object") | outputs(json_object=True), "structured_outputs"),
    (form(type="json_object") | {"ignore_eos": True}, "ignore_eos"),
    (outputs(regex="a") | {"ignore_eos": True}, "ignore_eos"),
    (outputs(), "structured_outputs"),
    (outputs(json_object=False), "structured_outputs"),
    (outputs(regex="a", choice=["a"]), "structured_outputs"),
    (outputs(json={}, json_object=True), "structured_outputs"),
    (outputs(json="{"), "structured_outputs.json"),
    (outputs(json=1), "structured_outputs.json"),
    (outputs(json={"$ref": "https://example.com/schema"}), "structured_outputs.json"),
    (outputs(json={"type": "integer", "minimum": 2, "maximum": 1}), "structured_outputs.json"),
    (outputs(json={"pattern": "(?=a)"}), "structured_outputs.json"),
    (outputs(json_object=1), "structured_outputs.json_object"),
    (outputs(json_object=True, whitespace_pattern="["), "structured_outputs.json_object"),
    (outputs(regex="a", whitespace_pattern=" "), "structured_outputs.whitespace_pattern"),
    (outputs(choice=["a"], disable_any_whitespace=True), "structured_outputs.disable_any_whitespace"),
    (outputs(regex="("), "structured_outputs.regex"),
    (outputs(regex=r"(a)\1"), "structured_outputs.regex"),
    (outputs(regex="\ud800"), "structured_outputs"),
    (outputs(regex=1), "structured_outputs.regex"),
    (outputs(choice=[]), "structured_outputs.choice"),
    (outputs(choice="a"), "structured_outputs.choice"),
    (outputs(choice=["a", ""]), "structured_outputs.choice.1"),
    (outputs(choice=["\ud800"]), "structured_outputs"),
    (outputs(grammar="start: foo"), "structured_outputs.grammar"),
    (outputs(grammar="start: <nothing>"), "structured_outputs.grammar"),
    (outputs(grammar="SELECT"), "structured_outputs.grammar"),
    (outputs(grammar=""), "structured_outputs.grammar"),
    (outputs(regex="a", disable_additional_properties=True), "structured_outputs.disable_additional_properties"),
    (outputs(regex="a", structural_tag="{}"), "structured_outputs.structural_tag"),
    (outputs(rexeg="a"), "structured_outputs.rexeg"),
]


@pytest.fixture(scope="module")
def chatty() -> Iterator[Server]:
    with serve(chat_template="{{ messages[0].content }}") as server:
        yield server


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_with_the_name_of_the_field(chatty: Server, fields: dict[str, Any], param: str) -> None:
    for path, prompt in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": [user()]})):
        before = len(chatty.engine.requests)
        # As bytes: the client's own encoder refuses some of this.
        response = chatty.http.post(
            f"/v1/{path}", content=json.dumps(prompt | fields), headers={"content-type": "application/json"}
        )
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert error["param"] == param
        assert param in error["message"]
        assert len(error["message"]) < 400
        assert "\n" not in error["message"]
        assert len(chatty.engine.requests) == before


def user() -> dict[str, str]:
    return {"role": "user", "content": "a"}


ACCEPTED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (form(type="json_object"), ["{}", '{"b": [1]}', '{ "b" :1}'], ["[]", "x"]),
    (form(type="json_schema", json_schema=NAMED), ['{"a": 1}', '{"a":-20}'], ["{}", '{"a": 1, "b": 2}']),
    (form(type="json_schema", json_schema=NAMED | {"description": "d", "strict": True}), ['{"a": 1}'], ["{}"]),
    (outputs(json=SCHEMA), ['{"a": 1}'], ["{}"]),
    (outputs(json=json.dumps(SCHEMA)), ['{"a": 1}'], ["{}"]),
    (outputs(json=SCHEMA, disable_any_whitespace=True, disable_fallback=True), ['{"a":1}'], ['{"a": 1}']),
    (outputs(json=SCHEMA, whitespace_pattern="_?"), ['{"a":_1}', '{"a":1}'], ['{"a": 1}']),
    (outputs(json_object=True), ['{"b": null}'], ["1"]),
    (outputs(regex="[ab]{2}c?", json_object=False), ["ab", "bbc"], ["a", "abcc", "xab"]),
    (outputs(regex=r"\d/\w"), ["1/_"], ["\u0661/a", "1/ä"]),
    (
        outputs(choice=["yes", "no way", 'a "quoted" \\ 世界 🌊\n']),
        ["no way", 'a "quoted" \\ 世界 🌊\n'],
        ["no", "yess"],
    ),
    (outputs(grammar='start: "a" B+\nB: /[0-9]/'), ["a12"], ["a", "12"]),
    (outputs(grammar='root ::= "a" ("b" | "c")*'), ["a", "abcb"], ["b"]),
]


@pytest.mark.parametrize(("fields", "good", "bad"), ACCEPTED, ids=lambda value: str(value)[:60])
def test_the_engine_gets_a_grammar(fields: dict[str, Any], good: list[str], bad: list[str]) -> None:
    vocabulary = GrammarVocabulary(ByteTokenizer(), VOCAB, EOS)  # type: ignore[arg-type]
    with serve(chat_template="{{ messages[0].content }}") as server:
        server.complete("a", **fields)
        server.http.post("/v1/chat/completions", json={"messages": [user()], **fields})
        rule, chats = (request.params.grammar for request in server.engine.requests)
    assert rule is not None
    assert rule == chats

    def follows(text: str) -> bool:
        matcher = vocabulary.matcher(rule)
        return bool(matcher.consume_tokens([*text.encode()]) and matcher.is_accepting())

    assert all(map(follows, good))
    assert not any(map(follows, bad))


def test_asking_for_nothing_is_no_constraint() -> None:
    with serve() as server:
        for fields in (form(type="text"), {"response_format": None, "structured_outputs": None}):
            assert server.complete("a", **fields, ignore_eos=True).status_code == 200
        assert [request.params.grammar for request in server.engine.requests] == [None, None]


def test_without_a_tokenizer_text_cannot_be_constrained() -> None:
    with serve(tokenizer=None) as server:
        for fields in (form(type="json_object"), outputs(regex="a"), {"bad_words": ["a"]}):
            response = server.complete([1, 2], **fields)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, next(iter(fields)))
            assert "tokenizer" in error["message"]
        assert server.complete([1, 2], allowed_token_ids=[1], **form(type="text")).status_code == 200


def test_constraints_reach_the_engine() -> None:
    with serve() as server:
        server.complete(
            "a",
            allowed_token_ids=[7, 9, 7],
            bad_words=["ab", " ab", "c"],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
        )
        server.complete("a")
        params, defaults = (request.params for request in server.engine.requests)
    assert params.allowed_token_ids == (7, 9)
    assert set(params.bad_words) == {(97, 98), (32, 97, 98), (99,), (32, 99)}
    assert (params.include_stop_str_in_output, params.skip_special_tokens) == (True, False)
    assert (defaults.allowed_token_ids, defaults.bad_words) == (None, ())
    assert (defaults.include_stop_str_in_output, defaults.skip_special_tokens) == (False, True)


def test_a_legacy_field_says_what_to_use(server: Server) -> None:
    for field in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        assert "structured_outputs" in server.complete(**{field: "a"}).json()["error"]["message"]


def test_nobody_waits_while_a_grammar_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checking, go_on = threading.Event(), threading.Event()

    def check(vocabulary: GrammarVocabulary, rule: str) -> None:
        checking.set()
        assert go_on.wait(30)

    monkeypatch.setattr(GrammarVocabulary, "check", check)
    with serve() as server, ThreadPoolExecutor(1) as threads:
        slow = threads.submit(server.complete, "a", **outputs(regex="slow"))
        try:
            assert checking.wait(30)
            assert server.complete("a").status_code == 200
            assert not slow.done()
        finally:
            go_on.set()
        assert slow.result().status_code == 200


def test_a_grammar_is_bounded_in_size() -> None:
    with serve(max_body_bytes=4_000_000) as server:
        error = server.complete("a", **outputs(regex="a" * 1_100_000)).json()["error"]
    assert error["param"] == "structured_outputs.regex"
    assert "too large" in error["message"]


def test_the_stop_string_is_in_the_text_where_asked_for(chatty: Server) -> None:
    fields = {"prompt": "abc", "stop": ["n"], "max_tokens": 40, "include_stop_str_in_output": True}
    (choice,) = chatty.complete(**fields).json()["choices"]
    without = chatty.complete(**fields | {"include_stop_str_in_output": False}).json()["choices"][0]
    assert choice["text"] == without["text"] + "n"
    assert choice["stop_reason"] == without["stop_reason"] == "n"
    lines = chatty.complete(**fields, stream=True).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
