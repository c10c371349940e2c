"""From what a request says its text must look like to the grammar that the engine follows."""

from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from typing import Final

from server import grammar
from server.api.checks import invalid
from server.api.schemas.structured import ResponseFormat, StructuredOutputs, StructureFields
from server.grammar import GrammarError, GrammarVocabulary
from server.tokenizer import Tokenizer

MAX_GRAMMAR_LENGTH: Final = 1 << 20
"""Characters of a grammar as the engine gets it, mostly those of the request."""

_CACHED: Final = 64


class Grammars:
    """Makes grammars of requests and checks that they can be followed. Safe to use from several threads.

    Args:
        tokenizer: the model's; None: no request may ask for a structure.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._check = lru_cache(_CACHED)(self._complaint)

    def of(self, request: StructureFields) -> str | None:
        """The grammar a request asks for, as :mod:`server.grammar` writes it; None if it asks for none.

        Raises:
            InvalidRequestError: what it asks for contradicts itself, or cannot be followed; ``param`` names the field.
        """
        form, outputs = request.response_format, request.structured_outputs
        if form is not None and form.type == "text":
            _check_format(form)
            form = None
        if form is None and outputs is None:
            return None
        param = "structured_outputs" if form is None else "response_format"
        if form is not None and outputs is not None:
            raise invalid("structured_outputs", "is not possible together with 'response_format'; leave one out")
        if self._tokenizer is None:
            raise invalid(param, "is not possible: this server runs without a tokenizer")
        param, make = _of_format(form) if form is not None else _of_outputs(outputs or StructuredOutputs())
        try:
            rule = make()
        except ValueError as error:
            raise invalid(param, f"cannot be followed: {error}") from None
        if len(rule) > MAX_GRAMMAR_LENGTH:
            raise invalid(param, f"is too large: {len(rule)} characters as a grammar, at most {MAX_GRAMMAR_LENGTH}")
        if complaint := self._check(rule):
            raise invalid(param, f"cannot be followed: {complaint}")
        return rule

    def _complaint(self, rule: str) -> str | None:
        try:
            self._vocabulary.check(rule)
        except GrammarError as error:
            return str(error)
        return None

    @cached_property
    def _vocabulary(self) -> GrammarVocabulary:
        assert self._tokenizer is not None
        return GrammarVocabulary(self._tokenizer, self._tokenizer.vocab_size, self._tokenizer.eos_token_id)


_Source = tuple[str, Callable[[], str]]
"""The field at fault if no grammar can be made, and what makes it; that raises ValueError."""


def _check_format(form: ResponseFormat) -> None:
    if (form.json_schema is not None) != (form.type == "json_schema"):
        missing = form.json_schema is None
        needs = "is required with the type 'json_schema'" if missing else "is only allowed with the type 'json_schema'"
        raise invalid("response_format.json_schema", needs)


def _of_format(form: ResponseFormat) -> _Source:
    _check_format(form)
    if form.json_schema is None:
        return "response_format", partial(grammar.from_json_schema, {"type": "object"})
    return "response_format.json_schema.schema", partial(grammar.from_json_schema, form.json_schema.json_schema)


def _of_outputs(outputs: StructuredOutputs) -> _Source:
    json_schema = {"type": "object"} if outputs.json_object else outputs.json_schema
    kinds = {
        "json": outputs.json_schema is not None,
        "json_object": bool(outputs.json_object),
        "regex": outputs.regex is not None,
        "choice": outputs.choice is not None,
        "grammar": outputs.grammar is not None,
    }
    given = [kind for kind, is_given in kinds.items() if is_given]
    if len(given) != 1:
        *most, last = map(repr, kinds)
        raise invalid("structured_outputs", f"must have exactly one of {', '.join(most)} and {last}")
    param = f"structured_outputs.{given[0]}"
    if json_schema is None:
        for option in ("disable_any_whitespace", "whitespace_pattern"):
            if getattr(outputs, option):
                raise invalid(f"structured_outputs.{option}", "is only allowed with 'json' or 'json_object'")
    if outputs.regex is not None:
        return param, partial(grammar.from_regex, outputs.regex)
    if outputs.choice is not None:
        return param, partial(grammar.from_choices, outputs.choice)
    if outputs.grammar is not None:
        return param, partial(grammar.from_grammar, outputs.grammar)
    assert json_schema is not None
    return param, partial(
        grammar.from_json_schema,
        json_schema,
        any_whitespace=not outputs.disable_any_whitespace,
        whitespace_pattern=outputs.whitespace_pattern,
    )
