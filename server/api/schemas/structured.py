"""What the generated text must look like: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from server.api.schemas.base import Body, Ignored, Unsupported

MAX_CHOICES: Final = 10_000


def _json_schema(value: object) -> dict[str, Any] | str | None:
    if value is not None and not isinstance(value, dict | str):
        raise PydanticCustomError("json_schema", "must be a JSON schema, as an object or as its text")
    return value


JsonSchema = Annotated[
    dict[str, Any] | str | None, PlainValidator(_json_schema, json_schema_input_type=dict[str, Any] | str | None)
]

_LEGACY: Final = "; use 'structured_outputs'"


class JsonSchemaFormat(Body):
    """A JSON schema, in the manner of OpenAI."""

    name: str = Field(
        pattern="^[a-zA-Z0-9_-]{1,64}$", description="The format's name; it changes nothing.", examples=["person"]
    )
    description: Ignored = None
    json_schema: dict[str, Any] = Field(
        alias="schema",
        description="The schema. A keyword that cannot be enforced is an error, whatever `strict` says.",
        examples=[{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}],
    )
    strict: bool | None = Field(
        None, description="Changes nothing: every answer is valid against the schema.", examples=[True]
    )


class ResponseFormat(Body):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`text`: anything. `json_object`: a JSON object. `json_schema`: JSON that is "
        "valid against a schema.",
        examples=["json_object"],
    )
    json_schema: JsonSchemaFormat | None = Field(None, description="Only, and necessarily, with `json_schema`.")


class StructuredOutputs(Body):
    """What the text must be: exactly one of `json`, `json_object`, `regex`, `choice` and `grammar`."""

    json_schema: JsonSchema = Field(
        None,
        alias="json",
        description="JSON that is valid against this schema, given as an object or as its text.",
        examples=[{"type": "array", "items": {"type": "integer"}, "maxItems": 3}],
    )
    json_object: bool | None = Field(None, description="A JSON object.", examples=[True])
    regex: str | None = Field(
        None,
        description="A text that matches this regular expression from beginning to end. Syntax: Rust's regex crate, "
        "without look-around and back-references; `\\d` and `\\w` are ASCII.",
        examples=["[0-9]{3}-[0-9]{4}"],
    )
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=MAX_CHOICES, description="One of these texts.", examples=[["yes", "no"]]
    )
    grammar: str | None = Field(
        None,
        description="A text of this grammar, in llguidance's dialect of Lark or in llama.cpp's GBNF.",
        examples=['start: "a" NUMBER\nNUMBER: /[0-9]+/'],
    )
    disable_any_whitespace: bool | None = Field(
        None,
        description="With a JSON schema or object: no white space between its parts. Default false.",
        examples=[True],
    )
    whitespace_pattern: str | None = Field(
        None,
        description="With a JSON schema or object: a regular expression of the white space between its parts. Default: "
        "any that JSON allows.",
        examples=[" ?"],
    )
    disable_fallback: Ignored = None
    disable_additional_properties: Annotated[
        object, Unsupported(False, hint="; say so in the schema, with 'additionalProperties'")
    ] = None
    structural_tag: Annotated[object, Unsupported()] = None


class StructureFields(Body):
    """The fields of a request that say what its text must look like; at most one of them may ask for something."""

    response_format: ResponseFormat | None = Field(
        None,
        description="What the text must look like, in the manner of OpenAI. Not together with `ignore_eos`: the format "
        "decides where the text ends.",
        examples=[{"type": "json_object"}],
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="What the text must look like, in the manner of vLLM. Not together with `ignore_eos`: the format "
        "decides where the text ends.",
        examples=[{"regex": "[0-9]{3}-[0-9]{4}"}, {"choice": ["yes", "no"]}],
    )
    guided_choice: Annotated[object, Unsupported(hint=_LEGACY)] = None
    guided_decoding_backend: Annotated[object, Unsupported(hint=_LEGACY)] = None
    guided_grammar: Annotated[object, Unsupported(hint=_LEGACY)] = None
    guided_json: Annotated[object, Unsupported(hint=_LEGACY)] = None
    guided_regex: Annotated[object, Unsupported(hint=_LEGACY)] = None
    guided_whitespace_pattern: Annotated[object, Unsupported(hint=_LEGACY)] = None
    structural_tag: Annotated[object, Unsupported()] = None
