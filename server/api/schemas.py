"""The JSON of the OpenAI-style API: what a request may hold and what an answer holds.

Types are strict (``true`` is not 1, ``"1"`` is not 1) and unknown fields are errors. ``null`` means
"not given" everywhere. Bounds that depend on the model or the server's limits (vocabulary, context
length, number of log-probabilities) are checked in ``server.api.validation``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

MAX_STOP_STRINGS: Final = 32
MAX_STOP_LENGTH: Final = 512
MAX_STOP_TOKEN_IDS: Final = 256
MAX_COUNT: Final = 2**31 - 1
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1

HARMLESS_FIELDS: Final = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "store"})
"""Fields that say nothing about the answer: accepted with any value, and ignored."""

NEUTRAL_VALUES: Final[Mapping[str, tuple[object, ...]]] = {
    "suffix": ("",),
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1.0,),
    "use_beam_search": (False,),
}
"""Unsupported fields of OpenAI, vLLM and SGLang, with the values (beside null) that ask for nothing."""

NEUTRAL_STREAM_OPTIONS: Final[Mapping[str, tuple[object, ...]]] = {
    "continuous_usage_stats": (False,),
    "include_obfuscation": (False,),
}


def _is_int(value: object) -> bool:
    return type(value) is int


def _prompt(value: object) -> list[str] | list[list[int]]:
    """All four forms of a prompt as a list of texts or a list of token id lists."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise PydanticCustomError("prompt", "must be a string, a list of strings or (lists of) token ids")
    if not value:
        raise PydanticCustomError("prompt", "must not be empty")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    if kinds == {str}:
        if "" in value:
            raise PydanticCustomError("prompt", "must not hold an empty string")
        return value
    if kinds == {list}:
        if not all(value):
            raise PydanticCustomError("prompt", "must not hold an empty list")
        if set().union(*(map(type, ids) for ids in value)) == {int}:
            return value
    raise PydanticCustomError("prompt", "must hold only strings, only token ids, or only lists of token ids")


def _stop(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(value) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", f"must hold at most {MAX_STOP_STRINGS} strings")
    if "" in value:
        raise PydanticCustomError("stop", "must not hold an empty string")
    if any(len(item) > MAX_STOP_LENGTH for item in value):
        raise PydanticCustomError("stop", f"must hold strings of at most {MAX_STOP_LENGTH} characters")
    return tuple(value)


def _stop_token_ids(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(map(_is_int, value)):
        raise PydanticCustomError("stop_token_ids", "must be a list of token ids")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise PydanticCustomError("stop_token_ids", f"must hold at most {MAX_STOP_TOKEN_IDS} token ids")
    return tuple(value)


def _logit_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must be an object of token ids and numbers")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # One spelling per id, so that no entry can silently replace another.
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
            raise PydanticCustomError("logit_bias", "must have token ids as keys, in plain decimal digits")
        if type(bias) not in (int, float) or not -100 <= bias <= 100 or math.isnan(bias):
            raise PydanticCustomError("logit_bias", "must have numbers between -100 and 100 as values")
        biases[int(key)] = float(bias)
    return biases


Prompt = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Stop = Annotated[tuple[str, ...] | None, PlainValidator(_stop, json_schema_input_type=str | list[str] | None)]
StopTokenIds = Annotated[
    tuple[int, ...] | None, PlainValidator(_stop_token_ids, json_schema_input_type=list[int] | None)
]
LogitBias = Annotated[
    dict[int, float] | None, PlainValidator(_logit_bias, json_schema_input_type=dict[str, float] | None)
]


def _describe_tolerated(neutral: Mapping[str, tuple[object, ...]], harmless: Sequence[str]) -> Any:
    """A hook that adds the tolerated fields to a model's JSON schema, which is otherwise closed."""

    def extend(schema: dict[str, Any]) -> None:
        properties = schema.setdefault("properties", {})
        for name in harmless:
            properties[name] = {"title": name, "description": "Accepted and ignored."}
        for name, values in neutral.items():
            properties[name] = {
                "title": name,
                "enum": [None, *values],
                "description": "Not supported: only values that ask for nothing are accepted.",
            }

    return extend


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, json_schema_extra=_describe_tolerated(NEUTRAL_STREAM_OPTIONS, ())
    )

    include_usage: bool | None = Field(
        None, description="End the stream with a chunk that has empty `choices` and the `usage` of the whole request."
    )


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`. A field that is null counts as not given."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        json_schema_extra=_describe_tolerated(NEUTRAL_VALUES, sorted(HARMLESS_FIELDS)),
    )

    model: str | None = Field(
        None, description="One of the served model's names; not given: the first.", examples=["classics-11m"]
    )
    prompt: Prompt = Field(
        description="A text, a list of texts, a list of token ids, or a list of such lists. None may be empty. Texts "
        "get the tokenizer's special tokens (such as beginning of sequence), token ids are taken as they are.",
        examples=["The old man looked at the sea and"],
    )
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="Most tokens to generate per choice. Default 16.", examples=[64]
    )
    min_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        description="No stop string, stop token or end of sequence ends a choice before so many tokens. Default 0.",
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="Divides the logits; 0 (or below 0.00001) always takes the most likely token. Default: what the "
        "model's generation_config.json says, else 1.",
        examples=[0.8],
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Sample from the smallest set of most likely tokens whose probabilities add up to this. Default: "
        "the model's, else 1.",
        examples=[0.95],
    )
    top_k: int | None = Field(
        None, ge=-1, description="Sample from so many most likely tokens; 0 or -1: all. Default: the model's, else all."
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Leave out tokens less likely than this share of the most likely one's probability. Default: the "
        "model's, else 0.",
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, allow_inf_nan=False, description="Subtracted from the logits of tokens generated already."
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        allow_inf_nan=False,
        description="Subtracted from a token's logit for every time it was generated already.",
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=100,
        allow_inf_nan=False,
        description="Above 1 makes tokens of the prompt and of the text so far less likely: positive logits are "
        "divided by it, negative ones multiplied. Default: the model's, else 1.",
    )
    logit_bias: LogitBias = Field(
        None,
        description="Added to the logits of tokens, by token id; values between -100 and 100.",
        examples=[{"42": -100}],
    )
    seed: int | None = Field(
        None, ge=INT64_MIN, le=INT64_MAX, description="The same seed gives the same choices, whatever else is running."
    )
    stop: Stop = Field(
        None,
        description=f"Up to {MAX_STOP_STRINGS} strings that end a choice; the text returned ends before the string.",
        examples=[["\n\n"]],
    )
    stop_token_ids: StopTokenIds = Field(
        None, description=f"Up to {MAX_STOP_TOKEN_IDS} token ids that end a choice; their text is not returned."
    )
    ignore_eos: bool | None = Field(None, description="Go on after an end-of-sequence token. Default false.")
    logprobs: int | None = Field(
        None,
        ge=0,
        description="Report the log-probability of every token, and of so many most likely alternatives at its "
        "position, up to the server's `--max-logprobs`.",
    )
    n: int | None = Field(None, ge=1, description="Choices per prompt. Default 1.")
    best_of: int | None = Field(
        None, ge=1, description="Only the value of `n` is accepted: all candidates are returned."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events, ended by `data: [DONE]`.")
    stream_options: StreamOptions | None = Field(None, description="Only together with `stream`.")
    echo: bool | None = Field(
        None, description="Begin each choice's text with its prompt. Not together with `logprobs` yet."
    )
    return_token_ids: bool | None = Field(
        None, description="Add `prompt_token_ids` and `token_ids` to each choice. Default false."
    )


class Logprobs(BaseModel):
    """Log-probabilities (natural logarithm) of a choice's tokens; the lists are parallel.

    A token whose bytes are no UTF-8 text of their own is written as `bytes:\\xe2\\x80`.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(
        description="The most likely tokens at each position, and the sampled one."
    )
    text_offset: list[int] = Field(description="Where each token begins, in characters of the choice's text.")


class Choice(BaseModel):
    """One generated text, or a piece of it in a stream."""

    index: int = Field(description="`prompt number * n + number of the answer to it`.")
    text: str
    logprobs: Logprobs | None = Field(description="If asked for.")
    finish_reason: str | None = Field(
        description="`stop`: end of sequence, stop string or stop token. `length`: max_tokens or the model's limit. "
        "null: a piece of a stream with more to come.",
        examples=["stop", "length"],
    )
    stop_reason: int | str | None = Field(None, description="The stop string or stop token id that ended the choice.")
    token_ids: list[int] | None = Field(None, description="The generated token ids, if asked for.")
    prompt_token_ids: list[int] | None = Field(None, description="The prompt's token ids, if asked for.")


class Usage(BaseModel):
    """Token counts of the whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answer to `POST /v1/completions`, and the form of each chunk of a stream."""

    id: str = Field(examples=["cmpl-5f0c6d6c0f5b4f6f8d6a3f6b1c0d9e8a"])
    object: str = Field("text_completion", examples=["text_completion"])
    created: int = Field(description="Unix time in seconds.")
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class TokenizeRequest(BaseModel):
    """The body of `POST /tokenize`. A field that is null counts as not given."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = Field(
        None, description="One of the served model's names; not given: the first.", examples=["classics-11m"]
    )
    prompt: str = Field(description="The text; it may be empty.", examples=["The old man looked at the sea and"])
    add_special_tokens: bool | None = Field(
        None,
        description="Whether the tokenizer's special tokens (such as beginning of sequence) are added, as they are to "
        "the prompt of a completion. Default true.",
    )
    return_token_strs: bool | None = Field(None, description="Also return the text of every token. Default false.")


class Tokenization(BaseModel):
    """The answer to `POST /tokenize`."""

    count: int = Field(description="Number of tokens.")
    max_model_len: int | None = Field(description="Most tokens of prompt and answer together; null: no limit.")
    tokens: list[int] = Field(description="Token ids.")
    token_strs: list[str] | None = Field(
        description="What each token adds to the text, as in log-probabilities: bytes that are no whole characters as "
        "`bytes:\\xe2\\x80`; nothing for special tokens. Null if not asked for."
    )


class DetokenizeRequest(BaseModel):
    """The body of `POST /detokenize`. A field that is null counts as not given."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = Field(
        None, description="One of the served model's names; not given: the first.", examples=["classics-11m"]
    )
    tokens: list[int] = Field(description="Token ids, in the vocabulary.", examples=[[1, 321, 4000]])


class Detokenization(BaseModel):
    """The answer to `POST /detokenize`."""

    prompt: str = Field(description="The text, without special tokens; bytes that are not UTF-8 become U+FFFD.")


class ModelCard(BaseModel):
    """One served model name."""

    id: str
    object: str = "model"
    created: int = Field(description="Unix time at which the server started, in seconds.")
    owned_by: str = "gale"
    root: str = Field(description="The first served name, whichever name was asked for.")
    max_model_len: int | None = Field(description="Most tokens of prompt and answer together; null: no limit.")


class ModelList(BaseModel):
    """The answer to `GET /v1/models`."""

    object: str = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The answer to `GET /health` of a server that can generate."""

    status: str = Field(examples=["ready"])


class Version(BaseModel):
    """The answer to `GET /version`."""

    version: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="The request's field at fault.", examples=["max_tokens"])
    code: str | None = Field(examples=["model_not_found"])


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or above."""

    error: ErrorDetail
