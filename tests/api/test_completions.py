"""The forms of answers: whole and streamed, text, token ids, log-probabilities, usage."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from server.api.deltas import TokenNames
from server.api.schemas.completion import Completion
from server.tokenizer import load_tokenizer
from tests.api.scripted import (
    ALIAS,
    BOS,
    INFO,
    SCRIPT,
    VOCAB,
    ByteTokenizer,
    ScriptedEngine,
    Server,
    script_text,
    script_tokens,
    serve,
)
from tests.engine.driving import CLASSICS


def stream(server: Server, **fields: Any) -> tuple[list[dict[str, Any]], str]:
    """All chunks of a stream, checked for form, and the raw text."""
    response = server.complete(stream=True, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *lines, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(line.startswith("data: {") and "\n" not in line for line in lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    for chunk in chunks:
        Completion.model_validate(chunk)
        assert chunk["object"] == "text_completion"
        assert chunk["model"] == "scripted"
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    return chunks, response.text


def gather(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the chunks add up to, by choice."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {"text": "", "token_ids": [], "logprobs": None})
            assert choice.get("finish_reason") is None, "nothing follows the end"
            choice["text"] += piece["text"]
            choice["token_ids"] += piece.get("token_ids") or []
            choice["finish_reason"] = piece["finish_reason"]
            choice["stop_reason"] = piece.get("stop_reason")
            if "prompt_token_ids" in piece:
                assert "prompt_token_ids" not in choice
                choice["prompt_token_ids"] = piece["prompt_token_ids"]
            if piece["logprobs"] is not None:
                merged = choice["logprobs"] = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
                for name, values in piece["logprobs"].items():
                    merged[name] += values
    return choices


def test_whole_answer(server: Server) -> None:
    response = server.complete("abc", max_tokens=20)
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    Completion.model_validate(body)
    assert list(body) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert body["system_fingerprint"] == INFO.fingerprint
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {
            "index": 0,
            "text": script_text(4, 0, 20),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 20,
        "total_tokens": 24,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_sixteen_tokens_by_default(server: Server) -> None:
    assert server.complete().json()["usage"]["completion_tokens"] == 16
    assert server.complete(max_tokens=None).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ("abc", [4]),
        (["abc"], [4]),
        (["a", "bcd"], [2, 4]),
        ([5, 6, 7], [3]),
        ([[5], [6, 7]], [1, 2]),
    ],
)
def test_every_form_of_prompt(server: Server, prompt: Any, lengths: list[int]) -> None:
    body = server.complete(prompt, n=2).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(lengths)))
    expected = [script_text(length, choice, 16) for length in lengths for choice in range(2)]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert body["usage"] == {
        "prompt_tokens": sum(lengths),
        "completion_tokens": 32 * len(lengths),
        "total_tokens": sum(lengths) + 32 * len(lengths),
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    chunks, _ = stream(server, prompt=prompt, n=2)
    assert [choice["text"] for _, choice in sorted(gather(chunks).items())] == expected


def test_stream_adds_up_to_the_whole_answer(server: Server) -> None:
    """For random requests, character by character and field by field."""
    rng = random.Random(0)
    for _ in range(40):
        fields: dict[str, Any] = {
            "prompt": ["x" * rng.randrange(1, 40) for _ in range(rng.randrange(1, 3))],
            "max_tokens": rng.randrange(1, 60),
            "n": rng.randrange(1, 4),
            "stop": rng.choice([None, "世", "was 🌊", ["naï", "nd"], "界!"]),
            "stop_token_ids": rng.choice([None, [0x87], [33]]),
            "return_token_ids": rng.random() < 0.5,
            **rng.choice([{"echo": True}, {"echo": True, "max_tokens": 0}, {}, {}]),
            **rng.choice([{"logprobs": rng.randrange(6)}, {}]),
        }
        whole = server.complete(**fields).json()
        chunks, _ = stream(server, stream_options={"include_usage": True}, **fields)
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
        pieces = gather(chunks)
        for choice in whole["choices"]:
            piece = pieces[choice["index"]]
            for name in ("text", "finish_reason", "stop_reason", "logprobs"):
                assert piece[name] == choice[name], name
            if fields["return_token_ids"]:
                assert piece["token_ids"] == choice["token_ids"]
                assert piece["prompt_token_ids"] == choice["prompt_token_ids"]


def test_usage_says_what_was_cached_of_each_prompt() -> None:
    """Once per prompt, whatever n is, whole and streamed."""
    with serve(ScriptedEngine(cached_tokens=2)) as server:
        fields: dict[str, Any] = {"prompt": ["abc", "de"], "n": 3, "max_tokens": 4}
        usage = server.complete(**fields).json()["usage"]
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (7, {"cached_tokens": 4})
        chunks, _ = stream(server, stream_options={"include_usage": True}, **fields)
        assert chunks[-1]["usage"] == usage


def test_priority_reaches_the_engine(server: Server) -> None:
    for given, expected in ((None, 0), (0, 0), (-7, -7), (2**40, 2**40)):
        server.complete(priority=given)
        assert server.engine.requests[-1].priority == expected


def test_no_empty_choices_unless_usage_was_asked_for(server: Server) -> None:
    for options in (None, {}, {"include_usage": False}):
        chunks, text = stream(server, stream_options=options)
        assert all(len(chunk["choices"]) == 1 for chunk in chunks)
        assert all("usage" not in chunk for chunk in chunks)
        assert not any(line.startswith(":") for line in text.split("\n")), "no comments"


def test_chunks_tell_something(server: Server) -> None:
    """An incomplete character, or what may become a stop string, makes no chunk."""
    chunks, _ = stream(server, prompt="abc", max_tokens=len(SCRIPT), stop=["It wasn't"])
    assert all(chunk["choices"][0]["text"] or chunk["choices"][0]["finish_reason"] for chunk in chunks)
    assert all("\ufffd" not in chunk["choices"][0]["text"] for chunk in chunks)
    with_ids, _ = stream(server, prompt="abc", max_tokens=len(SCRIPT), stop=["It wasn't"], return_token_ids=True)
    assert any(not chunk["choices"][0]["text"] and chunk["choices"][0]["token_ids"] for chunk in with_ids)


def test_character_cut_by_the_end_becomes_a_replacement(server: Server) -> None:
    # The prompt's length puts the first token on the first byte of a character of three bytes.
    start = SCRIPT.index("世".encode())
    prompt = [1] * start
    assert server.complete(prompt, max_tokens=2).json()["choices"][0]["text"] == "\ufffd"
    chunks, _ = stream(server, prompt=prompt, max_tokens=2)
    assert gather(chunks)[0]["text"] == "\ufffd"
    assert server.complete(prompt, max_tokens=3).json()["choices"][0]["text"] == "世"


def test_stop_string(server: Server) -> None:
    (choice,) = server.complete("abc", max_tokens=60, stop=["It"]).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "It"
    assert choice["text"] == script_text(4, 0, 60).partition("It")[0]


def test_stop_token_id(server: Server) -> None:
    (choice,) = server.complete("abc", max_tokens=60, stop_token_ids=[ord("!")]).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ord("!"))
    assert choice["text"] == script_text(4, 0, 60).partition("!")[0]


def test_echo(server: Server) -> None:
    body = server.complete(["ab", "ü"], echo=True, n=2, max_tokens=5).json()
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == ["ab" + script_text(3, j, 5) for j in range(2)] + ["ü" + script_text(3, j, 5) for j in range(2)]
    assert body["usage"]["completion_tokens"] == 20
    (choice,) = server.complete([BOS, *b"hi"], echo=True, max_tokens=5).json()["choices"]
    assert choice["text"] == "hi" + script_text(3, 0, 5)
    # Ids of the model beyond the tokenizer's have no text.
    (choice,) = server.complete([*b"hi", VOCAB - 1], echo=True, max_tokens=5, logprobs=None).json()["choices"]
    assert choice["text"] == "hi" + script_text(3, 0, 5)


def test_echo_streams_the_prompt_before_the_first_token() -> None:
    with serve(ScriptedEngine(paused=True)) as server:
        fields = {"prompt": "Once", "echo": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=fields) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == "Once"
            server.engine.paused = False
            assert list(lines)[-2] == "data: [DONE]"


def test_token_ids(server: Server) -> None:
    body = server.complete(["ab", "c"], n=2, max_tokens=5, return_token_ids=True).json()
    assert [choice["token_ids"] for choice in body["choices"]] == [
        script_tokens(length, choice, 5) for length in (3, 2) for choice in range(2)
    ]
    prompts = [[BOS, *b"ab"]] * 2 + [[BOS, *b"c"]] * 2
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == prompts


def test_without_a_tokenizer_the_ids_are_the_answer() -> None:
    with serve(tokenizer=None) as server:
        (choice,) = server.complete([1, 2, 3], max_tokens=5, logprobs=1).json()["choices"]
        assert choice["token_ids"] == script_tokens(3, 0, 5)
        assert "prompt_token_ids" not in choice
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in script_tokens(3, 0, 5)]
        chunks, _ = stream(server, prompt=[1, 2, 3], max_tokens=5)
        assert gather(chunks)[0]["token_ids"] == script_tokens(3, 0, 5)


def test_logprobs(server: Server) -> None:
    start = SCRIPT.index("世".encode()) - 1
    (choice,) = server.complete([1] * start, max_tokens=5, logprobs=3).json()["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == " 世界"[:2] + "\ufffd"
    assert logprobs["tokens"] == [" ", "bytes:\\xe4", "bytes:\\xb8", "bytes:\\x96", "bytes:\\xe7"]
    assert logprobs["token_logprobs"] == [-1.0] * 5
    # A token within a character begins where the character does.
    assert logprobs["text_offset"] == [0, 1, 1, 1, 2]
    assert logprobs["top_logprobs"][0] == {"aß": -0.5, " ": -1.0, "bytes:\\xe2": -9999.0}
    assert len(logprobs["top_logprobs"]) == 5


@pytest.mark.parametrize(("number", "expected"), [(0, ["G"]), (1, ["aß", "G"]), (2, ["aß", "G"])])
def test_top_logprobs_hold_the_sampled_token(server: Server, number: int, expected: list[str]) -> None:
    assert ALIAS > 255
    prompt = [1] * len(SCRIPT)
    (choice,) = server.complete(prompt, max_tokens=1, logprobs=number).json()["choices"]
    assert list(choice["logprobs"]["top_logprobs"][0]) == expected


def test_echoed_logprobs(server: Server) -> None:
    """The prompt's lists come first; offsets are those of the whole text; the first token has none."""
    prompt = [BOS, *"aß".encode(), ALIAS, ord("!")]
    fields: dict[str, Any] = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 3}
    (choice,) = server.complete(**fields).json()["choices"]
    assert choice["text"] == "aßaß!" + script_text(6, 0, 3)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<s>", "a", "bytes:\\xc3", "bytes:\\x9f", "aß", "!", *script_text(6, 0, 3)]
    assert logprobs["token_logprobs"] == [None, -0.125, -0.25, -0.375, -0.5, -0.625, -1.0, -1.0, -1.0]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 2, 4, 5, 6, 7]
    assert logprobs["top_logprobs"][:3] == [None, {"aß": -0.5, "a": -0.125}, {"aß": -0.5, "bytes:\\xc3": -0.25}]
    assert len(logprobs["top_logprobs"]) == 9
    assert "prompt_logprobs" not in choice
    alone = server.complete(**fields | {"max_tokens": 0}).json()
    (choice,) = alone["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("aßaß!", "length")
    assert choice["logprobs"] == {name: values[:6] for name, values in logprobs.items()}
    assert alone["usage"]["completion_tokens"] == 0
    for n in (1, 3):
        chunks, _ = stream(server, **fields | {"n": n})
        assert [gather(chunks)[index]["logprobs"]["tokens"][:6] for index in range(n)] == [logprobs["tokens"][:6]] * n


def test_echoed_offsets_of_a_tokenizer_that_puts_a_space_before_a_text() -> None:
    class Spaced(ByteTokenizer):
        def encode(self, text: str, **options: bool) -> list[int]:
            return super().encode(" " + text, **options)

        def decode(self, token_ids: Sequence[int]) -> str:
            return super().decode(token_ids).removeprefix(" ")

    with serve(tokenizer=Spaced) as server:
        for prompt in ("ab", [BOS, *b" ab"]):
            (choice,) = server.complete(prompt, echo=True, logprobs=0, max_tokens=1).json()["choices"]
            assert choice["text"] == "ab" + script_text(4, 0, 1)
            assert choice["logprobs"]["tokens"][:4] == ["<s>", " ", "a", "b"]
            assert choice["logprobs"]["text_offset"] == [0, 0, 0, 1, 2]


def test_prompt_logprobs(server: Server) -> None:
    prompts = [[5], [BOS, ord("a"), ALIAS, 0xC3]]
    body = server.complete(prompts, n=2, prompt_logprobs=2, max_tokens=0).json()
    assert [choice["text"] for choice in body["choices"]] == [""] * 4
    assert body["usage"]["prompt_tokens"] == 5
    assert [choice["logprobs"] for choice in body["choices"]] == [None] * 4
    assert body["choices"][0]["prompt_logprobs"] == body["choices"][1]["prompt_logprobs"] == [None]
    expected = [
        None,
        {
            "97": {"logprob": -0.125, "rank": 2, "decoded_token": "a"},
            "258": {"logprob": -0.5, "rank": 1, "decoded_token": "aß"},
        },
        {
            "258": {"logprob": -0.25, "rank": 3, "decoded_token": "aß"},
        },
        {
            "195": {"logprob": -0.375, "rank": 4, "decoded_token": "\ufffd"},
            "258": {"logprob": -0.5, "rank": 1, "decoded_token": "aß"},
        },
    ]
    assert body["choices"][2]["prompt_logprobs"] == body["choices"][3]["prompt_logprobs"] == expected
    # Both ways at once, each with its own number of alternatives.
    (choice,) = server.complete(prompts[1], prompt_logprobs=0, echo=True, logprobs=5, max_tokens=2).json()["choices"]
    assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [1, 1, 1]
    assert choice["logprobs"]["top_logprobs"][1] == {"aß": -0.5, "a": -0.125, "A": -20.0, "B": -21.0, "C": -9999.0}
    assert server.engine.requests[-1].params.prompt_logprobs == 5


def test_more_logprobs_than_an_answer_can_hold_are_refused(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr("server.api.validation.MAX_PROMPT_LOGPROBS", 120)
    prompts = [[1] * 7, [2] * 3]
    for fields, param in (
        ({"prompt_logprobs": 1, "n": 6}, None),
        ({"prompt_logprobs": 1, "n": 7}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 5, "prompt_logprobs": 5}, None),
        ({"echo": True, "logprobs": 5, "prompt_logprobs": 5, "n": 2}, "logprobs"),
        ({"logprobs": 5, "n": 3, "max_tokens": 40}, None),
    ):
        response = server.complete(prompts, **fields)
        assert response.status_code == (400 if param else 200)
        assert param is None or response.json()["error"]["param"] == param


def test_long_prompts_with_logprobs(server: Server) -> None:
    """So many that they are written in a thread."""
    prompt = [65] * 1999
    (choice,) = server.complete(prompt, echo=True, logprobs=1, max_tokens=1, prompt_logprobs=3).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, *(-i / 8 for i in range(1, 1999)), -1.0]
    assert len(choice["prompt_logprobs"]) == 1999
    chunks, _ = stream(server, prompt=[prompt, [66] * 50], n=2, echo=True, logprobs=1, max_tokens=1)
    assert gather(chunks)[0]["logprobs"] == choice["logprobs"]
    assert gather(chunks)[1]["logprobs"]["top_logprobs"][:1999] == choice["logprobs"]["top_logprobs"][:1999]
    assert gather(chunks)[3]["logprobs"]["tokens"][:50] == ["B"] * 50
    server.complete([65] * 2000, echo=True, max_tokens=0).raise_for_status()


def test_only_the_prompt(server: Server) -> None:
    for fields in ({"echo": True}, {"echo": True, "stream": True}):
        response = server.complete(["ab", "ü"], max_tokens=0, n=2, **fields)
        assert response.status_code == 200
        assert server.engine.requests[-1].params.max_tokens == 0
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    assert {index: choice["text"] for index, choice in gather(chunks).items()} == {0: "ab", 1: "ab", 2: "ü", 3: "ü"}
    assert all(choice["finish_reason"] == "length" for choice in gather(chunks).values())


def test_best_of_returns_the_likeliest_candidates() -> None:
    # Candidates 0 to 3 are those of the first prompt.
    likely = {0: -3.0, 1: -1.0, 2: -2.0, 3: -1.5, 4: -0.1, 5: -0.3, 6: -0.2, 7: -0.4}
    with serve(ScriptedEngine(logprob_of_choice=likely)) as server:
        fields: dict[str, Any] = {"prompt": ["abc", "de"], "n": 2, "best_of": 4, "max_tokens": 6}
        body = server.complete(**fields).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        texts = [script_text(4, 1, 6), script_text(4, 3, 6), script_text(3, 0, 6), script_text(3, 2, 6)]
        assert [choice["text"] for choice in body["choices"]] == texts
        assert [choice["logprobs"] for choice in body["choices"]] == [None] * 4
        assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (7, 48)
        body = server.complete(**fields, logprobs=1, echo=True).json()
        assert [choice["logprobs"]["token_logprobs"][-1] for choice in body["choices"]] == [-1.0, -1.5, -0.1, -0.2]
        assert [choice["text"][:3] for choice in body["choices"]] == ["abc", "abc", *(f"de{t[0]}" for t in texts[2:])]
        # A candidate without a token is the last to be taken.
        server.engine.dead_ends = {1, 2, 3}
        body = server.complete(**fields).json()
        assert [choice["text"] for choice in body["choices"]] == [script_text(4, 0, 6), "", *texts[2:]]
        server.engine.dead_ends = set()
        # All of them: in the order in which they were asked for.
        body = server.complete(**fields | {"n": 4}).json()
        assert [choice["text"] for choice in body["choices"][:4]] == [script_text(4, j, 6) for j in range(4)]


def test_no_logprobs_unless_asked_for(server: Server) -> None:
    assert server.complete().json()["choices"][0]["logprobs"] is None


def test_special_tokens_have_names_and_no_text() -> None:
    tokenizer = load_tokenizer(CLASSICS)
    names = TokenNames.of(tokenizer)
    assert [(names.text(token), names.bytes(token)) for token in (1, 2)] == [("<s>", b""), ("</s>", b"")]
    assert (names.text(9000), names.bytes(9000)) == ("", b""), "beyond the tokenizer's vocabulary"


def test_tokens_as_ids(server: Server) -> None:
    start = SCRIPT.index("世".encode()) - 1
    fields: dict[str, Any] = {"prompt": [1] * start, "max_tokens": 5, "logprobs": 2}
    plain = server.complete(**fields).json()["choices"][0]["logprobs"]
    (choice,) = server.complete(**fields, return_tokens_as_token_ids=True).json()["choices"]
    logprobs = choice["logprobs"]
    ids = script_tokens(start, 0, 5)
    assert logprobs["tokens"] == [f"token_id:{token}" for token in ids]
    assert [list(top) for top in logprobs["top_logprobs"]] == [[f"token_id:{ALIAS}", f"token_id:{i}"] for i in ids]
    assert (logprobs["text_offset"], logprobs["token_logprobs"]) == (plain["text_offset"], plain["token_logprobs"])


def test_prompts_are_truncated_from_the_left(server: Server) -> None:
    def prompts(**fields: Any) -> list[list[int]]:
        body = server.complete(**{"max_tokens": 1, "return_token_ids": True, **fields}).json()
        return [choice["prompt_token_ids"] for choice in body["choices"]]

    assert prompts(prompt=["abc", "d"], truncate_prompt_tokens=2) == [[*b"bc"], [BOS, *b"d"]]
    assert prompts(prompt=[1, 2, 3], truncate_prompt_tokens=1) == [[3]]
    assert prompts(prompt=[1, 2, 3], truncate_prompt_tokens=2**31 - 1) == [[1, 2, 3]]
    assert prompts(prompt=[5] * 1999 + [6], truncate_prompt_tokens=-1, max_tokens=100) == [[5] * 1899 + [6]]
    assert prompts(prompt=[5] * 5000 + [6], truncate_prompt_tokens=-1, max_tokens=9999) == [[6]]
    body = server.complete(["xüab", "c"], echo=True, truncate_prompt_tokens=3, max_tokens=5).json()
    assert [choice["text"] for choice in body["choices"]] == [
        "\ufffdab" + script_text(3, 0, 5),
        "c" + script_text(2, 0, 5),
    ]
    assert body["usage"]["prompt_tokens"] == 5


def test_special_tokens_are_added_to_texts_unless_told_not_to(server: Server) -> None:
    for flag, ids in ((True, [BOS, *b"ab"]), (None, [BOS, *b"ab"]), (False, [*b"ab"])):
        fields = {"add_special_tokens": flag, "return_token_ids": True, "max_tokens": 1}
        assert server.complete("ab", **fields).json()["choices"][0]["prompt_token_ids"] == ids
        assert server.complete([7], **fields).json()["choices"][0]["prompt_token_ids"] == [7]


def test_continuous_usage(server: Server) -> None:
    fields: dict[str, Any] = {"prompt": ["a", "bcd"], "n": 2, "max_tokens": 6, "echo": True}
    chunks, _ = stream(server, stream_options={"include_usage": True, "continuous_usage_stats": True}, **fields)
    seen: dict[int, list[int]] = {}
    for chunk in chunks[:-1]:
        index, usage = chunk["choices"][0]["index"], chunk["usage"]
        assert usage["prompt_tokens"] == (2, 4)[index // 2]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        seen.setdefault(index, []).append(usage["completion_tokens"])
    assert all(counts[0] == 0 and counts == sorted(counts) and counts[-1] == 6 for counts in seen.values())
    assert chunks[-1]["usage"] == server.complete(**fields).json()["usage"]
    chunks, _ = stream(server, stream_options={"continuous_usage_stats": True}, **fields)
    assert all(len(chunk["choices"]) == 1 and chunk["usage"] for chunk in chunks), "no chunk that nobody asked for"


def test_large_prompts_take_the_same_way(server: Server) -> None:
    """Bodies beyond the size from which on they are prepared in a thread."""
    prompts = [[1] * 1900 for _ in range(8)]
    body = server.complete(prompts, max_tokens=2).json()
    assert [choice["text"] for choice in body["choices"]] == [script_text(1900, 0, 2)] * 8
    response = server.complete([*prompts, [300]])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
