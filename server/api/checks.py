"""The checks that all request bodies go through, and how a refusal is worded."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.errors import InvalidRequestError, NotFoundError

Schema = TypeVar("Schema", bound=BaseModel)


def parse_as(schema: type[Schema], body: dict[str, Any]) -> Schema:
    """Check a body against a schema.

    Raises:
        InvalidRequestError: ``param`` names the field at fault.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0]) from None


def served_name(name: str | None, names: tuple[str, ...]) -> str:
    """The name that a request means; not given: the first.

    Raises:
        NotFoundError: no model of that name is served.
    """
    if name is None:
        return names[0]
    if name not in names:
        served = ", ".join(map(repr, names))
        raise NotFoundError(
            f"The model {name!r} does not exist; this server has {served}.", param="model", code="model_not_found"
        )
    return name


def check_vocabulary(param: str, token_ids: "list[int] | tuple[int, ...] | Mapping[int, float]", size: int) -> None:
    """Raise InvalidRequestError for ``param`` unless all ids are in [0, size)."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
        bad = next(token for token in token_ids if not 0 <= token < size)
        raise invalid(param, f"holds the token id {_brief(bad)}; ids lie in 0..{size - 1}")


def invalid(param: str, complaint: str) -> InvalidRequestError:
    """The refusal of a field's value; the complaint follows the field's name in the message."""
    return InvalidRequestError(f"Invalid '{param}': {complaint}.", param=param)


def _explain(error: ErrorDetails) -> InvalidRequestError:
    param = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return InvalidRequestError(f"'{param}' is required.", param=param)
    if error["type"] == "extra_forbidden":
        return InvalidRequestError(f"Unknown field: '{param}'.", param=param)
    if error["type"] == "unsupported":
        return InvalidRequestError(f"'{param}' {error['msg']}.", param=param)
    message = error["msg"].replace("Input should be", "must be")
    value = error["input"]
    if isinstance(value, str | int | float | bool):
        message += f", not {_brief(value)}"
    return invalid(param, message)


def _brief(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer too long to print
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."
