"""Types of request fields that need more than a bound: one sentence says what is wrong with a value."""

import math
import re
from typing import Annotated, Final

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

MAX_STOP_STRINGS: Final = 32
MAX_STOP_LENGTH: Final = 512
MAX_STOP_TOKEN_IDS: Final = 256
MAX_CHECKPOINTS: Final = 64
MAX_BAD_WORDS: Final = 1024
MAX_COUNT: Final = 2**31 - 1
MAX_PROMPT_LOGPROBS: Final = 2**22
"""The answer is in memory as a whole: some 50 bytes for each of them, and ten times that while it is written."""
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")
"""What a client may call its request; it stands in headers, answers and logs."""
STATE_NAME: Final = re.compile(r"(?!state-)[A-Za-z0-9_][A-Za-z0-9._:@-]{0,127}")
"""What a client may call a saved state; it stands in paths."""
MAX_STATE_TTL: Final = 10 * 365 * 86400


def _is_int(value: object) -> bool:
    return type(value) is int


def _prompt(value: object) -> list[str] | list[list[int]]:
    """All four forms of a prompt as a list of texts or a list of token id lists, each of which may be empty."""
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
        return value
    if kinds == {list} and set().union(*(map(type, ids) for ids in value)) <= {int}:
        return value
    raise PydanticCustomError("prompt", "must hold only strings, only token ids, or only lists of token ids")


def _strings(field: str, what: str, most: int, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
        raise PydanticCustomError(field, f"must be {what}")
    if len(value) > most:
        raise PydanticCustomError(field, f"must hold at most {most} strings")
    if "" in value:
        raise PydanticCustomError(field, "must not hold an empty string")
    if any(len(item) > MAX_STOP_LENGTH for item in value):
        raise PydanticCustomError(field, f"must hold strings of at most {MAX_STOP_LENGTH} characters")
    return tuple(value)


def _stop(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    listed = [value] if isinstance(value, str) else value
    return _strings("stop", "a string or a list of strings", MAX_STOP_STRINGS, listed)


def _stop_token_ids(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(map(_is_int, value)):
        raise PydanticCustomError("stop_token_ids", "must be a list of token ids")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise PydanticCustomError("stop_token_ids", f"must hold at most {MAX_STOP_TOKEN_IDS} token ids")
    return tuple(value)


def _checkpoint_at(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(_is_int(position) and position > 0 for position in value):
        raise PydanticCustomError("checkpoint_at", "must be a list of positive numbers of tokens")
    if len(value) > MAX_CHECKPOINTS:
        raise PydanticCustomError("checkpoint_at", f"must hold at most {MAX_CHECKPOINTS} positions")
    return tuple(value)


def _allowed_token_ids(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(map(_is_int, value)):
        raise PydanticCustomError("allowed_token_ids", "must be a list of token ids")
    if not value:
        raise PydanticCustomError("allowed_token_ids", "must not be empty")
    return tuple(dict.fromkeys(value))


def _bad_words(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    return _strings("bad_words", "a list of strings", MAX_BAD_WORDS, value)


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


def _request_id(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not REQUEST_ID.fullmatch(value):
        raise PydanticCustomError("request_id", "must be 1 to 128 letters, digits and characters of ._~:/+=@-")
    return value


def _save_state(value: object) -> bool | str | None:
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError("save_state", "must be true, false or a name")
    return state_name(value)


def state_name(value: object) -> str | None:
    """The name that a client gives a state; None: none.

    Raises:
        PydanticCustomError: it cannot be one.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not STATE_NAME.fullmatch(value):
        raise PydanticCustomError(
            "state_name",
            "must be a name of 1 to 128 letters, digits and characters of ._:@- that begins with a letter, a digit or "
            "_, and not with state-",
        )
    return value


Prompt = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Stop = Annotated[tuple[str, ...] | None, PlainValidator(_stop, json_schema_input_type=str | list[str] | None)]
StopTokenIds = Annotated[
    tuple[int, ...] | None, PlainValidator(_stop_token_ids, json_schema_input_type=list[int] | None)
]
CheckpointAt = Annotated[
    tuple[int, ...] | None, PlainValidator(_checkpoint_at, json_schema_input_type=list[int] | None)
]
AllowedTokenIds = Annotated[
    tuple[int, ...] | None, PlainValidator(_allowed_token_ids, json_schema_input_type=list[int] | None)
]
BadWords = Annotated[tuple[str, ...] | None, PlainValidator(_bad_words, json_schema_input_type=list[str] | None)]
LogitBias = Annotated[
    dict[int, float] | None, PlainValidator(_logit_bias, json_schema_input_type=dict[str, float] | None)
]
RequestId = Annotated[
    str | None,
    PlainValidator(_request_id, json_schema_input_type=Annotated[str, Field(pattern=f"^{REQUEST_ID.pattern}$")] | None),
]
SaveState = Annotated[
    bool | str | None,
    PlainValidator(
        _save_state, json_schema_input_type=bool | Annotated[str, Field(pattern=f"^{STATE_NAME.pattern}$")] | None
    ),
]
