"""Grammars: what they accept, what is refused, and that nothing makes the library's failures ours."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import grammar
from server.api.schemas.structured import MAX_CHOICES
from server.grammar import GrammarError, GrammarVocabulary
from server.tokenizer import Tokenizer, load_tokenizer

EOS = 2
VOCAB = 8200
"""Eight tokens more than the tokenizer has."""


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(__file__).parents[2] / "server" / "assets" / "classics-11m")


@cache
def vocabulary() -> GrammarVocabulary:
    return GrammarVocabulary(tokenizer(), VOCAB, EOS)


def allowed(rule: str, text: str, words: GrammarVocabulary | None = None) -> set[int]:
    """The tokens that may follow a text."""
    matcher = (words or vocabulary()).matcher(rule)
    assert matcher.consume_tokens(tokenizer().encode_continuation(text))
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    return {token for token in range(mask.bit_length()) if mask >> token & 1}


def test_the_mask_is_of_whole_tokens() -> None:
    table = tokenizer().token_bytes()
    after = {table[token] for token in allowed(grammar.from_regex("the (old|odd) man"), "the o")}
    assert after == {b"l", b"ld", b"d", b"dd"} & set(table)
    bs = {token for token, data in enumerate(table) if data and not data.strip(b"b")}
    assert allowed(grammar.from_regex("ab*"), "a") == {EOS, *bs}


def test_forced_text_is_taken_in_the_tokenizers_own_tokens() -> None:
    rule = grammar.from_choices([" The old man"])
    matcher = vocabulary().matcher(rule)
    assert matcher.compute_ff_tokens() == tokenizer().encode(" The old man".strip(), add_special_tokens=False)


def test_thousands_of_choices_are_followed_to_the_end() -> None:
    choices = [f"choice {number} of {number * 7919 % 10007}" for number in range(MAX_CHOICES)]
    rule = grammar.from_choices(choices)
    vocabulary().check(rule)
    for choice in (choices[0], choices[4321], choices[-1]):
        matcher = vocabulary().matcher(rule)
        for token in tokenizer().encode_continuation(choice):
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            assert not matcher.is_error(), matcher.get_error()
            assert mask >> token & 1
            matcher.consume_token(token)
        assert matcher.is_accepting()


def test_special_and_missing_tokens_are_no_text() -> None:
    anything = allowed(grammar.from_regex("(?s:.*)"), "")
    table = tokenizer().token_bytes()
    assert anything < {EOS, *(token for token, data in enumerate(table) if data)}, (
        "a rest of a character begins no text"
    )
    assert anything > {EOS, *(token for token, data in enumerate(table) if data.isascii() and data)}


def test_a_model_without_end_of_sequence() -> None:
    words = GrammarVocabulary(tokenizer(), VOCAB, None)
    after = allowed(grammar.from_regex("ab?"), "a", words)
    assert VOCAB in after, "the end is an id that no token has"
    assert EOS not in after


def test_a_grammar_may_name_special_tokens() -> None:
    assert allowed(grammar.from_grammar('start: <s> "a"'), "") == {1}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (grammar.from_regex("a("), "unclosed"),
        (grammar.from_regex("(?=a)"), "look-around"),
        (grammar.from_json_schema({"type": "strange"}), "strange"),
        (grammar.from_json_schema({"uniqueItems": True}), "uniqueItems"),
        (grammar.from_json_schema({"$ref": "https://example.com/x"}), "example.com"),
        (grammar.from_grammar("start: nothing"), "nothing"),
        (grammar.from_grammar("start: <nothing>"), "nothing"),
        # Valid, but beyond the library's limits at the first token.
        (grammar.from_grammar("start: X\nX: /[a-z]{0,300}/ & ~/.*foo.*/ & ~/.*bar.*/"), "too many expressions"),
    ],
)
def test_refused_in_one_line_that_says_why(rule: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words) as refused:
        vocabulary().check(rule)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250


def test_what_is_no_schema_or_grammar_at_all_is_refused() -> None:
    for make, text in ((grammar.from_json_schema, "{"), (grammar.from_grammar, "SELECT 1")):
        with pytest.raises(GrammarError):
            make(text)


letters = st.text('ab()[]{}*+?|\\^$.-0123:=pd/\n "~&%<>', max_size=25)
keywords = st.sampled_from(
    ["type", "properties", "items", "enum", "const", "pattern", "anyOf", "oneOf", "allOf", "$ref", "required"]
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | letters | keywords,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters | keywords, inner, max_size=4),
    max_leaves=12,
)


@given(text=letters | st.text(max_size=20), value=values)
@settings(max_examples=100, deadline=None)
def test_whatever_is_asked_for_is_followed_or_refused(text: str, value: Any) -> None:
    sources = [
        lambda: grammar.from_regex(text),
        lambda: grammar.from_grammar(text),
        lambda: grammar.from_grammar("start: " + text),
        lambda: grammar.from_choices([text or "a", "b"]),
        lambda: grammar.from_json_schema(value if isinstance(value, dict) else json.dumps(value)),
        lambda: grammar.from_json_schema({}, whitespace_pattern=text),
    ]
    for source in sources:
        try:
            rule = source()
            vocabulary().check(rule)
        except GrammarError as error:
            assert str(error)
        else:
            assert not vocabulary().matcher(rule).is_error()


def test_needs_neither_torch_nor_numpy() -> None:
    script = "import sys, server.grammar; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
