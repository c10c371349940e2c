"""Grammars that generated text must follow: built from what requests say, checked, and matched token by token.

llguidance does the work (https://github.com/guidance-ai/llguidance); this module is the one place that knows its
functions. API processes check grammars with the same vocabulary and limits with which the engine follows them, so what
passes here can be followed there. Torch-free.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llguidance import LLMatcher, LLTokenizer, grammar_from, regex_to_lark

from server.tokenizer import Tokenizer

MAX_ERROR_LENGTH = 200


class GrammarError(ValueError):
    """A schema, regular expression or grammar that cannot be followed; the message says why."""


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int | None) -> None:
        plain, named = tokenizer.token_bytes(), tokenizer.token_bytes(special=True)
        # A model's vocabulary may be padded beyond the tokenizer's, or cut.
        self.tokens = named[:vocab_size] + [b""] * (vocab_size - len(named))
        # They are no part of any text; a grammar can name them, as <name>.
        self.special_token_ids = [token for token, name in enumerate(self.tokens) if name and not plain[token]]
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self._encode = tokenizer.encode_continuation

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class GrammarVocabulary:
    """A model's tokens as grammars see them. Takes some 15 ms per 10,000 tokens to build.

    Args:
        tokenizer: whose bytes the tokens stand for.
        vocab_size: of the model.
        eos_token_id: which a grammar allows where its text is complete; None: it allows the id ``vocab_size`` there,
            which no token has.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int | None) -> None:
        self._tokenizer = LLTokenizer(_Vocabulary(tokenizer, vocab_size, eos_token_id))  # type: ignore[arg-type]

    def check(self, grammar: str) -> None:
        """Raise GrammarError unless the grammar can be followed, at least to its first token.

        It takes milliseconds, of the worst grammars seconds, in which other threads can run.

        Args:
            grammar: made by one of this module's functions.
        """
        try:
            failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
            if failed:
                raise GrammarError(_one_line(messages[0]))
            # Some limits of size are met only here.
            matcher = self.matcher(grammar)
            matcher.compute_bitmask()
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Rust's; it has no name that could be imported
                raise
            raise GrammarError(_one_line(f"llguidance fails on it: {error}")) from None
        if matcher.is_error():
            raise GrammarError(_one_line(matcher.get_error().partition("\n")[0]))

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the grammar's beginning. It raises nothing: what is wrong with it, it says when asked."""
        return LLMatcher(self._tokenizer, grammar, log_level=0)


def from_json_schema(
    schema: str | Mapping[str, Any], *, any_whitespace: bool = True, whitespace_pattern: str | None = None
) -> str:
    """The grammar of JSON texts that are valid against a schema.

    Args:
        schema: the schema, or its text.
        any_whitespace: whether white space may stand wherever JSON allows it; else it may nowhere.
        whitespace_pattern: regular expression of the white space that may stand there.

    Raises:
        GrammarError: the schema is no JSON.
    """
    options: dict[str, Any] = {"whitespace_flexible": any_whitespace}
    if whitespace_pattern is not None:
        options["whitespace_pattern"] = whitespace_pattern
    try:
        return LLMatcher.grammar_from_json_schema(schema if isinstance(schema, str) else dict(schema), options)  # type: ignore[arg-type]
    except ValueError as error:
        raise GrammarError(_one_line(str(error))) from None


def from_regex(pattern: str) -> str:
    r"""The grammar of texts that match a regular expression from beginning to end.

    The syntax is that of Rust's regex crate, without look-around and back-references; \d and \w are ASCII, as in
    JavaScript and JSON Schema.
    """
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(pattern, 'dw')}/")


def from_choices(choices: Iterable[str]) -> str:
    """The grammar of a few given texts; none of them empty."""
    # One terminal of them all: as rules, more than some 2000 are too many for the parser.
    return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in choices))


def from_grammar(text: str) -> str:
    """A grammar in llguidance's dialect of Lark, or in llama.cpp's GBNF.

    Raises:
        GrammarError: it is neither.
    """
    try:
        return grammar_from("grammar", text)
    except ValueError as error:
        raise GrammarError(_one_line(str(error))) from None


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= MAX_ERROR_LENGTH else f"{line[:MAX_ERROR_LENGTH]}..."
